"""Image files of users: opened within bounds, refused in one sentence, never fetched.

A file of a few kilobytes can claim to be a picture of gigabytes, and some formats run programs to be read. So the
format must be one of a few, size in bytes and pixels are checked before anything is decoded, and an image whose
decoding fails is an `ImageError`, whatever the decoder raised.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class ImageLimits:
    """Bounds on an image, checked before it is decoded.

    Attributes:
        max_bytes: size of the file.
        max_pixels: width times height. RGB takes three bytes a pixel, a processor's floats twelve.
        max_side: width or height; larger images are reduced to it after they are read.
        max_ratio: the longer side may be so many times the shorter one (processors refuse more, or resize to nothing).
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 32_000_000
    max_side: int = 4096
    max_ratio: float = 100.0


LIMITS = ImageLimits()


def open_image(path: str | os.PathLike[str], limits: ImageLimits = LIMITS) -> Image:
    """The first frame of an image file as RGB, upright, on white where it is transparent, at most `max_side` wide.

    Args:
        path: a local file; addresses are not fetched.

    Raises:
        ImageError: no such file, no image of `FORMATS`, damaged, or beyond `limits`.
        ImportError: PIL is missing.
    """
    name = str(path)
    if _ADDRESS.match(name):
        raise ImageError(f"got the address {_short(name)!r} as an image; accepted: a local file (nothing is fetched)")
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            raise ImageError(f"there is no image file {_short(name)!r}")
        size = file.stat().st_size
        if size > limits.max_bytes:
            raise ImageError(f"the image {_short(name)!r} has {size:,} bytes; accepted: up to {limits.max_bytes:,}")
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot read the image {_short(name)!r}: {_reason(error)}") from None
    return read_image(data, _short(name), limits)


def read_image(data: bytes, name: str, limits: ImageLimits = LIMITS) -> Image:
    """As `open_image`, of a file's bytes; `name` is for messages."""
    pil = _pil()
    if len(data) > limits.max_bytes:
        raise ImageError(f"the image {name!r} has {len(data):,} bytes; accepted: up to {limits.max_bytes:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            image = pil.open(io.BytesIO(data), formats=FORMATS)
    except (pil.DecompressionBombWarning, pil.DecompressionBombError):
        raise ImageError(f"the image {name!r} has too many pixels; accepted: up to {limits.max_pixels:,}") from None
    except pil.UnidentifiedImageError:
        raise ImageError(f"{name!r} is no image; accepted: {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise anything on hostile headers: struct.error, SyntaxError, KeyError
        raise ImageError(f"the image {name!r} is damaged: {_reason(error)}") from None
    with image:
        width, height = image.size
        if width < 1 or height < 1 or width * height > limits.max_pixels:
            raise ImageError(
                f"the image {name!r} has {width} x {height} pixels; accepted: up to {limits.max_pixels:,} of them"
            )
        if max(width, height) > limits.max_ratio * min(width, height):
            raise ImageError(
                f"the image {name!r} has {width} x {height} pixels; accepted: a longer side of up to "
                f"{limits.max_ratio:g} times the shorter one"
            )
        try:
            return _upright_rgb(image, limits.max_side)
        except Exception as error:
            raise ImageError(f"the image {name!r} is damaged: {_reason(error)}") from None


def _upright_rgb(image: Any, side: int) -> Image:
    from PIL import Image, ImageOps

    if image.format == "JPEG":
        image.draft("RGB", (side, side))  # decodes at a fraction of a large photograph's size
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P" or "transparency" in upright.info or upright.mode in ("LA", "PA", "RGBA"):
        upright = upright.convert("RGBA")
        plain = Image.new("RGB", upright.size, "white")
        plain.paste(upright, mask=upright.getchannel("A"))
    else:
        plain = upright.convert("RGB")
    if max(plain.size) > side:
        plain.thumbnail((side, side), Image.Resampling.LANCZOS)
    return plain


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images need PIL: pip install 'tenure[vision]'") from None
    return Image


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:80]}…{name[-30:]}"


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).splitlines()
    return (text[0] if text else "") or type(error).__name__
