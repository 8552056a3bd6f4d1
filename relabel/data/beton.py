"""Opening a `.beton` that may come from anywhere: FFCV checks little, and reads wherever the file says.

Everything that a decoder relies on is checked once: what follows reads only inside the file and writes only inside its
buffers.
"""

from pathlib import Path

import numpy as np
from ffcv_fields import LabelMapField
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType

from ..errors import BadInput

CUSTOM_FIELDS = {"label_map": LabelMapField}
FIELDS = {"image": RGBImageField, "label": IntField, "label_map": None}  # by what FFCV reads them; None: a custom field
GREATEST_SIDE = 65535  # pixels, a JPEG's limit
GREATEST_PIXELS = 178_956_970  # above, Pillow takes an image for a bomb: no converter has written it


def read_header(path: str) -> Reader:
    """The checked header of a `.beton`: `num_samples`, `field_names`, `handlers`, `metadata`, `alloc_table`.

    Raises:
        BadInput: the file is missing, no `.beton`, truncated, or says what cannot be; it is named.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; write it with write_datasets.py")
    names = _check_header(path)
    try:
        reader = Reader(path, {name: field for name, field in CUSTOM_FIELDS.items() if name in names})
    except (IndexError, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise _damaged(path, error) from None
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    if len(reader.metadata) != reader.num_samples:
        raise _damaged(path, "it ends before its samples do")
    starts, sizes = _check_allocations(path, reader)
    for name, handler in reader.handlers.items():
        _check_field(path, reader, name, handler, starts, sizes)
    return reader


def labels_of(path: str) -> np.ndarray:
    """The single labels of a `.beton`, int64 `[num_samples]`; raises as `read_header`."""
    return column(read_header(path), "label").copy()


def column(header: Reader, name: str) -> np.ndarray:
    """A field's metadata, one entry a sample."""
    return header.metadata[f"f{header.field_names.index(name)}"]


def _damaged(path, what):
    return BadInput(f"{path}: truncated or damaged ({what}); write it again with write_datasets.py")


def _check_header(path):
    """Before FFCV reads anything by it. Returns the fields' names."""
    header, size = np.fromfile(path, HeaderType, count=1), Path(path).stat().st_size
    if len(header) == 0 or header["version"][0] != CURRENT_VERSION or not 2 <= header["num_fields"][0] <= len(FIELDS):
        raise BadInput(f"{path}: not a .beton file of version {CURRENT_VERSION}; write it with write_datasets.py")
    header = header[0]
    count, page = int(header["num_samples"]), int(header["page_size"])
    if count < 1 or page < 1 or page & (page - 1):
        raise _damaged(path, f"{count} samples, pages of {page} bytes")
    fields = np.fromfile(path, FieldDescType, count=int(header["num_fields"]), offset=HeaderType.itemsize)
    names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]
    if len(names) != header["num_fields"] or len(set(names)) != len(names) or "label" not in names:
        raise _damaged(path, f"its fields are {', '.join(names)}")
    for name, type_id in zip(names, fields["type_id"], strict=True):
        if name not in FIELDS or TYPE_ID_HANDLER.get(int(type_id), "unknown") is not FIELDS[name]:
            raise BadInput(
                f"{path}: its field {name!r} of type {type_id} is none that is read here ({', '.join(FIELDS)})"
            )
    table = int(header["alloc_table_ptr"])
    if count > size or table > size or (size - table) % ALLOC_TABLE_TYPE.itemsize:
        raise _damaged(path, f"its allocation table is at byte {table:,} of {size:,}")
    return names


def _check_allocations(path, reader):
    """Each piece of data has its own place, in one page, before the allocation table. Returns sorted starts, sizes."""
    table = reader.alloc_table
    starts, sizes, page = table["ptr"], table["size"], int(reader.page_size)
    end = np.uint64(int(reader.header["alloc_table_ptr"]))
    order = np.argsort(starts, kind="stable")  # write_datasets.py leaves them in order, which makes this cheap
    starts, sizes = starts[order], sizes[order]
    good = (sizes >= 1) & (sizes <= page) & (starts <= end)
    # Sums of what is not yet known to be small could wrap around: only now are they safe.
    stops = np.where(good, starts + np.where(good, sizes, 0), 0)
    good &= (stops <= end) & (starts // page == (stops - np.uint64(1)) // page)
    first = HeaderType.itemsize + reader.field_descriptors.nbytes + reader.metadata.nbytes
    good &= starts >= first
    if not good.all() or (stops[:-1] > starts[1:]).any():
        raise _damaged(path, "its allocation table does not fit the file")
    return starts, sizes


def _check_field(path, reader, name, handler, starts, sizes):
    """Every image and label map must be in the allocation table, with the bytes that it must have."""
    field = column(reader, name)
    if isinstance(handler, LabelMapField):
        if handler.nbytes > reader.page_size or (field["present"] > 1).any():
            raise _damaged(
                path, f"label maps of {handler.nbytes:,} bytes, of which present is {field['present'].max()}"
            )
        field = field[field["present"] == 1]
        exact = np.full(len(field), handler.nbytes, np.uint64)
    elif isinstance(handler, RGBImageField):
        height, width = field["height"].astype(np.int64), field["width"].astype(np.int64)
        good = (np.minimum(height, width) >= 1) & (np.maximum(height, width) <= GREATEST_SIDE)
        good &= height * width <= GREATEST_PIXELS
        if not (good & np.isin(field["mode"], list(IMAGE_MODES.values()))).all():
            raise _damaged(path, "the size or the kind of an image cannot be")
        exact = np.where(field["mode"] == IMAGE_MODES["raw"], height * width * 3, 0).astype(np.uint64)  # 0: any
    else:
        return
    if len(field) == 0:
        return
    at = np.minimum(np.searchsorted(starts, field["data_ptr"]), max(len(starts) - 1, 0))
    good = len(starts) > 0 and (starts[at] == field["data_ptr"]) & ((exact == 0) | (sizes[at] == exact))
    if not np.all(good):
        raise _damaged(path, f"the data of field {name!r} is not where the file says")
