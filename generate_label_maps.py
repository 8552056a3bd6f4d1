"""Label maps for any folder of images, from any classifier that ends in global average pooling and a linear layer.

  the paper's annotator on ImageNet (published weights; 475 pixels give its native 15 x 15 grid), 8 GPUs:
    torchrun --standalone --nproc-per-node=8 generate_label_maps.py --data.data_dir=ILSVRC/train \\
        --maps.path=label_maps --model.arch=timm/tf_efficientnet_l2.ns_jft_in1k_475 --maps.image_size=475
  your own classifier for your own classes, into one file:
    python generate_label_maps.py --data.data_dir=birds --maps.path=birds_maps.npy --model.arch=resnet50 \\
        --model.weights=runs/birds/checkpoint.pt --model.num_classes=200
  then, with either:
    python write_datasets.py --cfg.data_dir=birds --cfg.label_map_dir=birds_maps.npy --cfg.write_path=birds.beton
  or all in one, images and maps straight into the file to train on, as write_datasets.py packs them by default:
    python generate_label_maps.py --data.data_dir=birds --maps.path=birds.beton --model.arch=resnet50 ... (as above)

`maps.path` is a folder, which gets the official tree (CLASS/IMAGE.pt, float32 [2, top_k, size, size], rows = image y);
or a .npy, which gets all maps in one file with float16 scores; or a .beton. A manifest beside them says how they were
made. Stopped or killed, the same command goes on. The whole image is resized to a square, so that fractions of the map
are fractions of the image.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting.
"""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from ffcv_fields.label_map import pack_label_map
from fastargs import Param, Section
from fastargs.decorators import param
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from relabel import distributed
from relabel.annotate import DenseAnnotator, Preprocessing, annotator_network, label_maps
from relabel.atomic import write_text
from relabel.commands import pack, run_command
from relabel.errors import BadInput
from relabel.file_list import find_images
from relabel.label_map_files import manifest_of, open_archive, write_label_map
from relabel.loading import use_all_cores
from relabel.precision import precision_of
from relabel.settings import Choice, Number, load_settings, resolved

Section("model", "the annotator").params(
    arch=Param(str, "a torchvision classifier, timm/NAME, or efficientnet-lite0", required=True),
    weights=Param(str, "its checkpoint, or published: torchvision's or timm's own", default="published"),
    num_classes=Param(Number(2, 32767, whole=True), "its classes", default=1000),
)
Section("data", "the images").params(
    data_dir=Param(str, "folder of images, one folder a class", required=True),
    num_workers=Param(Number(0, whole=True), "processes that decode, for each GPU", default=os.cpu_count()),
)
Section("maps", "the label maps").params(
    path=Param(str, "the folder, .npy or .beton to write", required=True),
    top_k=Param(Number(1, 100, whole=True), "classes at each place", default=5),
    size=Param(Number(1, 255, whole=True), "places along each side", default=15),
    image_size=Param(
        Number(0, whole=True), "side of the resized image; 0: what gives the network that grid", default=0
    ),
    batch_size=Param(Number(1, whole=True), "images in a step of a process", default=64),
)
Section("compute", "numbers").params(
    precision=Param(Choice("auto", "fp32", "bf16", "fp16"), "auto: fp16 on a GPU, else fp32", default="auto"),
    gpu=Param(Number(-1, whole=True), "number of the GPU; -1: the process's", default=-1),
)


def main(config) -> None:
    settings = resolved(config)
    processes = distributed.join(settings["compute.gpu"], "nccl")
    device, say = processes.device, print if processes.first else (lambda _: None)
    use_all_cores(processes.local_size)
    path, size, top_k = Path(settings["maps.path"]), settings["maps.size"], settings["maps.top_k"]
    into_beton = path.suffix == ".beton"
    if into_beton and path.exists():
        raise BadInput(f"{path}: exists already; delete it, or give another maps.path")
    root = path.with_name(path.name + ".maps.npy") if into_beton else path
    network, statistics, digest = annotator_network(
        settings["model.arch"], settings["model.weights"], settings["model.num_classes"]
    )
    if top_k > settings["model.num_classes"]:
        raise BadInput(f"maps.top_k is {top_k}; the annotator has {settings['model.num_classes']} classes")
    image_size = settings["maps.image_size"] or size * 224 // DenseAnnotator(network, 224).grid[0]
    annotator = DenseAnnotator(network, image_size)
    grid = annotator.grid
    annotator = annotator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    preprocessing = Preprocessing(image_size, **statistics)
    images, folders = find_images(Path(settings["data.data_dir"]))
    num_classes = settings["model.num_classes"]
    if into_beton and num_classes > len(folders):
        raise BadInput(
            f"{settings['data.data_dir']}: has {len(folders)} class folders, the annotator {num_classes} classes; a "
            ".beton needs a folder, if an empty one, for each"
        )
    names = [file.relative_to(settings["data.data_dir"]).as_posix() for file, _ in images]
    manifest = {
        "model": settings["model.arch"],
        "weights_sha256": digest,
        "num_classes": settings["model.num_classes"],
        "axis_order": "yx",
        "top_k": top_k,
        "size": size,
        "scores": "logits",
        "preprocessing": f"whole image, bicubic, {image_size} x {image_size}; mean {preprocessing.mean}, "
        f"std {preprocessing.std} of RGB in 0..1",
    }
    store = (Archive if root.suffix == ".npy" else Tree)(root, names, manifest)
    if processes.first:
        store.prepare()
    distributed.wait_for_all()
    todo = store.missing()
    say(
        f"{settings['model.arch']}: {image_size} x {image_size} pixels give a grid of {grid[0]} x {grid[1]}, maps of "
        f"{size} x {size}; {len(todo):,} of {len(names):,} images to do"
    )
    todo = todo[processes.rank :: processes.world_size]
    if todo:
        network_share = annotate(annotator, preprocessing, [images[i][0] for i in todo], todo, store, device)
        say(f"{network_share:.0%} of the time in the network")
    distributed.wait_for_all()
    if processes.first:
        store.finish()
        say(f"{root}: {len(names):,} label maps, {manifest_of(root)}")
        if into_beton:
            pack(settings["data.data_dir"], root, path)
            for file in (manifest_of(root), root):
                file.unlink()


@param("maps.top_k")
@param("maps.size")
@param("maps.batch_size")
@param("data.num_workers")
@param("compute.precision")
def annotate(annotator, preprocessing, files, indices, store, device, top_k, size, batch_size, num_workers, precision):
    """Write the maps of `files`; returns the share of the time that the network took."""
    _, autocast = precision_of(precision, device)
    loader = DataLoader(
        Images(files, preprocessing), batch_size, num_workers=num_workers, pin_memory=device.type == "cuda"
    )
    in_network, start, done = 0.0, time.perf_counter(), 0
    with tqdm(total=len(files), unit=" images", desc="label maps", disable=distributed.quiet()) as progress:
        for images in loader:
            asked = time.perf_counter()
            with autocast():
                found = label_maps(annotator, preprocessing.normalize(images.to(device)), top_k, size)
            scores, classes = (part.cpu().numpy() for part in found)
            in_network += time.perf_counter() - asked
            for i in range(len(images)):
                store.write(indices[done + i], scores[i], classes[i])
            done += len(images)
            progress.update(len(images))
    return in_network / (time.perf_counter() - start)


class Images(Dataset):
    """Files as the network's input before normalization, uint8 `[3, S, S]`."""

    def __init__(self, files, preprocessing):
        self.files, self.preprocessing = files, preprocessing

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.preprocessing.read(self.files[index])


class Tree:
    """The official tree: one file an image, each written whole or not at all."""

    def __init__(self, root, names, manifest):
        self.root, self.files, self.manifest = root, [root / Path(name).with_suffix(".pt") for name in names], manifest

    def prepare(self):
        self.root.mkdir(parents=True, exist_ok=True)
        keep_manifest(manifest_of(self.root), self.manifest)

    def missing(self):
        return [i for i, file in enumerate(self.files) if not file.exists()]

    def write(self, index, scores, classes):
        temporary = self.files[index].with_suffix(".part")
        write_label_map(temporary, scores, classes)
        os.replace(temporary, self.files[index])

    def finish(self):
        pass


class Archive:
    """All maps in one file, which has its name when it is complete; rows that are done are marked beside it."""

    def __init__(self, root, names, manifest):
        self.root, self.manifest = root, manifest | {"files": names}
        self.growing, self.marks = (root.with_name(root.name + end) for end in (".part", ".done"))
        self.shape = (len(names), 2, manifest["top_k"], manifest["size"], manifest["size"])

    def prepare(self):
        keep_manifest(manifest_of(self.root), self.manifest)
        if not self.root.exists() and not self.growing.exists():
            np.lib.format.open_memmap(self.growing, "w+", np.int16, self.shape).flush()
            np.lib.format.open_memmap(self.marks, "w+", np.uint8, self.shape[:1]).flush()

    def missing(self):
        if self.root.exists():
            return []
        self._maps, self._done = open_archive(self.growing, "r+"), np.load(self.marks, mmap_mode="r+")
        return np.flatnonzero(self._done == 0).tolist()

    def write(self, index, scores, classes):
        self._maps[index] = pack_label_map(scores, classes, "float16")
        self._done[index] = 1

    def finish(self):
        if not self.root.exists():
            self._maps.flush()
            os.replace(self.growing, self.root)
            self.marks.unlink()


def keep_manifest(file, manifest):
    """Write the manifest, or see that the maps that are there already were made in the same way.

    Raises:
        BadInput: they were not.
    """
    manifest = json.loads(json.dumps(manifest))
    if file.exists():
        there = json.loads(file.read_text())
        for key in manifest:
            if there.get(key) != manifest[key]:
                raise BadInput(f"{file}: the maps there have another {key}; use another maps.path, or delete them")
        return
    write_text(file, json.dumps(manifest, indent=1))


def run() -> NoReturn:
    """The command line."""
    config = load_settings(__doc__)
    run_command(partial(main, config), interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    run()
