"""The tensor in a file of torch.save: by torch's restricted unpickler or, where that has read its like, directly.

The files of a label set differ in their numbers alone. What torch's loader takes 300 to 500 microseconds for, with a
program for its unpickler, is then known: a file whose bytes are the same as a known one's, but for the numbers (and the
storage's arbitrary name), holds a tensor of the same type and shape at the same place. Nothing else is read that way.
"""

import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from typing import Any

import torch

from ..errors import BadSample

GREATEST_FILE = 64 << 20  # bytes; the official files have 9.4 KB
PLAIN = (torch.float32, torch.float16)
KNOWN_AT_MOST = 256  # kinds of files
HEADER = 8 << 10  # bytes in which the header of a file of torch before 1.6 ends
OLD_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."  # its magic number and protocol version
OLD_KEYS = re.compile(rb"\x80\x02\]q\x00(X.\0\0\0\d{1,20})q\x01a\.", re.DOTALL)  # the list of its one storage's name
END, ENTRY = struct.Struct("<4s4H2IH"), struct.Struct("<4s6H3I5H2I")  # of a zip: end record, directory entry
IRRELEVANT = "/.data/serialization_id"  # a hash

_known: dict[Any, tuple[torch.dtype, tuple[int, ...]]] = {}


def tensor_of(data: bytes, where: Any) -> torch.Tensor:
    """The tensor in a file of torch.save.

    Args:
        data: the whole file.
        where: it comes from, for messages.

    Raises:
        BadSample: the file is too large, truncated, no tensor, or a pickle that would execute code.
    """
    like, start, size = _old_parts(data) if data.startswith(OLD_START) else _zip_parts(data)
    if like is not None and like in _known:
        dtype, shape = _known[like]
        if size == math.prod(shape) * dtype.itemsize:
            return torch.frombuffer(bytearray(data[start : start + size]), dtype=dtype).reshape(shape)
    tensor = _loaded(data, where)
    plain = tensor.dtype in PLAIN and tensor.is_contiguous() and tensor.numel() > 0 and not tensor.requires_grad
    if like is not None and plain and len(_known) < KNOWN_AT_MOST and data[start : start + size] == _bytes(tensor):
        _known[like] = tensor.dtype, tuple(tensor.shape)
    return tensor


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _old_parts(data: bytes) -> tuple[Any, int, int]:
    """Of a file of torch before 1.6: what it has in common with its like, and where its numbers begin, and how many
    bytes they are; None first: it is of another form."""
    keys = OLD_KEYS.search(data, 0, HEADER)
    if keys is None or data.count(keys[1], 0, keys.end()) != 2:
        return None, 0, 0
    start = keys.end() + 8  # behind the count of the storage's numbers, which is of the file's like
    like = data[: keys.end()].replace(keys[1], b"") + data[keys.end() : start]
    return like, start, len(data) - start


def _zip_parts(data: bytes) -> tuple[Any, int, int]:
    """The same of a file of torch since 1.6: a zip, uncompressed, of one storage, a pickle and a few short files."""
    nothing = None, 0, 0
    if len(data) < END.size or not data.startswith(b"PK\3\4"):
        return nothing
    magic, _, _, _, count, size, at, comment = END.unpack_from(data, len(data) - END.size)
    if magic != b"PK\5\6" or comment or at + size > len(data) - END.size or count > 16:
        return nothing
    like, start, length, prefix = [], 0, 0, None
    for _ in range(count):
        entry = ENTRY.unpack_from(data, at) if at + ENTRY.size <= len(data) else (b"",)
        if entry[0] != b"PK\1\2":
            return nothing
        method, crc, packed, unpacked, name_size, extra_size, comment_size = *entry[4:5], *entry[7:13]
        name = data[at + ENTRY.size : at + ENTRY.size + name_size].decode("utf-8", "replace")
        local, at = entry[16], at + ENTRY.size + name_size + extra_size + comment_size
        folder, slash, rest = name.partition("/")
        prefix = folder if prefix is None else prefix
        if method or packed != unpacked or folder != prefix or not slash or local + 30 > len(data):
            return nothing
        first = local + 30 + sum(struct.unpack_from("<2H", data, local + 26))
        content = data[first : first + unpacked]
        if data[local : local + 4] != b"PK\3\4" or len(content) < unpacked or zlib.crc32(content) != crc:
            return nothing
        if rest == "data/0":
            start, length = first, unpacked
        elif slash + rest != IRRELEVANT:
            like.append((rest, content))
    return (tuple(like), start, length) if start else nothing


def _loaded(data: bytes, where: Any) -> torch.Tensor:
    """The tensor by torch's restricted unpickler, which executes nothing."""
    size, file = len(data), io.BytesIO(data)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
        if size > GREATEST_FILE:
            raise BadSample(where, f"has {size:,} bytes, more than any label map ({GREATEST_FILE:,})")
        file.seek(0)
        tensor = torch.load(file, map_location="cpu", weights_only=True)
    except BadSample:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise BadSample(where, f"refused: a pickle that calls {asked[1]}; nothing in it was executed") from None
        raise BadSample(where, "is not a readable label map (damaged, or not written by torch.save)") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            MemoryError, AssertionError, zipfile.BadZipFile) as error:  # fmt: skip
        what = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise BadSample(where, f"cannot be read ({what}); is it truncated?") from None
    if isinstance(tensor, torch.Tensor) and tensor.numel() * 4 > GREATEST_FILE:
        raise BadSample(where, f"holds {list(tensor.shape)} numbers, more than any label map")
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
        raise BadSample(where, f"holds a {type(tensor).__name__}, not a tensor [2, top_k, height, width]")
    return tensor
