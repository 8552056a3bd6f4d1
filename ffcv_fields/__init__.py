"""FFCV fields and decoders for localized multi-labels, and the pooling of label maps into soft targets."""

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
