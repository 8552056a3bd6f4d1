"""The forms in which people have ImageNet, made exactly, small, from a tree of class folders."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

# ILSVRC2012_IDs: not in sorted order
IDS = {"n01440764": 3, "n01443537": 1, "n01484850": 5, "n01491361": 2, "n01494475": 4}
DEVKIT = "ILSVRC2012_devkit_t12"


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def files_of(tree: Path) -> dict[str, bytes]:
    """The files of a tree by their path below it, in order."""
    return {file.relative_to(tree).as_posix(): file.read_bytes() for file in sorted(tree.rglob("*")) if file.is_file()}


def train_tar(tree: Path, path: Path, format: int = tarfile.GNU_FORMAT) -> Path:
    """`ILSVRC2012_img_train.tar`: a tar of class tars."""
    with tarfile.open(path, "w", format=format) as outer:
        for folder in sorted(tree.iterdir()):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=format) as archive:
                for name, data in files_of(folder).items():
                    add(archive, name, data)
            add(outer, f"{folder.name}.tar", inner.getvalue())
    return path


def tree_tar(tree: Path, path: Path, below: str = "") -> Path:
    """A tree of class folders, packed by tar."""
    with tarfile.open(path, "w") as archive:
        for entry in sorted(tree.iterdir()):
            archive.add(entry, f"{below}{entry.name}")
    return path


def flat_files(tree: Path) -> tuple[dict[str, bytes], list[str]]:
    """ImageNet's validation files `ILSVRC2012_val_00000001.JPEG`, in an order that mixes the tree's classes, and their
    classes; the tree's own files have these names."""
    files = files_of(tree)
    names = sorted(files, key=lambda name: name.rpartition("/")[2])
    return {n.rpartition("/")[2]: files[n] for n in names}, [n.partition("/")[0] for n in names]


def flat_folder(tree: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in flat_files(tree)[0].items():
        (folder / name).write_bytes(data)
    return folder


def val_tar(tree: Path, path: Path) -> Path:
    """`ILSVRC2012_img_val.tar`: flat."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in flat_files(tree)[0].items():
            add(archive, name, data)
    return path


def meta_mat(ids: dict[str, int]) -> bytes:
    """`meta.mat`: the 1,000 leaves with their ILSVRC2012_IDs first, then the synsets above them."""
    rows = [(n, wnid, "words", "gloss", 0, [], 0, 1300) for wnid, n in sorted(ids.items(), key=lambda item: item[1])]
    rows.append((1001, "n00001740", "entity", "gloss", len(ids), sorted(ids.values()), 2, 0))
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
                                         "wordnet_height", "num_train_images")]  # fmt: skip
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, kinds)[:, None]})
    return file.getvalue()


def devkit(tree: Path, path: Path, year: int = 2012, ids: dict[str, int] = IDS) -> Path:
    """`ILSVRC2012_devkit_t12.tar.gz`."""
    lines = "".join(f"{ids[label]}\n" for label in flat_files(tree)[1])
    with tarfile.open(path, "w:gz") as archive:
        add(archive, f"{DEVKIT}/readme.txt", b"ILSVRC")
        add(archive, f"{DEVKIT}/data/meta.mat", meta_mat(ids))
        add(archive, f"{DEVKIT}/data/ILSVRC{year}_validation_ground_truth.txt", lines.encode())
    return path


def kaggle(tree: Path, train: Path, root: Path, ids: dict[str, int] = IDS) -> Path:
    """Kaggle's layout; returns the validation folder. `tree` is the validation set, `train` the training set."""
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    flat_folder(tree, images / "val")
    (images / "train").symlink_to(train)
    files, labels = flat_files(tree)
    rows = [(name.removesuffix(".JPEG"), f"{label} 1 2 30 40 ") for name, label in zip(files, labels, strict=True)]
    rows[0] = (rows[0][0], rows[0][1] * 2)  # two boxes
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows[::-1]])
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a word, another\n" for wnid in sorted(ids)))
    return images / "val"


def shards(
    tree: Path,
    folder: Path,
    count: int = 3,
    with_json: bool = True,
    numbered: bool = False,
    prefix: str = "imagenet1k-train",
) -> Path:
    """timm's ImageNet shards: keys are the files' stems (or `numbered`), samples are mixed; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    classes, files = sorted(entry.name for entry in tree.iterdir()), list(files_of(tree).items())
    order = np.random.default_rng(0).permutation(len(files))
    for shard, rows in enumerate(np.array_split(order, count)):
        with tarfile.open(folder / f"{prefix}-{shard:04d}.tar", "w") as archive:
            for row in rows:
                name, data = files[row]
                label, key = classes.index(name.partition("/")[0]), Path(name).stem
                key = f"{row:08d}" if numbered else key
                add(archive, f"{key}.cls", str(label).encode())
                add(archive, f"{key}.jpg", data)
                about = {"filename": name, "height": 40, "label": label, "width": 60}
                if with_json:
                    add(archive, f"{key}.json", json.dumps(about).encode())
    return folder / f"{prefix}-{{0000..{count - 1:04d}}}.tar"


def parquet(tree: Path, folder: Path, count: int = 2, split: str = "train", names: list[str] | None = None) -> Path:
    """Hugging Face's `imagenet-1k`: the WordNet id is appended to the file's name; returns the folder.

    Args:
        names: of the classes in the schema; given, the paths are those of another data set, without the class.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True, exist_ok=True)
    classes, files = sorted(entry.name for entry in tree.iterdir()), list(files_of(tree).items())
    order = np.random.default_rng(1).permutation(len(files))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    feature = {"names": names or [f"words of {name}" for name in classes], "_type": "ClassLabel"}
    about = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    schema = pa.schema({"image": kind, "label": pa.int64()}, metadata={"huggingface": json.dumps(about)})
    for shard, rows in enumerate(np.array_split(order, count)):
        images, labels = [], []
        for name, data in (files[row] for row in rows):
            label, path = name.partition("/")[0], Path(name)
            with_class = path.name if names else f"{path.stem}_{label}{path.suffix}"
            images.append({"bytes": data, "path": with_class})
            labels.append(classes.index(label))
        table = pa.table({"image": pa.array(images, kind), "label": labels}, schema=schema)
        pq.write_table(table, folder / "data" / f"{split}-{shard:05d}-of-{count:05d}.parquet", row_group_size=4)
    return folder


def label_map_tar(maps: Path, path: Path, below: str = "imagenet_efficientnet_l2_sz475_top5/") -> Path:
    """`relabel_imagenet.tar`: the tree of label maps in an inner folder."""
    return tree_tar(maps, path, below)
