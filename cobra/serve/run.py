"""The serve journey: load a model, listen, answer until told to stop."""

from __future__ import annotations

import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from PIL import Image

import cobra
from cobra.api import Cobra
from cobra.config import ServeConfig
from cobra.errors import CobraError, ConfigError
from cobra.ops import use_backend
from cobra.serve.app import make_app
from cobra.serve.service import Service

log = logging.getLogger(__name__)

_LAST_WORDS = 2  # seconds to send errors to those whose answers are cut


def serve(config: ServeConfig) -> None:
    """Load the model and answer requests until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: the address cannot be listened on.
        CheckpointError: the model is missing or damaged.
        CobraError: the model has failed for good.
    """
    with listen(config) as listener, use_backend(config.ops):
        vlm = cobra.load(config.load, **config.load_options)
        warm_up(vlm)
        service = Service(vlm, config)
        Server(service).run([listener])
        if service.worker.has_failed:
            raise CobraError(
                "The model's thread has ended by an error, which is in the log above; start the server again."
            )
    log.info("Stopped.")


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket that is bound but refuses connections until the server runs.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on host={config.host} port={config.port}: {error.strerror}. Choose another port, or 0 for "
            "any free one."
        ) from None
    return listener


def warm_up(vlm: Cobra) -> None:
    """Answer once with and once without an image, so that the first client does not wait for kernels."""
    for image in (None, Image.new("RGB", (8, 8))):
        vlm.generate(image, "Hello", max_new_tokens=2)


class Server(uvicorn.Server):
    """Stops in two steps: the first signal lets running answers end and refuses new ones, the second ends it."""

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_LAST_WORDS,
            )
        )
        self._service = service
        self._stop_at = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        for listener in sockets or []:
            log.info("%s", _greeting(self._service, listener))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Carry out a signal."""
        if self._service.is_draining:
            super().handle_exit(sig, frame)
        else:
            self.drain()
            log.info("%s: running answers may end, new ones are refused.", signal.Signals(sig).name)

    def drain(self) -> None:
        """Stop as soon as the running answers are complete, or their time is over."""
        self._service.is_draining = True
        self._stop_at = time.monotonic() + self._service.config.shutdown_timeout

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether to stop."""
        if self._service.worker.has_failed:
            self.should_exit = True  # all who waited have been told
        if self._service.is_draining and not self.should_exit:
            is_late = time.monotonic() > self._stop_at
            if is_late:
                self._service.end_all()
            self.should_exit = is_late or not self._service.open_answers
        return await super().on_tick(counter)


def _greeting(service: Service, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    key = " \\\n       -H 'Authorization: Bearer KEY'" if service.config.api_key is not None else ""
    return (
        f"{service.name} answers at http://{shown}:{port}/v1; for example:\n"
        f"  curl http://{shown}:{port}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f'''       -d '{{"model": "{service.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''''
    )
