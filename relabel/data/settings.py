"""Settings of write_datasets.py and verify_datasets.py. No library is imported here: settings are read before them."""

from dataclasses import dataclass

from ..cores import usable_cores
from ..settings import Choice, Files, Number, Shard, group, setting


@dataclass(frozen=True, kw_only=True)
class Packing:
    """what to pack and how"""

    data_dir: str = setting(
        str,
        "images: class folders, a flat folder, .tar or .parquet files (one, their folder, a pattern): docs/datasets.md",
    )
    val_labels: str = setting(
        str,
        "what labels images in no class folders: ImageNet's devkit, LOC_val_solution.csv, or a list NAME LABEL; empty: "
        "found beside them",
        "",
    )
    write_path: str = setting(str, "the .beton to write")
    label_map_dir: str = setting(
        str, "label maps: a folder of CLASS/IMAGE.pt or .p, its .tar, an .npy, or a multi-label .tsv; empty: none", ""
    )
    axis_order: str = setting(
        Choice("auto", "xy", "yx"),
        "how maps are stored, yx: rows first; auto: as their manifest says, else as their asymmetry shows",
        "auto",
    )
    scores: str = setting(
        Choice("auto", "logits", "probabilities"), "kind of scores; auto: as the manifest or the values show", "auto"
    )
    min_agreement: float = setting(
        Number(0, 1), "least share of maps whose five best classes hold the single label; 0: any", 0.5
    )
    num_classes: int = setting(Number(0, 32767, whole=True), "classes, where some have no folder; 0: the folders", 0)
    class_list: str = setting(str, "file of all class names, one a line in order of their index; empty: folders", "")
    score_dtype: str = setting(Choice("float16", "float32"), "how scores are stored", "float16")
    write_mode: str = setting(
        Choice("jpg", "raw", "smart", "proportion"),
        "as FFCV's RGBImageField: jpg, raw pixels, smart (FFCV's; raw), or a proportion of jpg",
        "jpg",
    )
    compress_probability: float = setting(Number(0, 1), "share of jpg in write_mode=proportion", 0.5)
    jpeg: str = setting(
        Choice("keep", "encode"),
        "JPEGs that need no resizing, in write_mode=jpg: keep (their pixels bit for bit), or encode again",
        "keep",
    )
    max_resolution: int = setting(Number(0, 65535, whole=True), "longest side stored, in pixels; 0: unchanged", 500)
    jpeg_quality: int = setting(Number(1, 100, whole=True), "quality of JPEGs that are encoded", 90)
    restart_interval: int = setting(
        Number(0, 65535, whole=True),
        "times 16 pixels between a JPEG's restart markers, where the decoding of crops begins; 0: none",
        4,
    )
    num_workers: int = setting(Number(1, whole=True), "worker processes", usable_cores())
    chunk_size: int = setting(Number(1, whole=True), "images a worker takes at a time", 100)
    subset: int = setting(Number(-1, whole=True), "pack the first so many images, in order of their names; -1: all", -1)
    order: str = setting(
        Choice("random", "sorted"), "how images follow one another in the file; sorted: by class and name", "random"
    )
    seed: int = setting(Number(0, whole=True), "of the random order", 0)
    shard: str = setting(Shard(), "write one of N parts of that order, as NAME-K-of-N.beton; empty: all in one", "")
    on_error: str = setting(
        Choice("stop", "skip"), "at a bad image or label map: stop, or leave it out and list it", "stop"
    )
    max_skipped: float = setting(Number(0, 1), "greatest share of samples that may be left out (10 always may)", 0.01)
    overwrite: str = setting(Choice("no", "yes"), "replace an existing file", "no")


@dataclass(frozen=True, kw_only=True)
class Writing:
    cfg: Packing = group(Packing)


@dataclass(frozen=True, kw_only=True)
class File:
    """what to check"""

    path: str = setting(Files(), "the .beton, or several shards")


@dataclass(frozen=True, kw_only=True)
class Verification:
    cfg: File = group(File)
