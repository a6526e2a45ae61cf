"""What can be told of an encoded image without decoding it: its size, and that it is not cut."""

from __future__ import annotations

import io

from PIL import Image

from prelora.data.storage import UnusableError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""What both loaders decode."""
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's names for pixels of at most 8 bits a channel: decoders differ in what they make of more."""
SOS, EOI = b"\xff\xda", b"\xff\xd9"


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, as stored: no EXIF orientation is applied.

    Raises:
        UnusableError: no header of an image, more than 8 bits a channel, or a JPEG without its end.
    """
    image = open_image(data)
    if image.mode not in MODES:
        raise UnusableError(f"pixels of mode {image.mode}, accepted are {', '.join(MODES)}")
    # A decoder that is asked for a window only would not notice, and the verdict would hang on the window. The two
    # markers occur in no coded pixels; a thumbnail's stand before the image's own scan.
    if image.format == "JPEG" and data.rfind(EOI) < data.rfind(SOS):
        raise UnusableError("the JPEG is cut: its end marker is missing")
    return image.height, image.width


def open_image(data: bytes) -> Image.Image:
    """The image with its header read, its pixels not yet.

    Raises:
        UnusableError: no header of an image, or more pixels than Pillow takes for a picture.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnusableError(str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        what = "it is empty" if not data else f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} header"
        raise UnusableError(what) from error


def decode(data: bytes) -> Image.Image:
    """The whole image in RGB; palettes are resolved, alpha is dropped.

    Raises:
        UnusableError: it cannot be decoded.
    """
    image = open_image(data)
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise UnusableError(f"it cannot be decoded: {error}") from error
