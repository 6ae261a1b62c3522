"""Image files within bounds: what is accepted, and one sentence for what is not."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tenure.images import ImageError, ImageLimits, open_image, read_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    empty = b"IDAT" + zlib.compress(b"")
    chunks = [(header, chunk), (empty[4:], empty)]
    body = b"".join(
        struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole)) for data, whole in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats(tmp_path, kind):
    path = tmp_path / "picture"  # the contents count, not the name
    path.write_bytes(encoded(Image.new("RGB", (20, 10), (200, 30, 30)), kind))
    image = open_image(path)
    assert image.mode == "RGB" and image.size == (20, 10)
    assert all(abs(a - b) < 12 for a, b in zip(image.getpixel((5, 5)), (200, 30, 30), strict=True))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_modes_become_rgb_on_white(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert read_image(encoded(Image.new(mode, (4, 4)), kind), "x").mode == "RGB"
    if mode in ("LA", "RGBA"):
        assert read_image(encoded(Image.new(mode, (4, 4))), "x").getpixel((0, 0)) == (255, 255, 255)


def test_a_photograph_is_turned_upright_and_reduced():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (300, 100)), "JPEG", exif=exif)
    assert read_image(data, "x").size == (100, 300)
    assert read_image(data, "x", ImageLimits(max_side=150)).size == (50, 150)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text", b"no image at all", "is no image; accepted: PNG, JPEG, WEBP, GIF, BMP"),
        ("empty", b"", "is no image"),
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is no image"),
        ("tiff", encoded(Image.new("RGB", (4, 4)), "TIFF"), "is no image"),
        ("bomb", png_header(6_000, 6_000), "has 6000 x 6000 pixels; accepted: up to 32,000,000 of them"),
        ("huge", png_header(2**31 - 1, 2**31 - 1), "has too many pixels; accepted: up to 32,000,000"),
        ("large", png_header(10_000, 10_000), "has too many pixels; accepted: up to 32,000,000"),
        ("thin", png_header(5_000, 2), "has 5000 x 2 pixels; accepted: a longer side of up to 100 times"),
        ("hollow", png_header(64, 64), "is damaged: "),
        ("cut", encoded(Image.effect_noise((64, 64), 50).convert("RGB"))[:400], "is damaged: "),
        ("cut jpeg", encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:500], "is damaged: "),
        ("cut header", encoded(Image.new("RGB", (4, 4)))[:20], "is (damaged|no image)"),
    ],
)
def test_hostile_files_are_refused_in_one_sentence(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as refused:
        open_image(path)
    assert "\n" not in str(refused.value) and name in str(refused.value)


def test_bytes_that_change_at_random_never_raise_anything_else():
    import random

    rng = random.Random(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = encoded(Image.effect_noise((24, 24), 60).convert("RGB"), kind)
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(ImageError):
                assert max(read_image(bytes(data), "x").size) <= 4096


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/x.png", "https://example.org/x.png", "file:///etc/passwd",
                                  "data:image/png;base64,AAAA", "ftp://example.org/x"])  # fmt: skip
def test_nothing_is_fetched(name):
    with pytest.raises(ImageError, match=r"got the address .* accepted: a local file"):
        open_image(name)


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "absent.png", tmp_path, Path("/dev/zero"), "a\0b"):
        with pytest.raises(ImageError, match=r"there is no image file|cannot read the image"):
            open_image(path)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(33 * 2**20)
    with pytest.raises(ImageError, match=r"has 34,603,008 bytes; accepted: up to 33,554,432"):
        open_image(large)
