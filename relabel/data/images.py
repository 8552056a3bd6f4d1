"""Images in class folders: which there are, by which names they are known, and their pixels."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ffcv_fields.label_map import MAX_CLASSES
from PIL import Image, UnidentifiedImageError

from ..errors import BadInput, BadSample
from .classes import IMAGENET_CLASSES, imagenet_classes
from .writer import PAGE_SIZE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
GREATEST_SIDE = 65500  # pixels: libjpeg's limit


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image: its file, its name (the path below the data folder, with slashes), and its class index."""

    path: Path
    name: str
    label: int

    @property
    def key(self) -> str:
        """What label maps and lists know it by: its class folder and the path below that, without the ending."""
        return key_of(self.name)


def key_of(name: str) -> str:
    """The key of a sample's, or a label map's, name."""
    return os.path.splitext(name)[0]


@dataclass
class ImageFolder:
    """The images of a folder in torchvision ImageFolder's order, and its classes; `remarks` say what was left out."""

    images: list[ImageFile]
    classes: tuple[str, ...]
    remarks: list[str] = field(default_factory=list)


def find_images(root: Path, classes: Sequence[str] | None = None) -> ImageFolder:
    """The images in the class folders of `root`, at any depth; linked folders are followed, loops are not.

    Hidden files and folders are left out, and so are files that do not end as images do; both are counted in
    `remarks`. Empty class folders count.

    Args:
        classes: the class list, if it is not that of the folders; each folder must be in it.

    Raises:
        BadSample: no folder, no class folders, no images, or a class folder that `classes` does not name.
    """
    if not root.is_dir():
        raise BadSample(root, "is not a folder; give the folder of the class folders")
    entries = sorted((entry for entry in os.scandir(root) if entry.is_dir()), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if not entry.name.startswith(".")]
    if not folders:
        raise BadSample(root, "holds no class folders; images must be in CLASS/IMAGE.jpg")
    if len(folders) > MAX_CLASSES:
        raise BadSample(root, f"holds {len(folders)} class folders; at most {MAX_CLASSES} can be stored")
    index = {name: i for i, name in enumerate(classes or folders)}
    for name in folders:
        if name not in index:
            raise BadSample(root / name, f"is a folder of none of the {len(index):,} classes of the class list")
    images: list[ImageFile] = []
    hidden = [entry.name for entry in entries if entry.name.startswith(".")]
    passed_over: Counter[str] = Counter()
    for name in folders:
        for file in _files(root / name, hidden):
            if file.name.lower().endswith(IMAGE_SUFFIXES):
                images.append(ImageFile(file, file.relative_to(root).as_posix(), index[name]))
            else:
                passed_over[file.suffix.lower() or "without ending"] += 1
    if not images:
        raise BadSample(root, f"holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return ImageFolder(images, tuple(classes or folders), _remarks(root, hidden, passed_over))


def _files(folder: Path, hidden: list[str], above: tuple = ()) -> Iterator[Path]:
    """The files below a folder, each folder's own first, in order of name, as os.walk sorted gives them."""
    inside: list[Path] = []
    for directory in _walk(folder, hidden, above):
        inside.append(directory)
    for directory in sorted(inside, key=str):
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if not entry.is_dir():
                if entry.name.startswith("."):
                    hidden.append(entry.name)
                else:
                    yield directory / entry.name


def _walk(folder: Path, hidden: list[str], above: tuple) -> Iterator[Path]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that it stands in
        return
    yield folder
    for entry in os.scandir(folder):
        if entry.is_dir():
            if entry.name.startswith("."):
                hidden.append(entry.name)
            else:
                yield from _walk(folder / entry.name, hidden, (*above, here))


def _remarks(root: Path, hidden: list[str], passed_over: Counter[str]) -> list[str]:
    remarks = []
    if hidden:
        names = ", ".join(sorted(set(hidden))[:5])
        remarks.append(f"{root}: {len(hidden):,} hidden files or folders were left out ({names})")
    if passed_over:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in passed_over.most_common(8))
        remarks.append(f"{root}: files that do not end as images were passed over: {kinds}")
    return remarks


def by_key(images: Sequence[ImageFile]) -> dict[str, ImageFile]:
    """The images by their keys.

    Raises:
        BadSample: two share a key: a label map or a list could not tell them apart; both are named.
    """
    found: dict[str, ImageFile] = {}
    for image in images:
        other = found.setdefault(image.key, image)
        if other is not image:
            raise BadSample(
                image.path, f"and {other.path} differ only in their ending, and share one label map; rename one"
            )
    return found


def class_list_for(root: Path, num_classes: int, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The class list for a folder that may hold only some of the classes; None: its folders are the classes.

    Args:
        num_classes: how many there are; 0: as many as folders.
        given: the list, if there is one.

    Raises:
        BadInput: `num_classes` fits neither the list nor the folders, and these are not ImageNet-1k's.
    """
    if given is not None:
        if num_classes not in (0, len(given)):
            raise BadInput(f"cfg.num_classes is {num_classes}; cfg.class_list names {len(given)} classes")
        return given
    if num_classes == 0 or not root.is_dir():
        return None
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    if len(folders) == num_classes:
        return None
    if num_classes == IMAGENET_CLASSES and set(folders) <= set(imagenet_classes()):
        return imagenet_classes()
    raise BadInput(
        f"{root}: has {len(folders)} class folders, not cfg.num_classes={num_classes}, and they are not WordNet ids of "
        "ImageNet-1k; give the names of all classes, one a line, in the file cfg.class_list"
    )


def read_image(file: Path, max_resolution: int, write_mode: str) -> Image.Image:
    """The image as torchvision's loader shows it: RGB, first frame, EXIF rotation not applied.

    Raises:
        BadSample: it cannot be decoded, or stored at this size.
    """
    try:
        with Image.open(file) as image:
            pixels = image.convert("RGB")
            pixels.info["sixteen_bit"] = image.mode.startswith("I")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(file, f"cannot be decoded ({str(error)[:120]}); is it damaged?") from None
    longest = min(max(pixels.size), max_resolution or max(pixels.size))
    size = f"is {pixels.width} x {pixels.height}"
    if longest > GREATEST_SIDE:
        raise BadSample(file, f"{size}; a JPEG has at most {GREATEST_SIDE:,} pixels a side: lower cfg.max_resolution")
    scale = longest / max(pixels.size)
    if min(pixels.size) * scale < 1:
        raise BadSample(file, f"{size}: no pixel is left at cfg.max_resolution={longest}")
    if write_mode != "jpg" and pixels.width * pixels.height * scale**2 * 3 > PAGE_SIZE - (1 << 20):
        raise BadSample(file, f"{size}, too large for raw; lower cfg.max_resolution")
    return pixels
