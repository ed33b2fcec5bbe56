"""The application: addresses, who may ask, errors in the interface's form, one line in the log per request."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cobra.serve.errors import ApiError
from cobra.serve.metrics import Metrics
from cobra.serve.service import Service

log = logging.getLogger(__name__)

_GONE = 499  # the client has closed the connection; what nginx calls it


def make_app(service: Service) -> FastAPI:
    """Return the application; it starts and ends the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await service.start()
        yield
        await service.close()

    # Without the pages of documentation, which load programs from elsewhere.
    app = FastAPI(title="Cobra", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(_health(service))
    app.include_router(_interface(service), dependencies=[Depends(_key_check(service.config.api_key))])
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_failure)
    if service.config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.config.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(_RequestLog, metrics=service.metrics)
    return app


def _health(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        status = "stopping" if service.is_draining else "ok" if service.worker.is_alive else "failed"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    return router


def _interface(service: Service) -> APIRouter:
    router = APIRouter()
    started = int(time.time())
    model = {"id": service.name, "object": "model", "created": started, "owned_by": "cobra"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        if name != service.name:
            raise ApiError(404, f"There is no model {name[:100]!r}.", param="model", code="model_not_found")
        return model

    @router.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await service.complete(request)

    @router.get("/metrics")
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        text = service.metrics.text(service.open_answers)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return router


def _key_check(api_key: str | None) -> Any:
    """Return what refuses requests without the key; how long it takes says nothing about the key."""

    async def check(request: Request) -> None:  # async, or it would be carried out in a thread
        sent = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(sent.encode(), f"Bearer {api_key}".encode()):
            raise ApiError(
                401,
                "This server needs its API key, sent as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}."
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=_GONE)


async def _on_failure(_: Request, __: Exception) -> Response:
    return ApiError(500, "The server failed on this request; its log has the reason.").response()


class _RequestLog:
    """Writes a line for each request, without anything of its content, and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts: dict[str, Any] = {}
        scope["facts"] = facts  # the service adds what it knows
        started = time.monotonic()
        sent: dict[str, Any] = {"status": 500, "more_body": True}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
            else:
                sent["more_body"] = message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            seconds = time.monotonic() - started
            status = _GONE if sent["status"] == 200 and sent["more_body"] else sent["status"]
            if scope["path"] == "/v1/chat/completions":
                self._metrics.add("requests_total", labels=f'{{status="{status}"}}')
                self._metrics.add("request_seconds_sum", seconds)
                self._metrics.add("request_seconds_count")
            level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
            more = "".join(f" {name}={value}" for name, value in facts.items())
            # The raw path is still percent-encoded: no line breaks in it.
            path = scope.get("raw_path", b"?")[:200].decode("latin-1")
            log.log(level, "%s %s %d %.3fs%s", scope["method"], path, status, seconds, more)
