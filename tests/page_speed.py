"""How large the page of inspect_label_maps.py is, and how fast: python tests/page_speed.py --count 300

The images are 500 x 375 pieces of photographs of scikit-image and scikit-learn, their maps random, 5 x 15 x 15. Times
are of a headless Chromium that paints in software.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage.data
import torch
from browser import Browser
from PIL import Image
from sklearn.datasets import load_sample_image

ROOT = Path(__file__).parent.parent
DRAG = """
(() => {
  const times = [];
  for (let i = 0; i < 200; i++) {
    const begun = performance.now();
    setOwnCrop([i % 100, i % 70, 150 + (i % 90), 120 + (i % 50)]);
    document.body.getBoundingClientRect();  // layout included
    times.push(performance.now() - begun);
  }
  return times.sort((a, b) => a - b)[100];
})()
"""
CHOOSE = """
(async () => {
  const times = [];
  for (const image of data.images.slice(1, 21)) {
    const begun = performance.now();
    choose(image);
    await document.getElementById("picture").decode();
    times.push(performance.now() - begun);
  }
  return times.sort((a, b) => a - b)[10];
})()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="images [300]")
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_data(folder, count)
        page = folder / "page.html"
        command = ["inspect_label_maps.py", "--images", folder / "images", "--label-maps", folder / "maps"]
        command += ["--axis-order=yx", f"--count={count}", f"--out={page}"]
        begun = time.perf_counter()
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        print(f"written in {time.perf_counter() - begun:.1f} s: {count} images, {page.stat().st_size / 1e6:.2f} MB")
        with Browser(folder / "browser") as browser:
            loads = []
            for _ in range(5):
                browser.open(page)
                loads.append(browser.run("performance.timing.loadEventEnd - performance.timing.navigationStart"))
            print(f"loaded in {np.median(loads):.0f} ms (median of 5)")
            print(f"crop moved in {browser.run(DRAG):.2f} ms (median of 200, with layout)")
            print(f"image chosen in {browser.run(CHOOSE):.1f} ms (median of 20)")
            assert browser.faults() == []


def write_data(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    photographs = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket()]
    photographs += [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        y, x = (int(rng.integers(0, side - size + 1)) for side, size in zip(photograph.shape, (375, 500), strict=False))
        for kind in ("images", "maps"):
            (folder / kind / f"class{i % 10}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[y : y + 375, x : x + 500]).save(folder / f"images/class{i % 10}/{i}.jpg", quality=92)
        scores, classes = rng.normal(8, 3, (5, 15, 15)), rng.random((1000, 15, 15)).argsort(0)[:5]
        tensor = torch.from_numpy(np.stack([scores, classes]).astype(np.float32))
        torch.save(tensor, folder / f"maps/class{i % 10}/{i}.pt")


if __name__ == "__main__":
    main()
