"""Fuzzed files, killed conversions, full disks, hostile label maps, odd images, and nothing that leaks."""

import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, names_of, run, write_images, write_label_maps
from faults import conversion_rounds, in_form
from fuzz_beton import fuzz, write_original
from PIL import Image
from torchvision.datasets.folder import pil_loader

from relabel.data.label_map_files import find_label_maps, read_tensor
from relabel.errors import BadSample
from relabel.label_maps.inspection import Samples


def test_two_thousand_mutated_files_end_in_an_error_or_are_read(tmp_path):
    outcomes = {outcome: len(found) for outcome, found in fuzz(write_original(tmp_path), seed=0, count=2000).items()}
    assert set(outcomes) <= {"read", "refused", "refused while reading"}, outcomes
    assert sum(outcomes.values()) == 2000 and outcomes["refused"] > 800 and outcomes["read"] > 200


@pytest.mark.parametrize("form, rounds", [("folders", 4), ("tar", 2), ("parquet", 2), ("shards", 2)])
def test_killed_conversions_leave_a_complete_file_or_none(tmp_path, form, rounds):
    counts = conversion_rounds(tmp_path, rounds, 0, form)
    assert counts["parent killed"] >= 1 and counts["worker killed"] >= 1


@pytest.mark.parametrize("form", ["folders", "tar", "parquet", "shards"])
def test_a_disk_that_is_full_is_one_message_and_leaves_nothing(tmp_path, form):
    files = write_images(tmp_path / "images", 200)
    assert len(files) == 200
    images, there = in_form(form, tmp_path / "images"), sorted(os.listdir(tmp_path))
    listed = tmp_path.with_name(f"{tmp_path.name}_classes.txt")
    listed.write_text("\n".join(f"class{i}" for i in range(8)))

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    result = subprocess.run(
        [sys.executable, str(ROOT / "write_datasets.py"), f"--cfg.data_dir={images}",
         f"--cfg.class_list={listed}", f"--cfg.write_path={tmp_path}/t.beton", "--cfg.write_mode=raw"],
        capture_output=True, text=True, preexec_fn=small_files, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1 and "File too large" in result.stderr
    assert sorted(os.listdir(tmp_path)) == there
    assert run(
        "write_datasets.py", f"--cfg.data_dir={images}", f"--cfg.class_list={listed}",
        f"--cfg.write_path={tmp_path}/t.beton",
    ).returncode == 0  # fmt: skip


# --- label maps ---------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def zip_bomb(file):
    """A zip as torch writes it, whose storage unpacks to 256 MiB from 256 KiB."""
    torch.save(torch.zeros(2, 5, 15, 15), file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, bytes(256 << 20) if "/data/" in name else content)


def legacy_bomb(file):
    """The format before zips, claiming a storage of 4 TiB."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(2, 5, 15, 15), buffer, _use_new_zipfile_serialization=False)
    content, was = buffer.getvalue(), pickle.dumps(2250, protocol=2)[2:-1]
    assert was in content
    file.write_bytes(content.replace(was, pickle.dumps(2**40, protocol=2)[2:-1]))


def wrong_endianness(file):
    torch.save(torch.rand(2, 5, 15, 15), file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as other:
        for name, content in entries.items():
            other.writestr(name, b"middle" if name.endswith("byteorder") else content)


HOSTILE = {
    "a pickle with os.system": lambda file: torch.save(Bomb(file.with_name("executed")), file),
    "a bare pickle with os.system": lambda file: file.write_bytes(pickle.dumps(Bomb(file.with_name("executed")))),
    "an oversized tensor": lambda file: torch.save(torch.zeros(2, 5, 1500, 1500), file),
    "a tensor that is one number, repeated": lambda file: torch.save(torch.zeros(1).expand(2, 5, 10**5, 10**5), file),
    "a zip bomb": zip_bomb,
    "a storage of 4 TiB that is not there": legacy_bomb,
    "an unknown endianness": wrong_endianness,
    "a sparse tensor": lambda file: torch.save(torch.eye(3).to_sparse(), file),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_label_maps_are_refused_by_name_with_bounded_memory(tmp_path, kind):
    file = tmp_path / "map.pt"
    HOSTILE[kind](file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSample, match=r"map\.pt"):
        read_tensor(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10  # KiB
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_out_of_the_tree_is_refused_by_name(tmp_path, what):
    files = write_images(tmp_path / "images", 8)
    write_label_maps(tmp_path / "maps", files)
    target = tmp_path / "maps" / "class3" / ("img003.pt" if what == "file" else "")
    outside = tmp_path / "elsewhere"
    target.rename(outside)
    target.symlink_to(outside)
    with pytest.raises(BadSample, match=r"class3.* is a link out of"):
        find_label_maps(tmp_path / "maps", [f"class{i}" for i in range(8)])


# --- images -------------------------------------------------------------------------------------------------------


def save_odd_images(folder):
    """Images of many kinds; returns those that can be shown and those that cannot, by name."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # "turn by 90 degrees", which torchvision does not do
    good = {
        "cmyk.JPEG": lambda f: color.convert("CMYK").save(f, "JPEG"),
        "grayscale.jpg": lambda f: color.convert("L").save(f),
        "png_named.JPEG": lambda f: color.save(f, "PNG"),
        "palette.png": lambda f: color.convert("P").save(f),
        "transparent.png": lambda f: color.convert("RGBA").save(f),
        "sixteen_bit.png": lambda f: Image.fromarray(rng.integers(0, 65535, (20, 20), dtype=np.uint16)).save(f),
        "animated.webp": lambda f: color.save(f, save_all=True, append_images=[color.rotate(180)], lossless=True),
        "exif_rotated.jpg": lambda f: color.save(f, exif=rotated),
        "progressive.jpg": lambda f: color.save(f, progressive=True),
        "one_pixel.png": lambda f: color.crop((0, 0, 1, 1)).save(f),
        "long.png": lambda f: Image.new("RGB", (30000, 10), (9, 200, 30)).save(f),
    }
    bad = {
        "truncated.jpg": lambda f: f.write_bytes((folder / "grayscale.jpg").read_bytes()[:-200]),
        "text.jpg": lambda f: f.write_text("not an image"),
        "empty.png": lambda f: f.write_bytes(b""),
        "bomb.png": lambda f: Image.new("1", (20000, 20000)).save(f),
    }
    for name, save in (good | bad).items():
        save(folder / name)
    return sorted(good), sorted(bad)


def test_odd_images_are_stored_as_torchvision_shows_them_or_named(tmp_path):
    good, bad = save_odd_images(tmp_path / "images" / "a")
    path = tmp_path / "t.beton"
    result = run(
        "write_datasets.py", f"--cfg.data_dir={tmp_path}/images", f"--cfg.write_path={path}", "--cfg.write_mode=raw",
        "--cfg.max_resolution=0", "--cfg.on_error=skip",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    files = names_of(path)
    assert sorted(files) == [f"a/{name}" for name in good]
    report = (tmp_path / "t.beton.skipped.tsv").read_text()
    assert sorted(line.split("\t")[0].rsplit("/", 1)[1] for line in report.splitlines()) == bad
    stored = stored_images(path)
    for name, pixels in zip(files, stored, strict=True):
        assert np.array_equal(pixels, np.asarray(pil_loader(tmp_path / "images" / name))), name


def stored_images(path):
    from relabel.data.beton import read_header

    header, data = read_header(str(path)), np.fromfile(path, np.uint8)
    return [
        data[int(i["data_ptr"]) : int(i["data_ptr"]) + int(i["height"]) * int(i["width"]) * 3]
        .reshape(int(i["height"]), int(i["width"]), 3) for i in header.metadata["f0"]
    ]  # fmt: skip


# --- nothing leaks ------------------------------------------------------------------------------------------------

SOAK = """
import ctypes, gc, os, sys
sys.path.insert(0, {root!r})
import numba
from ffcv_fields import CropBoxDecoder, CropSampler, LabelMapDecoder, RandomResizedCropDecoder, label_pooling
from ffcv.fields.decoders import IntDecoder
from ffcv.pipeline import PipelineSpec
from ffcv.transforms import ToTensor
from relabel.data.loader import Loader
crops = CropSampler(0)
image = RandomResizedCropDecoder(64, crops)
loader = Loader({path!r}, num_classes=8, order="random", num_workers=2, batch_size=16, pipelines={{
    "image": [image, ToTensor()], "label": [IntDecoder(), ToTensor()], "label_map": [LabelMapDecoder(), ToTensor()],
    "crop_box": PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=[ToTensor()])}})
class Mallinfo(ctypes.Structure):  # glibc's struct mallinfo2
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Mallinfo
def use():
    gc.collect()
    allocated = libc.mallinfo2()
    resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    return ((allocated.uordblks + allocated.hblkhd) / 2**20, resident, len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")))
for epoch in range(1500):
    loader.set_image_size(32 + 8 * (epoch % 9))
    for number, batch in enumerate(loader.epoch(epoch)):
        label_pooling(batch.label_maps, batch.crop_boxes, 8, batch.labels)
        if epoch % 7 == 0 and number == 1:
            break  # some epochs are left early
    if epoch == 100:
        before = use()
assert numba.threading_layer() == "omp"
print(*before, *use())
"""


def test_fifteen_hundred_epochs_leave_memory_threads_and_files_as_they_were(beton):
    script = SOAK.format(root=str(ROOT), path=str(beton))
    # One arena: mallinfo2 reports the first alone.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr
    before, after = np.array(result.stdout.split(), float).reshape(2, 4)
    allocated, resident, threads, files = after - before
    assert files == 0 and threads <= 1, (before, after)  # the loader's thread may have ended or not
    # In MiB. A leak that this found, of numba's TBB threads, was up to 100 KB per epoch, 130 in all, not by malloc.
    assert allocated < 3 and resident < 32, (before, after)


def test_samples_of_a_folder_and_its_files_agree(folders):
    images, maps, files, _ = folders
    assert [sample.name for sample in Samples(str(images), str(maps), "yx")] == [str(file) for file in files]
