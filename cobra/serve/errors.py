"""Errors as clients of OpenAI's interface expect them: a status, and a JSON object that says what and where."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from cobra.errors import CobraError


class ApiError(CobraError):
    """What a client is told.

    Attributes:
        status: of HTTP.
        param: the field of the request that is wrong, such as `messages[0].content`.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def refuse(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that cannot be answered as it is: status 400."""
    return ApiError(400, message, param=param, code=code)
