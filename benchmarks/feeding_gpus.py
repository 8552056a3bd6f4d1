"""How many CPU cores feed how many GPUs: from measured images/s per core and a network's images/s per GPU.

    python -m benchmarks.feeding_gpus --images-per-core 2200 --images-per-gpu 2500

Measure the first on the machine in question (`python -m benchmarks.loader`: ours, divided by its cores) and the second
with `train_imagenet.py` or the framework's own benchmark. Assumes that cores scale linearly (true while they do not
share a memory channel's or a disk's limit), that the file is in memory, that a GPU process keeps `--other-cores` busy
besides the loader, and a margin of 10 %.
"""

import argparse
import math

MARGIN = 1.1


def cores_needed(gpus: int, images_per_gpu: float, images_per_core: float, other_cores: float) -> int:
    """Whole cores that keep `gpus` GPUs from waiting."""
    return math.ceil(gpus * (MARGIN * images_per_gpu / images_per_core + other_cores))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-core", type=float, required=True, help="the loader's images/s on one core")
    parser.add_argument("--images-per-gpu", type=float, required=True, help="the network's images/s on one GPU")
    parser.add_argument("--other-cores", type=float, default=1.0, help="cores that each GPU's process needs besides")
    parser.add_argument("--gpus", type=int, nargs="+", default=[4, 8], help="numbers of GPUs")
    arguments = parser.parse_args()
    print(
        f"{arguments.images_per_core:,.0f} images/s per core, {arguments.images_per_gpu:,.0f} images/s per GPU, "
        f"{arguments.other_cores:g} other core(s) per GPU, margin {MARGIN - 1:.0%}:"
    )
    for gpus in arguments.gpus:
        rates = arguments.images_per_gpu, arguments.images_per_core, arguments.other_cores
        print(f"  {gpus} GPUs need {cores_needed(gpus, *rates)} cores")
