"""A small model, and real servers of it on ports of their own."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import openai
import pytest
import torch
from PIL import Image

from cobra.api import Cobra
from cobra.config import ModelConfig, ServeConfig
from cobra.models.build import build_model
from cobra.ops import use_backend
from cobra.serve.run import Server, listen
from cobra.serve.service import Service
from cobra.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    address: str
    service: Service
    server: Server
    thread: threading.Thread

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", **{"api_key": "none", "max_retries": 0} | options)


@contextmanager
def serving(vlm: Cobra, **settings: object) -> Iterator[Running]:
    config = ServeConfig(**{"load": "tiny", "name": "tiny", "port": 0} | settings)
    with listen(config) as listener:
        service = Service(vlm, config)
        server = Server(service)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        try:
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server, thread)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module", autouse=True)
def _plain_operations() -> Iterator[None]:
    """These need no compilation, and what is tested here does not depend on them."""
    with use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def vlm(small_model_config: ModelConfig, tokenizer: Tokenizer) -> Cobra:
    """A random model whose answers depend on all that it has read, and go on for ever unless drawn tokens end them."""
    model = build_model(small_model_config, seed=0)
    with torch.no_grad():
        model.llm.backbone.embedding.weight *= 2.5
        model.llm.backbone.embedding.weight[tokenizer.end_id] = 0  # its logit is 0, and never the highest
        for block in model.llm.backbone.layers:
            block.mixer.out_proj.weight *= 40
            block.mixer.A_log -= 4  # forgets slowly
    return Cobra(model, tokenizer, "small")


@pytest.fixture(scope="module")
def serve(vlm: Cobra) -> Callable[..., AbstractContextManager[Running]]:
    """Serve with settings of one's own, or another model."""
    return lambda model=vlm, **settings: serving(model, **settings)


@pytest.fixture(scope="module")
def running(vlm: Cobra) -> Iterator[Running]:
    """A server with the default settings."""
    with serving(vlm) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return running.client()


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40, 56), color) for color in ("white", "black", "red")]


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture(scope="session")
def image_urls(pictures: list[Image.Image]) -> list[str]:
    return [data_url(picture) for picture in pictures]
