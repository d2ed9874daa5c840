"""Images in messages: from data URLs to bytes that an engine may decode. Pure.

A few bytes can unfold into gigabytes of pixels, so their number is read before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any

from backends.contract import BackendError

MAX_IMAGES = 16
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000


def data_of(part: dict[str, Any]) -> bytes:
    """Return the image in a message's `image_url` part. Raises BackendError("invalid_request")."""
    reference = part.get("image_url")
    url = reference.get("url") if isinstance(reference, dict) else reference
    if not isinstance(url, str) or not url.startswith("data:"):
        raise BackendError(
            "invalid_request", "an image_url must be a data URL (data:image/png;base64,…)"
        )
    header, comma, content = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise BackendError("invalid_request", "the data URL of an image must be in base64")
    if len(content) > MAX_BYTES * 4 // 3 + 4:
        raise BackendError(
            "invalid_request",
            f"an image has about {len(content) * 3 // 4} bytes, but at most {MAX_BYTES} are taken",
        )
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BackendError("invalid_request", f"an image is not valid base64: {error}") from error
    _check_size(data)
    return data


def check(messages: Iterable[dict[str, Any]]) -> None:
    """Make sure that the images in `messages` may be decoded, all of them at once.

    Raises BackendError("invalid_request").
    """
    found = [
        data_of(part)
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part.get("type") == "image_url"
    ]
    if len(found) > MAX_IMAGES:
        raise BackendError(
            "invalid_request", f"a request takes at most {MAX_IMAGES} images, not {len(found)}"
        )
    pixels = sum(_check_size(data) for data in found)
    if pixels > MAX_PIXELS:
        raise BackendError(
            "invalid_request",
            f"the images have {pixels} pixels together, but at most {MAX_PIXELS} are taken",
        )


def _check_size(data: bytes) -> int:
    """Return the number of pixels. Raises BackendError for too many, or none."""
    size = _size(data)
    if size is None:
        raise BackendError("invalid_request", "an image is not a whole PNG, JPEG, GIF or BMP file")
    width, height = size
    if not 0 < width * height <= MAX_PIXELS:
        raise BackendError(
            "invalid_request",
            f"an image has {width} by {height} pixels, but at least 1 and at most {MAX_PIXELS} are "
            "taken",
        )
    return width * height


def _size(data: bytes) -> tuple[int, int] | None:
    """Return width and height as the file's header says, or None if it is no such file."""
    if data.startswith(b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR") and len(data) >= 24:
        return _number(data[16:20]), _number(data[20:24])
    if data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= 10:
        return _number(data[7:5:-1]), _number(data[9:7:-1])
    if data.startswith(b"BM") and len(data) >= 26:
        width = int.from_bytes(data[18:22], "little", signed=True)
        height = int.from_bytes(data[22:26], "little", signed=True)
        return abs(width), abs(height)
    if data.startswith(b"\xff\xd8"):
        return _jpeg_size(data)
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the size in the first frame header, which segments of known lengths come before."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        # SOF0 to SOF15 begin a frame; three of the numbers between them mean something else.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _number(data[at + 7 : at + 9]), _number(data[at + 5 : at + 7])
        at += 2 + max(2, _number(data[at + 2 : at + 4]))
    return None


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "big")
