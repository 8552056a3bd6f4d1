"""What a `.beton` knows of itself: its classes, where it was packed from, and each sample's name and checksum.

FFCV's format has no place for them, but its readers follow pointers: two blocks of compressed JSON lie between the
pages and the allocation table, and the arguments of the label field (which FFCV leaves empty) say where. Stock FFCV
reads such a file as any other. A class is known by its name, and its index is its place in this list; a sample is
known by its path below the folder that was packed.
"""

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import ffcv_fields  # noqa: F401 - before FFCV
import numpy as np
from ffcv.reader import Reader
from ffcv.types import FieldDescType, HeaderType

from ..errors import BadInput

MAGIC = 0x49424C52  # "RLBI", little-endian
VERSION = 1
GREATEST, GREATEST_SAMPLE = 64 << 20, 8 << 10  # bytes of an unpacked block: a name has up to 4,096
POINTERS = np.dtype([("magic", "<u4"), ("version", "<u4"), ("start", "<u8", 2), ("size", "<u8", 2), ("crc", "<u4", 2)])


@dataclass(frozen=True)
class Part:
    """Which part of a packing a file holds: number `number` of `count`, from 1; a whole file is 1 of 1.

    `samples` is a digest of all samples' names and labels, in the order of the whole; `packing` of that, and of the
    settings, the fields and the data that all parts have in common.
    """

    number: int
    count: int
    samples: str
    packing: str


@dataclass(frozen=True)
class Contents:
    """The classes, by index, where the file was packed from, and which part of that it is (None: of an older file)."""

    classes: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    part: Part | None = None


@dataclass(frozen=True)
class SampleList:
    """Of each sample, in the file's order: its path below the packed folder, and the CRC-32 of what is stored of it.

    `metadata_crc` is that of the whole metadata table, which holds the labels and the pointers; `fields_crc` that of
    the fields' descriptions. `left_out` are the names of samples that the packed folder holds and the file does not.
    """

    names: tuple[str, ...]
    checksums: np.ndarray
    metadata_crc: int
    fields_crc: int
    left_out: tuple[str, ...] = ()


def write_contents(file: BinaryIO, label_field: int, contents: Contents, samples: SampleList) -> None:
    """Append both blocks to a `.beton` that is being written, and let the label field's arguments point to them.

    Args:
        file: at the end of its pages; it stands behind the blocks afterwards.
        label_field: the number of the label field.
    """
    pointers = np.zeros((), POINTERS)
    pointers["magic"], pointers["version"] = MAGIC, VERSION
    listed = {"names": samples.names, "checksums": samples.checksums.tolist(), "metadata_crc": samples.metadata_crc}
    listed |= {"fields_crc": samples.fields_crc, "left_out": samples.left_out}
    for i, value in enumerate((asdict(contents), listed)):
        block = zlib.compress(json.dumps(value).encode(), 6)
        pointers["start"][i], pointers["size"][i], pointers["crc"][i] = file.tell(), len(block), zlib.crc32(block)
        file.write(block)
    end = file.tell()
    file.seek(HeaderType.itemsize + label_field * FieldDescType.itemsize + FieldDescType.fields["arguments"][1])
    file.write(pointers.tobytes())
    file.seek(end)


def read_contents(header: Reader) -> Contents | None:
    """The classes and the provenance of a checked `.beton`; None where stock FFCV wrote it.

    Raises:
        BadInput: the block is damaged.
    """
    value = _read_block(header, 0)
    if value is None:
        return None
    if not _are_texts(value.get("classes")) or not isinstance(value.get("provenance"), dict):
        raise BadInput(f"{header.file_name}: its list of classes is damaged; write it again")
    return Contents(tuple(value["classes"]), value["provenance"], _part(header, value.get("part")))


def _part(header: Reader, value: Any) -> Part | None:
    if value is None:
        return None
    try:
        part = Part(**value)
        good = all(type(n) is int for n in (part.number, part.count)) and 1 <= part.number <= part.count
    except TypeError:
        good = False
    if not good:
        raise BadInput(f"{header.file_name}: which part of a packing it is, is damaged; write it again")
    return part


def read_sample_list(header: Reader) -> SampleList | None:
    """The samples' names and checksums; None where stock FFCV wrote the file.

    Raises:
        BadInput: the block is damaged.
    """
    value = _read_block(header, 1)
    if value is None:
        return None
    names = value.get("names")
    try:
        checksums = np.array(value.get("checksums"), np.uint32)
    except (TypeError, ValueError, OverflowError):
        checksums = np.empty(0, np.uint32)
    left_out = value.get("left_out", [])
    if not _are_texts(names) or not _are_texts(left_out) or not len(names) == checksums.size == header.num_samples:
        raise BadInput(f"{header.file_name}: its list of samples is damaged; copy or write it again")
    metadata_crc, fields_crc = int(value.get("metadata_crc", 0)), int(value.get("fields_crc", 0))
    return SampleList(tuple(names), checksums, metadata_crc, fields_crc, tuple(left_out))


def fields_checksum(descriptors: np.ndarray) -> int:
    """CRC-32 of the fields' descriptions, but for the pointers that stand in the label field's."""
    copy = descriptors.copy()
    for descriptor in copy:
        if bytes(descriptor["name"]).startswith(b"label\0"):
            descriptor["arguments"][: POINTERS.itemsize] = 0
    return zlib.crc32(copy.tobytes())


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _read_block(header: Reader, which: int) -> Any:
    arguments = header.field_descriptors["arguments"][header.field_names.index("label")]
    pointers = np.frombuffer(arguments.tobytes()[: POINTERS.itemsize], POINTERS)[0]
    if pointers["magic"] != MAGIC:
        return None
    path = header.file_name
    if pointers["version"] != VERSION:
        raise BadInput(f"{path}: its list of samples has version {pointers['version']}, not {VERSION}; write it again")
    start, size, end = int(pointers["start"][which]), int(pointers["size"][which]), os.stat(path).st_size
    try:
        if start + size > end:
            raise ValueError("it points beyond the file")
        with open(path, "rb") as file:
            file.seek(start)
            block = file.read(size)
        if zlib.crc32(block) != pointers["crc"][which]:
            raise ValueError("wrong checksum")
        unpacked = zlib.decompressobj().decompress(block, GREATEST + GREATEST_SAMPLE * int(header.num_samples))
        value = json.loads(unpacked)
        if not isinstance(value, dict):
            raise ValueError("no dictionary")
        return value
    except (ValueError, zlib.error) as error:
        raise BadInput(f"{path}: its list of classes or samples is damaged ({error}); copy or write it again") from None
