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
made. Stopped or killed, the same command resumes. The whole image is resized to a square, so that fractions of the map
are fractions of the image.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting.
"""

from relabel.label_maps.settings import Settings
from relabel.settings import load_settings

if __name__ == "__main__":  # the settings are read first: the libraries take seconds to import
    settings = load_settings(Settings, __doc__)

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from relabel.checkpoints import saved_classes
from relabel.commands import run_command
from relabel.data.apart import pack_apart
from relabel.data.classes import network_classes
from relabel.data.label_map_files import manifest_of
from relabel.data.packing import list_skipped
from relabel.data.settings import Packing
from relabel.errors import BadInput, BadSample
from relabel.label_maps.annotator import DenseAnnotator, Preprocessing, annotator_network
from relabel.label_maps.generator import Archive, Generation, Tree, generate
from relabel.locks import exclusive
from relabel.precision import precision_of
from relabel.processes import barrier, join, use_all_cores
from relabel.sources.base import ClassChoice, by_key
from relabel.sources.opening import open_source


def main(settings: Settings) -> None:
    model, data, maps = settings.model, settings.data, settings.maps
    processes = join(settings.compute.gpu, "nccl")
    say = processes.say
    use_all_cores(processes.local_size)
    path = Path(maps.path)
    into_beton = path.suffix == ".beton"
    if into_beton and path.exists():
        raise BadInput(f"{path}: exists already; delete it, or give another maps.path")
    root = path.with_name(path.name + ".maps.npy") if into_beton else path
    if maps.top_k > model.num_classes:
        raise BadInput(f"maps.top_k is {maps.top_k}; the annotator has {model.num_classes} classes")
    source = open_source(data.data_dir)
    by_key(source)
    for remark in source.remarks:
        say(remark)
    saved = None if model.weights == "published" else saved_classes(model.weights)
    classes = network_classes(saved, model.num_classes)
    if classes is None and len(source.classes) == model.num_classes:
        classes = source.classes
        say(f"{model.weights}: has no class list; its classes are taken for the folders', in their order")
    if into_beton and len(source.classes) != model.num_classes:
        ClassChoice(model.num_classes).of(source.classes, data.data_dir)  # or it could not be packed: say so now
    network, statistics, digest = annotator_network(model.arch, model.weights, model.num_classes)
    image_size = maps.image_size or maps.size * 224 // DenseAnnotator(network, 224).grid[0]
    annotator = DenseAnnotator(network, image_size)
    grid = annotator.grid
    annotator = annotator.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    preprocessing = Preprocessing(image_size, **statistics)
    names = [sample.name for sample in source.samples]
    manifest = {
        "model": model.arch,
        "weights_sha256": digest,
        "num_classes": model.num_classes,
        "axis_order": "yx",
        "top_k": maps.top_k,
        "size": maps.size,
        "scores": "logits",
        "classes": classes and list(classes),
        "preprocessing": f"whole image, bicubic, {image_size} x {image_size}; mean {preprocessing.mean}, "
        f"std {preprocessing.std} of RGB in 0..1",
    }
    store = (Archive if root.suffix == ".npy" else Tree)(root, names, manifest)
    with exclusive(root, "label maps are being written") if processes.first else nullcontext():
        if processes.first:
            store.prepare()
        barrier()
        todo = store.missing()
        say(
            f"{model.arch}: {image_size} x {image_size} pixels give a grid of {grid[0]} x {grid[1]}, maps of "
            f"{maps.size} x {maps.size}; {len(todo):,} of {len(names):,} images to do"
        )
        todo, bad = todo[processes.rank :: processes.world_size], list[BadSample]()
        if todo:
            generation = Generation(maps.top_k, maps.size, maps.batch_size, data.num_workers, data.on_error == "skip")
            precision = precision_of(settings.compute.precision, processes.device)
            share, bad = generate(annotator, preprocessing, source, todo, store, generation, precision)
            say(f"{share:.0%} of the time in the network")
        bad = processes.gather(bad)
        if processes.first:
            if len(bad) == len(names):
                raise BadInput(f"{data.data_dir}: no image can be decoded; the first: {bad[0]}")
            store.finish()
            say(f"{root}: {len(names) - len(bad):,} label maps, {manifest_of(root)}")
            if into_beton:
                left_out = pack_apart(
                    Packing(
                        data_dir=data.data_dir, label_map_dir=str(root), write_path=str(path), on_error=data.on_error,
                        num_classes=0 if len(source.classes) == model.num_classes else model.num_classes,
                    )
                )  # fmt: skip
                for file in (manifest_of(root), root):
                    file.unlink()
                files_known = {problem.file for problem in bad}
                bad += [problem for problem in left_out if problem.file not in files_known]
            list_skipped(Path(f"{maps.path}.skipped.tsv"), bad)


if __name__ == "__main__":
    run_command(partial(main, settings), interrupted="interrupted; the same command resumes")
