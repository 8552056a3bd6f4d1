"""Tar archives, read in place: the headers are scanned once, and members are read by their offset.

Python's `tarfile` keeps an object of 1.5 KB for each member, and cannot hand a member out as a place in the file; it
also takes an archive that was cut off between two members for a whole one. Here that is an error.

Formats: POSIX ustar with pax headers, and GNU's (long names, sizes of more than 8 GB), as IEEE Std 1003.1 (pax) and
GNU tar's manual describe them.
"""

import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadSample

BLOCK = 512  # bytes: headers and members begin at multiples of it
GREATEST_NAME = 1 << 20  # bytes of a member that holds the next one's name
READ_AT_ONCE = 1 << 20
AT_A_TIME = 10_000  # members, between two reports
AT_ONCE = 16  # archives scanned at a time: the scan waits for the disk, not for the processor
FILES, SKIPPED, LINKS = (b"0", b"\0", b"7"), (b"3", b"4", b"6", b"K", b"g", b"V"), (b"1", b"2")
PACKED = {  # by a file's first bytes
    b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz"),
    b"(\xb5/\xfd": ("zstd", "unzstd"), b"PK\3\4": ("zip", "unzip"),
}  # fmt: skip
AGAIN = "the download or copy is not complete; get it again"


@dataclass
class TarIndex:
    """The regular files of an archive, in its order: names, and where each begins and how long it is, in bytes.

    `folders` are the folders that it names.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    folders: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def member(self, row: int) -> str:
        """A file, for messages."""
        return f"{self.path}: member {self.names[row]}"


Seen = Callable[[int], Any]  # is told how many more members were found


def index_all(paths: list[Path], seen: Seen = lambda count: None) -> list[TarIndex]:
    """The indices of several archives. Raises as `index_tar`."""
    if len(paths) == 1:
        return [index_tar(paths[0], seen)]
    with ThreadPoolExecutor(min(AT_ONCE, len(paths))) as pool:
        found = []
        for index in pool.map(index_tar, paths):
            found.append(index)
            seen(len(index))
        return found


def index_tar(path: Path, seen: Seen = lambda count: None) -> TarIndex:
    """The index of an archive, or of the archives that it consists of where all its members are tars themselves.

    Of such an archive, a file's name is `MEMBER.tar/NAME`.

    Raises:
        BadSample: it is compressed, no tar, cut off or damaged; or a member is a link or lies outside; it is named.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadSample(path, f"cannot be read ({error.strerror})") from None
    try:
        index, end = TarIndex(path), os.fstat(file).st_size
        _refuse_packed(path, os.pread(file, 8, 0))
        for number, (name, offset, size) in enumerate(_members(file, 0, end, str(path)), 1):
            _add(index, name, offset, size)
            if number % AT_A_TIME == 0:
                seen(AT_A_TIME)
        inner = [name.lower().endswith(".tar") for name in index.names]
        if not any(inner):
            return index
        if not all(inner):
            odd = index.member(inner.index(False))
            raise BadSample(odd, "stands beside tars: give an archive of class tars only, or of images only")
        return _nested(file, index, seen)
    finally:
        os.close(file)


def _nested(file: int, outer: TarIndex, seen: Seen) -> TarIndex:
    """The index of all tars in a tar."""
    index = TarIndex(outer.path)

    def scan(row: int) -> list[tuple[str, int, int]]:
        start, end = outer.offsets[row], outer.offsets[row] + outer.sizes[row]
        return list(_members(file, start, end, outer.member(row)))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, members in zip(outer.names, pool.map(scan, range(len(outer))), strict=True):
            for inner, offset, size in members:
                _add(index, f"{name}/{inner}", offset, size)
            index.folders.append(name)
            seen(len(members))
    return index


def _add(index: TarIndex, name: str, offset: int, size: int) -> None:
    if size < 0:
        index.folders.append(name)
        return
    index.names.append(name)
    index.offsets.append(offset)
    index.sizes.append(size)


def _refuse_packed(path: Path, start: bytes) -> None:
    for magic, (kind, command) in PACKED.items():
        if start.startswith(magic):
            raise BadSample(path, f"is compressed ({kind}), so that nothing in it can be found; first: {command} it")


def _members(file: int, start: int, end: int, where: str) -> Iterator[tuple[str, int, int]]:
    """`(name, offset, size)` of the files (folders: size -1) of the tar in an open file's bytes `start` to `end`."""
    at, name, size = start, "", -1  # name and size from the headers before, for the next member
    while True:
        header = os.pread(file, BLOCK, at) if at + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise BadSample(where, f"is cut off at byte {at - start:,}, before its end mark; {AGAIN}")
        if header.count(0) == BLOCK:
            return _check_end(file, at, end, where)
        _check_sum(header, at - start, where)
        kind, own, length = header[156:157], name or _name(header), _number(header[124:136], at - start, where)
        length = size if size >= 0 else length
        if kind in (*LINKS, b"3", b"4", b"5", b"6"):
            length = 0  # whatever is said: nothing follows
        at += BLOCK
        if at + length > end:
            raise BadSample(f"{where}: member {own}", f"is cut off, {at + length - end:,} bytes are missing; {AGAIN}")
        if kind in (b"L", b"x"):
            if length > GREATEST_NAME:
                raise BadSample(
                    where, f"has a header of {length:,} bytes at byte {at - start:,}: damaged; get it again"
                )
            name, size = _long(os.pread(file, length, at), kind, name, size, f"{where}: member {own}")
        elif kind in FILES or kind == b"5":
            folder = kind == b"5" or own.endswith("/")
            yield _clean(own, where), at, -1 if folder else length
            name, size = "", -1
        elif kind in LINKS:
            raise BadSample(f"{where}: member {own}", "is a link; pack what it points to (tar --dereference)")
        elif kind in SKIPPED:
            name, size = ("", -1) if kind not in (b"K", b"g") else (name, size)
        else:
            raise BadSample(f"{where}: member {own}", f"is of a kind {kind!r} that is not read; pack it again by tar")
        at += -(-length // BLOCK) * BLOCK


def _check_end(file: int, at: int, end: int, where: str) -> None:
    """Behind the end mark are zeros only: what else there is would be lost."""
    while at < end:
        block = os.pread(file, min(READ_AT_ONCE, end - at), at)
        if not block or block.count(0) < len(block):
            raise BadSample(
                where, f"goes on behind its end mark at byte {at:,}: archives joined by cat? Give each alone"
            )
        at += len(block)


def _check_sum(header: bytes, at: int, where: str) -> None:
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        said = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        said = -1
    if said == unsigned:
        return
    if said == unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):  # of signed bytes, as of old
        return
    raise BadSample(where, "is no tar archive" if at == 0 else f"is damaged at byte {at:,}, in a header; get it again")


def _number(entry: bytes, at: int, where: str) -> int:
    if entry[0] & 0x80:  # GNU's, for what does not fit
        return int.from_bytes(entry, "big") & ((1 << 88) - 1)
    try:
        return int(entry.strip(b" \0") or b"0", 8)
    except ValueError:
        raise BadSample(where, f"is damaged at byte {at:,}, in a header; get it again") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _long(body: bytes, kind: bytes, name: str, size: int, where: str) -> tuple[str, int]:
    """The next member's name and size (as they were, where nothing is said) from a GNU or pax header."""
    if kind == b"L":
        return os.fsdecode(body.split(b"\0", 1)[0]), size
    while body.strip(b"\0"):
        count, space, _ = body.partition(b" ")
        if not space or not count.isdigit() or not len(count) < int(count) <= len(body):
            raise BadSample(where, "has a damaged pax header; get the archive again")
        key, _, value = body[len(count) + 1 : int(count) - 1].partition(b"=")
        if key == b"path":
            name = os.fsdecode(value)
        elif key == b"size" and value.isdigit():
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise BadSample(where, "is a sparse file; pack it again without --sparse")
        body = body[int(count) :]
    return name, size


def _clean(name: str, where: str) -> str:
    """Without `./`; what lies outside of the archive's folder is refused."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BadSample(f"{where}: member {name}", "lies outside of the archive; pack it again")
    return "/".join(parts)
