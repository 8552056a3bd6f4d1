"""What FFCV and this project ask of OpenCV, by Pillow, for a machine without OpenCV: used by the GPU kit alone.

OpenCV's wheel alone is larger than the whole kit may be. Pixels of a JPEG written here differ a little from OpenCV's.
"""

import io

import numpy as np
from PIL import Image

COLOR_RGB2BGR = 4
INTER_AREA = 3
IMWRITE_JPEG_QUALITY, IMWRITE_JPEG_RST_INTERVAL = 1, 4


def cvtColor(image: np.ndarray, code: int) -> np.ndarray:
    if code != COLOR_RGB2BGR:
        raise NotImplementedError(f"cvtColor with code {code}, without OpenCV")
    return np.ascontiguousarray(image[..., ::-1])


def imencode(ending: str, image: np.ndarray, options: list[int]) -> tuple[bool, np.ndarray]:
    given = dict(zip(options[::2], options[1::2], strict=True))
    quality, interval = given.pop(IMWRITE_JPEG_QUALITY), given.pop(IMWRITE_JPEG_RST_INTERVAL, 0)
    if ending != ".jpg" or given:
        raise NotImplementedError(f"imencode of {ending} with {given}, without OpenCV")
    file = io.BytesIO()
    Image.fromarray(image[..., ::-1]).save(file, "JPEG", quality=quality, restart_marker_blocks=interval)
    return True, np.frombuffer(file.getvalue(), np.uint8)


def resize(image: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    if interpolation != INTER_AREA:
        raise NotImplementedError(f"resize with interpolation {interpolation}, without OpenCV")
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
