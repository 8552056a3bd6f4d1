"""FFCV fields and decoders for localized multi-labels, and the pooling of label maps into soft targets."""

import numba

if numba.config.THREADING_LAYER == "default":
    # numba prefers TBB where it finds it, whose layer loses some 16 KB a batch; OpenMP's loses nothing (both measured).
    numba.config.THREADING_LAYER = "omp"

from .crops import CropSampler
from .image import CenterCropDecoder, CropBoxDecoder, RandomResizedCropDecoder
from .label_map import LabelMapDecoder, LabelMapField
from .pooling import label_pooling

__all__ = [
    "CenterCropDecoder",
    "CropBoxDecoder",
    "CropSampler",
    "LabelMapDecoder",
    "LabelMapField",
    "RandomResizedCropDecoder",
    "label_pooling",
]
