"""FFCV fields and decoders for localized multi-labels, and the pooling of label maps into soft targets.

Import it before FFCV, whose import starts numba's threads.
"""

import numba

if numba.config.THREADING_LAYER == "default":
    # numba prefers TBB where it finds it, whose layer leaks memory on busy cores (100 KB per epoch of three batches,
    # measured); OpenMP's does not. The third, workqueue, aborts the process when a second thread uses it.
    try:
        import numba.np.ufunc.omppool
    except ImportError as error:
        raise ImportError(f"numba cannot use OpenMP ({error}): install it, e.g. apt-get install libgomp1") from None
    numba.config.THREADING_LAYER = "omp"

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
