"""A tiny packing and training, in a folder that goes away: the installation works, and numba's cache holds the kernels.

`setup/install.sh` calls it, by `python -m setup.first_run`. Without it the first run compiles the kernels.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from relabel.commands import call

COUNT, CLASSES = 32, 2


def write_data(root: Path) -> None:
    """`root/images/CLASS/N.jpg` and `root/maps/CLASS/N.pt`."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        name = f"{i % CLASSES}/{i}"
        for kind in ("images", "maps"):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(root / "images" / f"{name}.jpg")
        classes = rng.random((CLASSES, 15, 15)).argsort(0)
        torch.save(torch.from_numpy(np.stack([rng.normal(size=classes.shape), classes])), root / "maps" / f"{name}.pt")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root, beton = Path(folder), f"{folder}/train.beton"
        write_data(root)
        code = call(
            "write_datasets.py", f"--cfg.data_dir={root}/images", f"--cfg.label_map_dir={root}/maps",
            f"--cfg.write_path={beton}", "--cfg.axis_order=yx",
        )  # fmt: skip
        for more in ([], ["--data.color_jitter=0", "--data.lighting=0"]):  # normalized by the augmentation; decoded so
            code = code or call(
                "train_imagenet.py", "--util.dry_run", f"--data.train_dataset={beton}", f"--data.val_dataset={beton}",
                "--model.arch=shufflenet_v2_x0_5", f"--model.num_classes={CLASSES}", "--data.image_size=32",
                f"--optim.batch_size={COUNT // 2}", "--optim.epochs=1", f"--logging.folder={root}/run", *more,
            )  # fmt: skip
        return code


if __name__ == "__main__":
    sys.exit(main())
