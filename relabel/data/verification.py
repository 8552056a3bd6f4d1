"""Is a `.beton` what was written? Every sample against the checksum that travels with it."""

import zlib

import numpy as np

from ..errors import BadInput, listed
from ..processes import hide_progress
from ..progress import Progress
from .beton import column, read_header
from .contents import fields_checksum, read_contents, read_sample_list
from .dataset import files_of, open_dataset
from .writer import checksum_of


def verify(name: str) -> int:
    """Read a file, or each of several (see `files_of`), once; returns the number of samples.

    Raises:
        BadInput: samples are damaged, which are named, or the table of labels is, or a file has no checksums. Several
            files are also refused where they are not all the shards of one packing.
    """
    files = files_of(name)
    if len(files) > 1:
        open_dataset(name)
    return sum(map(_verify, files))


def _verify(path: str) -> int:
    header = read_header(path)
    contents, samples = read_contents(header), read_sample_list(header)
    if contents is None or samples is None:
        raise BadInput(f"{path}: has no checksums; write it with write_datasets.py")
    if zlib.crc32(np.ascontiguousarray(header.metadata).view(np.uint8).data) != samples.metadata_crc:
        raise BadInput(f"{path}: its table of labels is damaged; copy or write it again")
    if fields_checksum(header.field_descriptors) != samples.fields_crc:
        raise BadInput(f"{path}: the description of its fields is damaged; copy or write it again")
    data = np.memmap(path, np.uint8, "r")
    sizes = dict(zip(header.alloc_table["ptr"].tolist(), header.alloc_table["size"].tolist(), strict=True))
    stored = []
    for name in header.field_names:
        field = column(header, name)
        if field.dtype.names and "data_ptr" in field.dtype.names:
            pointers = field["data_ptr"].astype(np.int64)
            stored.append(np.where(field["present"] == 1, pointers, -1) if "present" in field.dtype.names else pointers)
    bad = []
    with Progress(f"verify {path}", header.num_samples, "samples", hidden=bool(hide_progress())) as progress:
        for i in range(header.num_samples):
            pieces = [int(pointers[i]) for pointers in stored if pointers[i] >= 0]
            if checksum_of(data[start : start + sizes[start]] for start in pieces) != samples.checksums[i]:
                bad.append(samples.names[i])
            progress.update(1)
    if bad:
        said = f"{len(bad):,} of {header.num_samples:,} samples are damaged; copy or write it again"
        raise BadInput(f"{path}: {said}:{listed(bad, 20)}")
    return int(header.num_samples)
