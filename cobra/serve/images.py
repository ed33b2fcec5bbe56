"""Images of requests: from `data:` URLs and web addresses to the pixels that the vision encoder reads."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from cobra.api import Cobra, Pixels
from cobra.config import ServeConfig
from cobra.errors import DataError
from cobra.serve.errors import ApiError, refuse
from cobra.serve.fetch import NotFetched, fetch

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of strangers' files no other decoders are tried

_FETCHES = 8  # at once, so many files are in memory while they arrive
_DECODERS = 2  # threads: so many images are in memory at once as they were sent


class ImageReader:
    """Reads images within the server's limits; use it in one event loop."""

    def __init__(self, vlm: Cobra, config: ServeConfig) -> None:
        self._vlm = vlm
        self._config = config
        self._fetches = asyncio.Semaphore(_FETCHES)
        self._pool = ThreadPoolExecutor(_DECODERS, "images")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def read(self, url: str, count: Callable[[int], None]) -> Pixels:
        """Return an image, decoded and resized.

        Args:
            url: where it is, or itself as a `data:` URL.
            count: told the number of bytes that are fetched, as they arrive; it may raise.

        Raises:
            ApiError: there is none, it is larger than allowed, or it does not decode.
        """
        loop = asyncio.get_running_loop()
        if url[:5].lower() == "data:":
            return await loop.run_in_executor(self._pool, self._decode_url, url)
        if not self._config.image_urls:
            raise _refuse("This server fetches no images; send the image itself, as a data: URL.")
        try:
            async with self._fetches:
                content = await fetch(
                    url,
                    max_bytes=self._config.max_image_bytes,
                    timeout=self._config.image_timeout,
                    allow_private=self._config.allow_private_images,
                    count=count,
                )
        except NotFetched as error:
            raise _refuse(f"Cannot fetch the image {url[:200]!r}: {error}.") from None
        return await loop.run_in_executor(self._pool, self._decode, content)

    def _decode_url(self, url: str) -> Pixels:
        header, comma, data = url.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise _refuse("A data: URL must be of the form data:image/png;base64,...")
        limit = self._config.max_image_bytes
        if len(data) > limit // 3 * 4 + 4:
            raise _refuse(f"The image is larger than {limit} bytes, which is this server's limit.")
        try:
            return self._decode(base64.b64decode(data, validate=True))
        except binascii.Error:
            raise _refuse("The data: URL is not valid base64.") from None

    def _decode(self, content: bytes) -> Pixels:
        """Decode a file whose header says that it is not too large."""
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError:
            raise self._too_many_pixels() from None
        except Exception:  # decoders of damaged files raise anything
            raise _refuse(f"The image is of an unknown format or damaged; known: {', '.join(FORMATS)}.") from None
        if image.width * image.height > self._config.max_image_pixels:
            raise self._too_many_pixels()
        try:
            return self._vlm.prepare_image(image)
        except DataError as error:
            raise _refuse(f"The image does not decode: {error}") from None

    def _too_many_pixels(self) -> ApiError:
        return _refuse(
            f"The image has more than {self._config.max_image_pixels} pixels, which is this server's limit; make it "
            "smaller: the model reads far fewer."
        )


def _refuse(message: str) -> ApiError:
    return refuse(message, "messages", "invalid_image")
