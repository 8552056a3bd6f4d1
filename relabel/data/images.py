"""What is stored of an image's file: its JPEG, kept without loss, or pixels that are encoded; how many of each."""

from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from ffcv_fields.jpeg import DAMAGED, OTHER_KIND, TOO_LARGE, KeptJpeg, area_resize, decode_jpeg, keep_jpeg
from PIL import Image

from ..decoding import decoding
from ..errors import BadSample
from .settings import Packing
from .writer import PAGE_SIZE

GREATEST_SIDE = 65500  # pixels: libjpeg's limit
GREATEST_DENOMINATOR = 8  # of the scales that libjpeg decodes to
# Decoded pixels to a stored one, where a JPEG is decoded at a lower resolution. Against the area filter of all pixels
# the PSNR is 35 to 41 dB on photographs of 500 pixels; with 1 (from twice too large on) it is 4 dB less.
SPARE = 1.5
WHY_NOT = {
    TOO_LARGE: "larger than cfg.max_resolution",
    OTHER_KIND: "JPEGs of a kind that cannot be kept (CMYK, arithmetic coding, ...)",
    DAMAGED: "JPEGs with a fault that decoders pass over",
}
NO_JPEG = "other formats"


@dataclass
class Stored:
    """How many images were kept as they are, how many encoded, and why; how many had 16 bits."""

    kept: int = 0
    encoded: Counter[str] = field(default_factory=Counter)
    sixteen_bit: int = 0

    def merge(self, other: "Stored") -> None:
        self.kept += other.kept
        self.encoded += other.encoded
        self.sixteen_bit += other.sixteen_bit

    def lines(self, settings: Packing) -> list[str]:
        """For the summary."""
        lines = []
        if keeps(settings):
            why = "; ".join(f"{count:,} {reason}" for reason, count in self.encoded.most_common())
            encoded = f"{self.encoded.total():,} images encoded at quality {settings.jpeg_quality}"
            lines.append(f"{self.kept:,} JPEGs were kept without loss, {encoded}{f' ({why})' if why else ''}")
        if self.sixteen_bit:
            lines.append(
                f"{self.sixteen_bit:,} images of 16 bits lost their range: they become 8 bits, as in torchvision"
            )
        return lines


def keeps(settings: Packing) -> bool:
    """Whether JPEGs that need no resizing are kept."""
    return settings.jpeg == "keep" and settings.write_mode == "jpg"


def to_be_stored(data: bytes, where: Any, settings: Packing, counts: Stored) -> KeptJpeg | np.ndarray:
    """An image's file as the image field takes it: a JPEG, or RGB pixels, uint8 `[H, W, 3]`.

    The pixels are those that torchvision's loader shows: RGB, first frame, EXIF rotation not applied. A JPEG in which
    libjpeg finds a fault is PIL's to read or to refuse. One that is to be made three times smaller is decoded at half
    the resolution, six times: a fourth, twelve times: an eighth.

    Args:
        data: the whole file.
        where: it comes from, for messages.
        counts: are brought up to date.

    Raises:
        BadSample: it cannot be decoded, or stored at this size.
    """
    with decoding(where), Image.open(BytesIO(data)) as image:
        why_not, pixels = NO_JPEG, None
        if image.format in ("JPEG", "MPO"):
            why_not = ""
            if keeps(settings):
                kept, why_not = _keep(data, image, settings)
                if kept is not None:
                    counts.kept += 1
                    return kept
            pixels = _decode(data, image, settings.max_resolution)
        if pixels is None:
            pixels = np.asarray(image.convert("RGB"))
        size, sixteen_bit = image.size, image.mode.startswith("I")
    _check_size(size, where, settings)
    if 0 < settings.max_resolution < max(size):
        ratio = settings.max_resolution / max(size)
        pixels = area_resize(pixels, *(int(ratio * side) for side in size))  # the sides as FFCV's field has them
    counts.sixteen_bit += sixteen_bit
    counts.encoded[why_not] += 1
    return pixels


def _keep(data: bytes, image: Image.Image, settings: Packing) -> tuple[KeptJpeg | None, str]:
    """The JPEG, or None and why not. `image`: as PIL has opened it."""
    kept, code = keep_jpeg(data, settings.restart_interval, settings.max_resolution)
    if kept is None:
        return None, WHY_NOT[code]
    if (kept.width, kept.height) != image.size or image.mode not in ("RGB", "L"):
        return None, WHY_NOT[DAMAGED]
    return kept, ""


def _decode(data: bytes, image: Image.Image, max_resolution: int) -> np.ndarray | None:
    """The pixels of a gray or color JPEG without fault, at a lower resolution where so many are not needed."""
    if image.mode not in ("RGB", "L"):
        return None
    size, longest, denominator = image.size, max(image.size), 1
    while max_resolution and denominator < GREATEST_DENOMINATOR and longest >= 2 * SPARE * denominator * max_resolution:
        denominator *= 2
    return decode_jpeg(data, *size, denominator)


def _check_size(size: tuple[int, int], where: Any, settings: Packing) -> None:
    """Raise a BadSample where an image of this size cannot be stored."""
    longest = min(max(size), settings.max_resolution or max(size))
    scale, said = longest / max(size), f"is {size[0]} x {size[1]}"
    if longest > GREATEST_SIDE:
        raise BadSample(where, f"{said}; a JPEG has at most {GREATEST_SIDE:,} pixels a side: lower cfg.max_resolution")
    if min(size) * scale < 1:
        raise BadSample(where, f"{said}: no pixel is left at cfg.max_resolution={longest}")
    if settings.write_mode != "jpg" and size[0] * size[1] * scale**2 * 3 > PAGE_SIZE - (1 << 20):
        raise BadSample(where, f"{said}, too large for raw; lower cfg.max_resolution")
