"""Images in class folders: which there are, and their pixels."""

import os
from pathlib import Path

from ffcv_fields.label_map import MAX_CLASSES
from PIL import Image, UnidentifiedImageError

from ..errors import BadSample
from .writer import PAGE_SIZE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def find_images(root: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """`[(file, label)]` and the class names, in torchvision ImageFolder's order; empty class folders count."""
    if not root.is_dir():
        raise BadSample(root, "is not a folder; give the folder of the class folders")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise BadSample(root, "holds no class folders; images must be in CLASS/IMAGE.jpg")
    if len(classes) > MAX_CLASSES:
        raise BadSample(root, f"holds {len(classes)} class folders; at most {MAX_CLASSES} can be stored")
    images = []
    for label, name in enumerate(classes):
        for folder, _, names in sorted(os.walk(root / name)):
            images += [(Path(folder, n), label) for n in sorted(names) if n.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise BadSample(root, f"holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return images, classes


def read_image(file: Path, max_resolution: int, write_mode: str) -> Image.Image:
    """The image as torchvision's loader shows it: RGB, first frame, EXIF rotation not applied."""
    try:
        with Image.open(file) as image:
            pixels = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(file, f"cannot be decoded ({str(error)[:120]}); is it damaged?") from None
    longest = min(max(pixels.size), max_resolution or max(pixels.size))
    if longest > 65535:
        raise BadSample(file, f"is {pixels.width} x {pixels.height}; store at most 65535 with cfg.max_resolution")
    scale = longest / max(pixels.size)
    if min(pixels.size) * scale < 1:
        raise BadSample(file, f"is {pixels.width} x {pixels.height}: no pixel is left at cfg.max_resolution={longest}")
    if write_mode != "jpg" and pixels.width * pixels.height * scale**2 * 3 > PAGE_SIZE - (1 << 20):
        raise BadSample(file, f"is {pixels.width} x {pixels.height}, too large for raw; lower cfg.max_resolution")
    return pixels
