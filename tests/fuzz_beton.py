"""Damaged and hostile `.beton` files by the thousand: each must end in one clear error or be read correctly.

    python tests/fuzz_beton.py --count 50000

Mutates headers, field descriptors, metadata, the allocation table, JPEG and label-map data, and lengths
(structure-aware, seeded). Each file is opened as training opens it; what opens is decoded, every sample, by the very C
and numba code that the loader calls, with the source ending at a protected page and guard bytes after every
buffer. Some go through a complete loader. Runs in child processes: a crash, a hang or an overwritten guard is counted,
and the rest continues.
"""

import argparse
import ctypes
import json
import mmap
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

LOADER_EVERY = 200  # one file in so many goes through a complete loader
HANG = 60  # seconds
FENCE = 64  # guard bytes after a buffer
INTERESTING = (0, 1, 2, 3, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def mutate(data: bytearray, rng: np.random.Generator) -> str:
    """Mutate `data`, a `.beton`, in place; returns what was done."""
    import ffcv_fields  # noqa: F401 - before FFCV
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType

    header = np.frombuffer(bytes(data[: HeaderType.itemsize]), HeaderType)[0]
    fields_end = HeaderType.itemsize + int(header["num_fields"]) * FieldDescType.itemsize
    table = int(header["alloc_table_ptr"])
    entries = np.frombuffer(bytes(data[table:]), ALLOC_TABLE_TYPE)
    metadata_end = fields_end + 48 * int(header["num_samples"])
    regions = {
        "header": (0, HeaderType.itemsize),
        "field": (HeaderType.itemsize, fields_end),
        "metadata": (fields_end, metadata_end),
        "table": (table, len(data)),
        "data": (int(entries["ptr"].min()), int((entries["ptr"] + entries["size"]).max())),
    }
    done = []
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.choice(["word", "word", "bytes", "cut", "entry", "descriptor", "jpeg"])
        name = rng.choice(list(regions))
        low, high = regions[name]
        high = min(high, len(data) - 8)
        if high <= low:
            continue
        if kind == "word":  # an interesting number in a field of 1, 2, 4 or 8 bytes
            size = int(rng.choice([1, 2, 4, 8]))
            at = low + int(rng.integers(0, max(1, (high - low) // size))) * size
            value = (
                int(rng.choice([*map(float, INTERESTING)]))
                if rng.random() < 0.5
                else int(rng.integers(0, 2 * len(data)))
            )
            data[at : at + size] = (value % 256**size).to_bytes(size, "little")
        elif kind == "bytes":
            for at in rng.integers(low, high, int(rng.integers(1, 9))):
                data[at] = int(rng.integers(256))
        elif kind == "cut":
            del data[int(rng.integers(0, len(data))) :]
            done.append("cut")
            break
        elif kind == "entry" and name == "table":  # two entries of the table change a column
            entries = entries.copy()
            column = str(rng.choice(["ptr", "size", "sample_id"]))
            a, b = rng.integers(0, len(entries), 2)
            entries[column][a] = entries[column][b] + int(rng.choice([0, 0, 1]))
            data[table : table + entries.nbytes] = entries.tobytes()
        elif kind == "descriptor":
            at = HeaderType.itemsize + int(rng.integers(0, int(header["num_fields"]))) * FieldDescType.itemsize
            at += int(rng.integers(0, 60))
            data[at] = int(rng.integers(256))
        elif kind == "jpeg":  # the frame header of some JPEG: its size and components
            at = data.find(b"\xff\xc0", int(rng.integers(*regions["data"])))
            if 0 <= at < len(data) - 20:
                data[at + int(rng.integers(2, 19))] = int(rng.integers(256))
        done.append(f"{kind} in {name}")
    return ", ".join(done)


class Guarded:
    """Memory whose last byte is followed by a protected page."""

    def __init__(self, most: int) -> None:
        page = mmap.PAGESIZE
        self.room = -(-most // page) * page
        self._map = mmap.mmap(-1, self.room + page)
        self._view = (ctypes.c_char * (self.room + page)).from_buffer(self._map)
        self._base = ctypes.addressof(self._view)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if protect(self._base + self.room, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")

    def put(self, data: bytes) -> int:
        """The address of a copy of `data` that ends at the page."""
        address = self._base + self.room - len(data)
        ctypes.memmove(address, data, len(data))
        return address


def decode_all(path: str, rng: np.random.Generator, guarded: Guarded) -> None:
    """What a loader does with each sample of a file that opens: decode a random crop, copy and pool the label map."""
    import torch
    from ffcv_fields import label_pooling
    from ffcv_fields.image import REQUEST, _crop_decode_c, _decode_exact, _scratch_bytes_c

    from relabel.data.beton import read_header

    header = read_header(path)
    columns = {name: header.metadata[f"f{i}"] for i, name in enumerate(header.field_names)}
    sizes = dict(zip(header.alloc_table["ptr"].tolist(), header.alloc_table["size"].tolist(), strict=True))
    contents = Path(path).read_bytes()
    size = 32
    for index in range(len(columns["image"])):
        image = columns["image"][index]
        at, height, width = int(image["data_ptr"]), int(image["height"]), int(image["width"])
        source = guarded.put(contents[at : at + sizes[at]])
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        scratch = np.empty(_scratch_bytes_c(max(height, width), size) + FENCE, np.uint8)
        scratch[-FENCE:] = 77
        out = np.full(3 * size * size + FENCE, 77, np.uint8)
        raw = int(image["mode"] == 1)
        request = np.array(
            [source, sizes[at], raw, height, width, y, x, h, w, size, 0, *(0, 0, 0, 0), 0, out.ctypes.data,
             scratch.ctypes.data], np.int64,
        )  # fmt: skip
        _crop_decode_c(request.ctypes.data)
        if height * width < 1 << 24:
            pixels, exact = np.full(3 * height * width + FENCE, 77, np.uint8), np.empty((size, size, 3), np.uint8)
            request[REQUEST.index("scratch")] = pixels.ctypes.data
            _decode_exact(request, exact)
            assert (pixels[-FENCE:] == 77).all(), "wrote past the pixels"
        assert (scratch[-FENCE:] == 77).all() and (out[-FENCE:] == 77).all(), "wrote past a buffer"
    field = header.handlers.get("label_map")
    if field is not None:
        present = np.flatnonzero(columns["label_map"]["present"] == 1)
        maps = np.stack([
            np.frombuffer(contents, field.packed_dtype, field.nbytes // field.packed_dtype.itemsize, int(at))
            .reshape(field.packed_shape) for at in columns["label_map"]["data_ptr"][present]
        ]) if len(present) else np.zeros((0, *field.packed_shape), field.packed_dtype)  # fmt: skip
        if len(maps):
            boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9]]).repeat(len(maps), 1)
            label_pooling(torch.from_numpy(maps.copy()), boxes, 1000)


def load_all(path: str) -> None:
    """An epoch by the loader itself."""
    from ffcv_fields import CropBoxDecoder, CropSampler, LabelMapDecoder, RandomResizedCropDecoder, label_pooling
    from ffcv.fields.decoders import IntDecoder
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import ToTensor

    from relabel.data.beton import read_header
    from relabel.data.loader import Loader

    crops = CropSampler(0)
    pipelines = {"image": [RandomResizedCropDecoder(32, crops), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    if "label_map" in read_header(path).handlers:
        pipelines["label_map"] = [LabelMapDecoder(), ToTensor()]
        pipelines["crop_box"] = PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=[ToTensor()])
    loader = Loader(
        path, num_classes=1000, order="near_sequential", num_workers=1, batch_size=16, drop_last=False,
        os_cache=False, pipelines=pipelines,
    )  # fmt: skip
    for batch in loader.epoch(0):
        if batch.label_maps is not None:
            label_pooling(batch.label_maps, batch.crop_boxes, 1000, batch.labels)


def work(original: str, seed: int, first: int, count: int, progress: str) -> None:
    """Mutations `first` to `count - 1`; each one's outcome is a line of the file `progress`."""
    from relabel.errors import BadInput

    contents, guarded = Path(original).read_bytes(), Guarded(9 << 20)
    with tempfile.TemporaryDirectory() as folder, open(progress, "a", buffering=1) as out:
        path = f"{folder}/mutated.beton"
        for number in range(first, count):
            rng, data = np.random.default_rng([seed, number]), bytearray(contents)
            done = mutate(data, rng)
            Path(path).write_bytes(data)
            out.write(json.dumps({"number": number, "done": done}) + "\n")
            try:
                decode_all(path, rng, guarded)
                if number % LOADER_EVERY == 0:
                    load_all(path)
                outcome = "read"
            except (BadInput, ValueError) as error:
                outcome = "refused" if isinstance(error, BadInput) else "refused while reading"
            except BaseException as error:
                outcome = f"unexpected {type(error).__name__}: {error}"
            out.write(json.dumps({"number": number, "outcome": outcome}) + "\n")


def fuzz(original: str, seed: int, count: int) -> dict[str, list[str]]:
    """Outcomes, each with the mutations that had it: read, refused, refused while reading, crash, hang, unexpected."""
    outcomes: dict[str, list[str]] = {}
    context, first = multiprocessing.get_context("spawn"), 0
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as progress:
        while first < count:
            process = context.Process(target=work, args=(original, seed, first, count, progress.name))
            process.start()
            size, since = -1, time.monotonic()
            while process.is_alive() and time.monotonic() - since < HANG:
                process.join(0.5)
                if os.path.getsize(progress.name) != size:
                    size, since = os.path.getsize(progress.name), time.monotonic()
            hangs = process.is_alive()
            if hangs:
                process.kill()
            process.join()
            lines = [json.loads(line) for line in Path(progress.name).read_text().splitlines()]
            last = lines[-1] if lines else {"number": first, "done": "start"}
            first = last["number"] + 1
            if "outcome" not in last:
                end = "hang" if hangs else f"crash {process.exitcode}"
                with open(progress.name, "a") as out:
                    out.write(json.dumps({"number": last["number"], "outcome": end}) + "\n")
        lines = [json.loads(line) for line in Path(progress.name).read_text().splitlines()]
    done = {line["number"]: line["done"] for line in lines if "done" in line}
    for line in lines:
        if "outcome" in line:
            outcomes.setdefault(line["outcome"], []).append(f"{line['number']}: {done.get(line['number'], '')}")
    return outcomes


def write_original(folder: Path) -> str:
    """A small `.beton` with JPEG and raw images and label maps."""
    from conftest import run, write_images, write_label_maps

    files = write_images(folder / "images", 12)
    write_label_maps(folder / "maps", files)
    path = folder / "original.beton"
    result = run(
        "write_datasets.py", f"--cfg.data_dir={folder}/images", f"--cfg.label_map_dir={folder}/maps",
        f"--cfg.write_path={path}", "--cfg.axis_order=yx", "--cfg.write_mode=proportion", "--cfg.num_workers=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return str(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        found = fuzz(write_original(Path(folder)), arguments.seed, arguments.count)
    for outcome, mutations in sorted(found.items()):
        print(
            f"{len(mutations):,} {outcome}"
            + (f": {mutations[:5]}" if outcome.split()[0] not in ("read", "refused") else "")
        )
    print(f"{arguments.count:,} files in {time.monotonic() - start:.0f} s")
    sys.exit(any(outcome not in ("read", "refused", "refused while reading") for outcome in found))
