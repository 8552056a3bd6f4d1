"""FFCV fields and decoders for localized multi-labels, and the pooling of label maps into soft targets.

Import it before FFCV, whose import starts numba's threads.
"""

from . import _import_ffcv  # noqa: F401 - before FFCV is imported
from .crops import CropSampler
from .image import CenterCropDecoder, CropBoxDecoder, RandomResizedCropDecoder, image_field
from .label_map import LabelMapDecoder, LabelMapField, pack_label_map
from .pooling import label_pooling

__all__ = [
    "CenterCropDecoder",
    "CropBoxDecoder",
    "CropSampler",
    "LabelMapDecoder",
    "LabelMapField",
    "RandomResizedCropDecoder",
    "image_field",
    "label_pooling",
    "pack_label_map",
]
