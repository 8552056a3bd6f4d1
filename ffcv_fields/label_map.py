"""The FFCV field that stores ReLabel's label maps, and its decoder.

A label map says, at each of `height x width` cells of an image, which `top_k` classes a strong classifier sees
there and how confident it is (Yun et al., CVPR 2021, section 3.1). Stored and returned in one layout:

    packed[0, k, y, x] = bits of the score (a logit), float16 in int16 or float32 in int32
    packed[1, k, y, x] = class index, or -1 where the cell has no k-th entry

Rows are the image's y, columns its x. A sample without a label map has no data in the file; the decoder returns
`NO_LABEL_MAP` as its first class index, for `label_pooling` to use the single label instead.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from ffcv.fields.base import ARG_TYPE, Field
from ffcv.libffcv import ctypes_memcopy
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

EMPTY = -1
NO_LABEL_MAP = -2
MAX_CLASSES = 32767  # class indices are int16, as float16 scores are stored

SCORE_DTYPES = {"float16": (np.float16, np.int16), "float32": (np.float32, np.int32)}
AXIS_ORDERS = ("yx", "xy")
SCORES = ("logits", "probabilities")

MAGIC = 0x4C424C52  # "RLBL", little-endian
VERSION = 2  # 1 did not say what kind of scores it holds
HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u4"),
        ("top_k", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("num_classes", "<u4"),
        ("score_bytes", "<u4"),
        ("imported_axis_order", "<u4"),
        ("scores", "<u4"),
    ]
)


class LabelMapField(Field):
    """Label maps of one size; the parameters are kept in the file's header and checked on reading.

    Args:
        top_k: classes in each cell, 1 to 32.
        height: cells along the image's y, 1 to 1024.
        width: cells along its x, 1 to 1024.
        num_classes: class indices run from 0 to `num_classes - 1`; at most 32,767.
        score_dtype: "float16" (4.5 KB for 5 x 15 x 15) or "float32" (9 KB).
        imported_axis_order: how the files that the maps came from were read, "yx" or "xy": for the record.
            The stored maps are always rows = y.
        scores: "logits", pooled and then put through a softmax, or "probabilities", pooled alone.

    Raises:
        ValueError: a parameter out of range, named with its value.
    """

    def __init__(
        self,
        top_k: int = 5,
        height: int = 15,
        width: int = 15,
        num_classes: int = 1000,
        score_dtype: str = "float16",
        imported_axis_order: str = "yx",
        scores: str = "logits",
    ) -> None:
        for name, value, greatest in (
            ("top_k", top_k, 32),
            ("height", height, 1024),
            ("width", width, 1024),
            ("num_classes", num_classes, MAX_CLASSES),
        ):
            if not 1 <= value <= greatest:
                raise ValueError(f"label map field: {name} is {value}, must be from 1 to {greatest}")
        if score_dtype not in SCORE_DTYPES:
            raise ValueError(f"label map field: score_dtype is {score_dtype!r}, must be float16 or float32")
        if imported_axis_order not in AXIS_ORDERS:
            raise ValueError(f"label map field: imported_axis_order is {imported_axis_order!r}, must be yx or xy")
        if scores not in SCORES:
            raise ValueError(f"label map field: scores is {scores!r}, must be logits or probabilities")
        self.top_k, self.height, self.width, self.num_classes = top_k, height, width, num_classes
        self.score_dtype, self.imported_axis_order, self.scores = score_dtype, imported_axis_order, scores

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        """`(2, top_k, height, width)`: the shape of one packed label map."""
        return 2, self.top_k, self.height, self.width

    @property
    def packed_dtype(self) -> np.dtype:
        """int16 for float16 scores, int32 for float32 ones."""
        return np.dtype(SCORE_DTYPES[self.score_dtype][1])

    @property
    def nbytes(self) -> int:
        """Bytes of one packed label map in the file."""
        return int(np.prod(self.packed_shape)) * self.packed_dtype.itemsize

    @property
    def metadata_type(self) -> np.dtype:
        return np.dtype([("present", "<u1"), ("data_ptr", "<u8")])

    def to_binary(self) -> np.ndarray:
        header = np.zeros((), dtype=HEADER)
        header["magic"], header["version"] = MAGIC, VERSION
        header["top_k"], header["height"], header["width"] = self.top_k, self.height, self.width
        header["num_classes"] = self.num_classes
        header["score_bytes"] = self.packed_dtype.itemsize
        header["imported_axis_order"] = AXIS_ORDERS.index(self.imported_axis_order)
        header["scores"] = SCORES.index(self.scores)
        arguments = np.zeros(1, dtype=ARG_TYPE)[0]
        arguments[0][: HEADER.itemsize] = np.frombuffer(header.tobytes(), dtype="<u1")
        return arguments

    @staticmethod
    def from_binary(binary: np.ndarray) -> "LabelMapField":
        header = np.frombuffer(np.asarray(binary).tobytes()[: HEADER.itemsize], dtype=HEADER)[0]
        if header["magic"] != MAGIC or header["version"] != VERSION:
            raise ValueError(
                f"not a label map field this version reads (magic {header['magic']:#x}, version {header['version']}; "
                f"expected {MAGIC:#x}, {VERSION}): write the file again with write_datasets.py"
            )
        known = header["imported_axis_order"] < len(AXIS_ORDERS) and header["scores"] < len(SCORES)
        if header["score_bytes"] not in (2, 4) or not known:
            raise ValueError("label map field: the header is damaged: write the file again with write_datasets.py")
        return LabelMapField(
            top_k=int(header["top_k"]),
            height=int(header["height"]),
            width=int(header["width"]),
            num_classes=int(header["num_classes"]),
            score_dtype={2: "float16", 4: "float32"}[int(header["score_bytes"])],
            imported_axis_order=AXIS_ORDERS[header["imported_axis_order"]],
            scores=SCORES[header["scores"]],
        )

    def encode(self, destination: np.ndarray, packed: np.ndarray | None, malloc: Callable) -> None:
        """Write one packed label map (see the module docstring), or None for a sample that has none."""
        if packed is None:
            destination["present"], destination["data_ptr"] = 0, 0
            return
        if packed.shape != self.packed_shape or packed.dtype != self.packed_dtype:
            raise ValueError(
                f"packed label map is {packed.dtype}{list(packed.shape)}, "
                f"the field holds {self.packed_dtype}{list(self.packed_shape)}"
            )
        destination["present"] = 1
        destination["data_ptr"], storage = malloc(self.nbytes)
        storage[:] = np.ascontiguousarray(packed).reshape(-1).view("<u1")

    def get_decoder_class(self) -> type[Operation]:
        return LabelMapDecoder


class LabelMapDecoder(Operation):
    """Outputs packed label maps: int16 (or int32) `[B, 2, top_k, height, width]`, as in the module docstring."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = self.field.packed_shape, self.field.packed_dtype
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        read = self.memory_read
        nbytes = self.field.nbytes
        iterate = Compiler.get_iterator()

        def decode(indices, destination, metadata, storage_state):
            for i in iterate(len(indices)):
                field = metadata[indices[i]]
                present = False
                if field["present"] == 1:
                    source = read(field["data_ptr"], storage_state)
                    present = source.size == nbytes
                    if present:
                        ctypes_memcopy(source.ctypes.data, destination[i].ctypes.data, nbytes)
                if not present:
                    destination[i] = EMPTY
                    destination[i, 1, 0, 0, 0] = NO_LABEL_MAP
            return destination[: len(indices)]

        decode.is_parallel = True
        return decode


def pack_label_map(scores: np.ndarray, classes: np.ndarray, score_dtype: str) -> np.ndarray:
    """One label map in the stored layout.

    Args:
        scores: float32 `[top_k, height, width]`, rows = y.
        classes: integers `[top_k, height, width]`; -1 for an empty entry.
        score_dtype: "float16" or "float32".

    Returns:
        int16 or int32 `[2, top_k, height, width]`.
    """
    floats, integers = SCORE_DTYPES[score_dtype]
    return np.stack([scores.astype(floats).view(integers), classes.astype(integers)])


def unpack_label_map(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(scores, classes)`, float32 and int64, of packed label maps `[..., 2, top_k, height, width]`."""
    floats = np.float16 if packed.dtype == np.int16 else np.float32
    scores, classes = np.moveaxis(packed, -4, 0)
    return np.ascontiguousarray(scores).view(floats).astype(np.float32), classes.astype(np.int64)
