"""A `.beton`, or all shards of one, as one set of samples.

Several files are one data set if they are the parts of one packing (`cfg.shard`), each there once. Their samples follow
one another as they do in the single file, and so have the same numbers: the same order and the same crops come of them.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ffcv_fields  # noqa: F401 - before FFCV
import numpy as np
from ffcv.reader import Reader

from ..errors import BadInput
from .beton import read_header
from .contents import Contents, Part, SampleList, fields_checksum, read_contents, read_sample_list

LEAST_PAGE = 1 << 21  # bytes, FFCV's; a multiple of the system's pages


@dataclass(frozen=True)
class Dataset:
    """One or more `.beton` files, as FFCV's `Reader` shows one; addresses are bytes in all files, one behind another.

    `name` is what was given for them; `headers` are the files' own, checked, in the order of their parts, and `starts`
    int64 the address of each one's first byte, a multiple of `page_size`, `lengths` their bytes. `metadata` has an
    entry for a sample, with addresses for pointers; `addresses`, sorted, and `sizes`, uint64, say what lies where.
    `contents` is the first file's (None where stock FFCV wrote it), of which all but `part.number` is that of all.
    """

    name: str
    headers: tuple[Reader, ...]
    starts: np.ndarray
    lengths: tuple[int, ...]
    metadata: np.ndarray
    addresses: np.ndarray
    sizes: np.ndarray
    contents: Contents | None

    @property
    def num_samples(self) -> int:
        return len(self.metadata)

    @property
    def page_size(self) -> int:
        return int(self.headers[0].page_size)

    @property
    def field_names(self) -> list[str]:
        return self.headers[0].field_names

    @property
    def handlers(self) -> dict[str, Any]:
        return self.headers[0].handlers

    def column(self, name: str) -> np.ndarray:
        """A field's metadata, one entry a sample."""
        return self.metadata[f"f{self.field_names.index(name)}"]

    def sample_list(self) -> SampleList | None:
        """The names of all samples, in order, and of those left out; None where stock FFCV wrote the file."""
        lists = [read_sample_list(header) for header in self.headers]
        found = [listed for listed in lists if listed is not None]
        if len(found) < len(lists):
            return None
        names, left_out = (tuple(n for listed in found for n in getattr(listed, k)) for k in ("names", "left_out"))
        checksums = np.concatenate([listed.checksums for listed in found])
        return SampleList(names, checksums, found[0].metadata_crc, found[0].fields_crc, left_out)


def files_of(name: str) -> list[str]:
    """The files that a setting names: a path, a pattern as `train-*.beton`, or several of these with commas between.

    Raises:
        BadInput: a pattern that no file fits.
    """
    if os.path.exists(name):
        return [name]
    if "," in name:
        return [file for part in name.split(",") if part.strip() for file in files_of(part.strip())]
    if not glob.has_magic(name):
        return [name]
    found = sorted(glob.glob(name))
    if not found:
        raise BadInput(f"{name}: no file fits this pattern")
    return found


def is_one_file(name: str) -> bool:
    """Whether a setting names a single file, which may not exist yet; else several, by a pattern or a list."""
    return os.path.exists(name) or not ("," in name or glob.has_magic(name))


def open_dataset(name: str) -> Dataset:
    """The data set of the files that `name` stands for (see `files_of`).

    Raises:
        BadInput: a file that `read_header` refuses; a shard that is missing or there twice; several files that are not
            the shards of one packing.
    """
    headers = [read_header(file) for file in files_of(name)]
    found = [read_contents(header) for header in headers]
    if len(headers) > 1 or any(contents and contents.part and contents.part.count > 1 for contents in found):
        headers, first = _in_order(name, headers, found)
        contents: Contents | None = first
    else:
        contents = found[0]
    page = max(int(headers[0].page_size), LEAST_PAGE)
    lengths = tuple(os.stat(header.file_name).st_size for header in headers)
    starts = np.cumsum([0, *(-(-length // page) * page for length in lengths[:-1])])
    metadata = headers[0].metadata if len(headers) == 1 else _joined(headers, starts)
    tables = [_sorted(header.alloc_table) for header in headers]
    addresses = np.concatenate([table["ptr"] + np.uint64(start) for table, start in zip(tables, starts, strict=True)])
    sizes = np.concatenate([table["size"] for table in tables])
    return Dataset(name, tuple(headers), starts, lengths, metadata, addresses, sizes, contents)


def _sorted(table: np.ndarray) -> np.ndarray:
    return table[np.argsort(table["ptr"], kind="stable")]


def _joined(headers: Sequence[Reader], starts: np.ndarray) -> np.ndarray:
    """The files' metadata, one behind another, with addresses for pointers."""
    itemsize = headers[0].metadata.dtype.itemsize
    rows = np.concatenate([np.ascontiguousarray(header.metadata).view(f"V{itemsize}") for header in headers])
    metadata = rows.view(headers[0].metadata.dtype)
    ends = np.cumsum([len(header.metadata) for header in headers])
    for name in metadata.dtype.names:
        column = metadata[name]
        if column.dtype.names and "data_ptr" in column.dtype.names:
            for header, end, start in zip(headers, ends, starts, strict=True):
                pointers = column["data_ptr"][end - len(header.metadata) : end]
                pointers[pointers > 0] += np.uint64(start)  # 0: there is none
    metadata.setflags(write=False)
    return metadata


def _in_order(name: str, headers: Sequence[Reader], found: Sequence[Contents | None]) -> tuple[list[Reader], Contents]:
    """The shards in the order of their numbers, and what they say of themselves, checked to be one whole packing."""
    parts: dict[int, tuple[Reader, Contents, Part]] = {}
    for header, contents in zip(headers, found, strict=True):
        part = contents.part if contents else None
        path = header.file_name
        if contents is None or part is None or part.count == 1:
            raise BadInput(
                f"{path}: is no shard; several files are one data set as the shards of one packing (cfg.shard)"
            )
        other, theirs, first = next(iter(parts.values()), (header, contents, part))
        if (part.count, part.packing) != (first.count, first.packing):
            raise BadInput(f"{path}: is of another packing than {other.file_name}: {_difference(contents, theirs)}")
        forms = {(fields_checksum(h.field_descriptors), int(h.page_size), h.metadata.dtype) for h in (header, other)}
        if len(forms) > 1:
            raise BadInput(f"{path}: has other fields than {other.file_name}; write it again")
        if part.number in parts:
            raise BadInput(
                f"{name}: shard {part.number} of {part.count} is there twice, {parts[part.number][0].file_name} and "
                f"{path}; leave one of them out"
            )
        parts[part.number] = header, contents, part
    count = first.count
    missing = [str(number) for number in range(1, count + 1) if number not in parts]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise BadInput(
            f"{name}: of {count} shards, {'one is' if len(missing) == 1 else 'some are'} missing: "
            f"{', '.join(missing[:10])}{more}; write them with write_datasets.py --cfg.shard={missing[0]}/{count}, and "
            "name all of them, as by a pattern"
        )
    return [parts[number][0] for number in sorted(parts)], parts[1][1]


def _difference(ours: Contents, theirs: Contents) -> str:
    """What two shards that are of different packings differ in, in words."""
    a, b = ours.part, theirs.part
    assert a is not None and b is not None
    if a.count != b.count:
        return f"one of {a.count} shards, not of {b.count}"
    if ours.classes != theirs.classes:
        return "its classes are others"
    was, other = (contents.provenance.get("settings", {}) for contents in (ours, theirs))
    changed = [f"cfg.{k} is {v!r}, not {other.get(k)!r}" for k, v in was.items() if k != "shard" and v != other.get(k)]
    if changed:
        return "; ".join(changed)
    if a.samples != b.samples:
        return "its images have other names or labels"
    return "its images or label maps have other contents, or another form"
