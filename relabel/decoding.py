"""What is said of an image that PIL cannot decode, wherever one is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, UnidentifiedImageError

from .errors import BadSample


@contextmanager
def decoding(where: Any) -> Iterator[None]:
    """Inside, an error of PIL's becomes a BadSample of `where`, the image's file or its place in an archive."""
    try:
        yield
    except BadSample:
        raise
    except UnidentifiedImageError:  # whose own message names an object in memory
        raise BadSample(where, "cannot be decoded (no format of images that PIL knows); is it damaged?") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(where, f"cannot be decoded ({str(error)[:120]}); is it damaged?") from None
