"""Which reader a folder, file or pattern of images needs, found out by looking."""

from pathlib import Path

from ...errors import BadSample
from .base import ClassChoice, ImageSource
from .tree import open_tree


def open_source(path: str | Path, choice: ClassChoice | None = None) -> ImageSource:
    """The images of a folder of class folders.

    Raises:
        BadSample: nothing that is known is there.
        BadInput: see `ClassChoice.of`.
    """
    root, choice = Path(path), choice or ClassChoice()
    if not root.is_dir():
        raise BadSample(root, "is not a folder; give the folder of the class folders")
    return open_tree(root, choice)
