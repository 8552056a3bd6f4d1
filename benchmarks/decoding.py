"""Fast decoding against stock FFCV's, crop by crop in one thread: time, PSNR and color, and pictures of both.

    python -m benchmarks.decoding --picture decoding.png

The same pixels are stored as each writes them: with restart markers for `decode="fast"`, without for stock FFCV. The
floor is what entropy decoding and the inverse DCT of the crop take: the same crop to so few pixels that all else costs
next to nothing. PSNR and color are against the exactly decoded image (PIL, as in the official project), filtered alike.
"""

import argparse
import io
import time

import numpy as np
from ffcv_fields.crops import CropSampler
from ffcv_fields.image import REQUEST, _crop_decode_c, _scratch_bytes_c
from ffcv.libffcv import imdecode, resize_crop
from matplotlib.figure import Figure
from PIL import Image
from skimage import data


def jpegs_of(photograph: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """As stock FFCV stores it, and with a restart marker every 4 MCUs, as `image_field` does by default."""
    files = [io.BytesIO(), io.BytesIO()]
    for file, interval in zip(files, (0, 4), strict=True):
        photograph.save(file, "JPEG", quality=90, restart_marker_blocks=interval)
    plain, with_markers = (np.frombuffer(file.getvalue(), np.uint8) for file in files)
    return plain, with_markers


SCRATCH = np.empty(_scratch_bytes_c(500, 224), np.uint8)  # one a thread, as in the loader


def request_of(jpeg: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int], out: np.ndarray) -> np.ndarray:
    """What `decode="fast"` is asked for: the crop `(y, x, h, w)` of an image of `size` (width, height), into `out`."""
    asked = dict.fromkeys(REQUEST, 0) | dict(zip("yxhw", box, strict=True))
    asked |= {"source": jpeg.ctypes.data, "bytes": jpeg.size, "width": size[0], "height": size[1], "size": len(out)}
    asked |= {"out": out.ctypes.data, "scratch": SCRATCH.ctypes.data}
    return np.array(list(asked.values()), np.int64)


def crop(request: np.ndarray) -> None:
    """The crop that is asked for."""
    assert _crop_decode_c(request.ctypes.data) == 0


def both(
    jpegs: tuple[np.ndarray, np.ndarray], size: tuple[int, int], box: tuple[int, int, int, int], side: int
) -> tuple[np.ndarray, ...]:
    """The crop as stock FFCV decodes it and as `decode="fast"` does, uint8 `[side, side, 3]`; seconds of four steps:
    stock decode, stock resize, fast, floor."""
    (width, height), (y, x, h, w), (plain, jpeg) = size, box, jpegs
    full, (stock, fast) = np.empty((height, width, 3), np.uint8), np.empty((2, side, side, 3), np.uint8)
    tiny = np.empty((max(1, min(h, w) // 16),) * 2 + (3,), np.uint8)
    ours, floor = (request_of(jpeg, size, box, out) for out in (fast, tiny))
    moments = [time.perf_counter()]
    for step in (
        lambda: imdecode(plain, full, height, width, height, width, 0, 0, 1, 1, False, False),
        lambda: resize_crop(full, y, y + h, x, x + w, stock),
        lambda: crop(ours),
        lambda: crop(floor),
    ):
        step()
        moments.append(time.perf_counter())
    return stock, fast, np.diff(moments)


def main(picture: str, crops: int) -> None:
    sample, _ = CropSampler(0).compile()
    photographs = [Image.fromarray(p()) for p in (data.chelsea, data.astronaut, data.coffee, data.rocket)]
    for photograph in photographs:
        photograph.thumbnail((500, 500), Image.Resampling.LANCZOS)
    for size in (160, 192, 224):
        psnr, bias, seconds = [], [], []
        for which, photograph in enumerate(photographs):
            jpegs = jpegs_of(photograph)
            decoded = np.asarray(Image.open(io.BytesIO(jpegs[0].tobytes())).convert("RGB")).copy()
            boxes = [sample(1000 * which + i, photograph.height, photograph.width) for i in range(crops)]
            crops_of_both = []
            for box in boxes:  # what follows would push all of it out of the caches
                *crop_of_both, took = both(jpegs, photograph.size, box, size)
                crops_of_both.append(crop_of_both)
                seconds.append(took)
            for (y, x, h, w), crop_of_both in zip(boxes, crops_of_both, strict=True):
                exact = np.empty((size, size, 3), np.uint8)
                resize_crop(decoded, y, y + h, x, x + w, exact)
                errors = np.stack(crop_of_both).astype(float) - exact
                psnr.append(10 * np.log10(255**2 / np.maximum((errors**2).mean((1, 2, 3)), 1e-2)))
                bias.append(errors.mean((1, 2)))
        print(f"{size} px, {len(psnr)} crops")
        for i, name in enumerate(("stock", "fast")):
            print(
                f"  {name}: PSNR mean {np.mean(psnr, 0)[i]:.1f} dB, least {np.min(psnr, 0)[i]:.1f} dB; "
                f"mean color off by at most {np.abs(np.mean(bias, 0)[i]).max():.3f} of 255"
            )
        decode, resize, ours, floor = 1e6 * np.median(seconds, 0)
        print(
            f"  microseconds: stock {decode + resize:.0f} (decode {decode:.0f}, resize {resize:.0f}), fast {ours:.0f}, "
            f"floor {floor:.0f}; stock / fast {(decode + resize) / ours:.2f}"
        )
    if picture:
        figure = Figure(figsize=(12, 6.4), layout="constrained")
        axes = figure.subplots(3, 6)
        for i in range(6):
            photograph = photographs[i % 4]
            box = sample(7 + i, photograph.height, photograph.width)
            stock, fast, _ = both(jpegs_of(photograph), photograph.size, box, 160)
            difference = np.clip(128 + 8 * (fast.astype(int) - stock), 0, 255).astype(np.uint8)
            for row, (image, title) in enumerate(
                ((stock, "stock FFCV"), (fast, 'decode="fast"'), (difference, "difference x 8"))
            ):
                axes[row, i].imshow(image)
                axes[row, i].set_title(title, fontsize=9)
                axes[row, i].axis("off")
        figure.savefig(picture, dpi=80)
        print(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="", help="PNG to write")
    parser.add_argument("--crops", type=int, default=100, help="random crops of each of four photographs")
    arguments = parser.parse_args()
    main(arguments.picture, arguments.crops)
