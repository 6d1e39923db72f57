"""The one place where an image becomes what the models see: upright, 8 bits, RGB.

Upright: turned as its EXIF note says. 16-bit grey is scaled to 8 bits (Pillow's own conversion clips it). Of
an image with an alpha channel its colours are taken, as LLaVA's and lmms-eval's own code do. Of an animation
the first frame.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from methods.errors import UserError

_ORIENTATION = 0x0112
# Pillow warns at half of what it refuses; such images are shown to models as any others
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(UserError, ValueError):
    """An image that cannot be shown to a model; the message is the reason."""


def upright(source: Image.Image | bytes | str | Path) -> Image.Image:
    """A file, its bytes, or an open image, as the models get it; what is so already is given back as it is.

    Raises BadImage: no image, truncated, a decompression bomb, or of a mode without a way to RGB.
    """
    with _strictly():
        image = source if isinstance(source, Image.Image) else _opened(source)
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else _rgb(image)


def problem(content: bytes | None) -> tuple[str, tuple[int, int]]:
    """(why the bytes of a file cannot be shown to a model, or an empty text; its upright width and height).

    All of it is decoded, JPEG at an eighth of its size."""
    if not content:
        return "there is no image", (0, 0)
    try:
        with _strictly():
            image = _opened(content)
            size, turned = image.size, image.getexif().get(_ORIENTATION, 1) >= 5
            image.draft(None, (1, 1))
            image.load()
        return "", size[::-1] if turned else size
    except BadImage as error:
        return str(error), (0, 0)


def header_problem(content: bytes | None) -> str:
    """As `problem`, by the file's header alone."""
    if not content:
        return "there is no image"
    try:
        with _strictly():
            _opened(content)
    except BadImage as error:
        return str(error)
    return ""


def _opened(source: bytes | str | Path) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # grey of 16 bits, by itself or in 32
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


@contextlib.contextmanager
def _strictly() -> Iterator[None]:
    """Truncated files are an error, whatever another library has told Pillow; every error is a BadImage."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it on import, for the whole process
    try:
        yield
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large to be decoded safely ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except Exception as error:  # Pillow's plug-ins raise many kinds for damaged files
        if isinstance(error, MemoryError):
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise BadImage(f"cannot be decoded ({reason})") from error
