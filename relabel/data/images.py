"""An image's file as pixels."""

from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import BadSample
from .writer import PAGE_SIZE

GREATEST_SIDE = 65500  # pixels: libjpeg's limit


def read_image(data: bytes, where: Any, max_resolution: int, write_mode: str) -> Image.Image:
    """The image as torchvision's loader shows it: RGB, first frame, EXIF rotation not applied.

    Args:
        data: the whole file.
        where: it comes from, for messages.

    Raises:
        BadSample: it cannot be decoded, or stored at this size.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            pixels = image.convert("RGB")
            pixels.info["sixteen_bit"] = image.mode.startswith("I")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(where, f"cannot be decoded ({str(error)[:120]}); is it damaged?") from None
    longest = min(max(pixels.size), max_resolution or max(pixels.size))
    size = f"is {pixels.width} x {pixels.height}"
    if longest > GREATEST_SIDE:
        raise BadSample(where, f"{size}; a JPEG has at most {GREATEST_SIDE:,} pixels a side: lower cfg.max_resolution")
    scale = longest / max(pixels.size)
    if min(pixels.size) * scale < 1:
        raise BadSample(where, f"{size}: no pixel is left at cfg.max_resolution={longest}")
    if write_mode != "jpg" and pixels.width * pixels.height * scale**2 * 3 > PAGE_SIZE - (1 << 20):
        raise BadSample(where, f"{size}, too large for raw; lower cfg.max_resolution")
    return pixels
