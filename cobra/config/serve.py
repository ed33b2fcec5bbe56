"""Settings of the server."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from cobra.config.checks import not_negative, positive
from cobra.config.load import LoadConfig
from cobra.errors import ConfigError

_OTHER_NUMBERS = {"port", "temperature"}  # all others must be greater than 0


@dataclass(frozen=True, kw_only=True)
class ServeConfig(LoadConfig):
    """Everything that `scripts/serve.py` needs."""

    name: str | None = None  # what clients call the model; null: its own name
    host: str = "127.0.0.1"  # "0.0.0.0": reachable from other machines
    port: int = 8000  # 0: any that is free
    api_key: str | None = None  # clients must send it; null: anyone may ask
    cors_origins: list[str] = field(default_factory=list[str])  # web pages that may ask, such as "https://example.org"

    temperature: float = 0.0  # where a client sends none
    default_tokens: int = 512  # limit of an answer where a client sends none
    max_tokens: int = 4096  # the highest limit that a client may send
    max_prompt_tokens: int = 8192  # images included
    max_choices: int = 8  # answers to one request, its `n`

    max_rows: int = 64  # answers that are generated at once
    max_waiting: int = 256  # answers that wait for their turn; more are refused with 429
    timeout: float = 300.0  # seconds that a request may take
    body_timeout: float = 30.0  # seconds of them in which its body must arrive
    shutdown_timeout: float = 30.0  # seconds that running answers get to end when the server is stopped

    max_messages: int = 256  # of one request
    max_body_bytes: int = 32 * 2**20  # of one request, images included
    max_images: int = 8  # of one request
    max_image_bytes: int = 16 * 2**20  # of a file
    max_image_pixels: int = 40_000_000  # of an image
    image_urls: bool = True  # fetch http(s) addresses; false: only images inside requests
    allow_private_images: bool = False  # fetch from this machine and its own network, too
    image_timeout: float = 15.0  # seconds to fetch an image

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("temperature", self.temperature)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port={self.port} must be from 0, which is any free one, to 65535.")
        if self.api_key == "":
            raise ConfigError("api_key is empty; give clients a key, or null to let anyone ask.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError(
                "api_key holds characters that no HTTP header can; use letters, digits and signs of ASCII."
            )
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in _OTHER_NUMBERS and isinstance(value, (int, float)) and not isinstance(value, bool):
                positive(item.name, value)
        for smaller, larger in (("default_tokens", "max_tokens"), ("max_choices", "max_rows")):
            if getattr(self, smaller) > getattr(self, larger):
                raise ConfigError(
                    f"{smaller}={getattr(self, smaller)} is more than {larger}={getattr(self, larger)}; raise "
                    f"{larger}, or lower {smaller}."
                )
