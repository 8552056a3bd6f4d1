"""The page on which label maps can be touched: one HTML file that needs no network and no other file.

page.html is its frame, page.css its style; pooling.js computes LabelPooling, charts.js draws a run's curves, page.js is
the rest. Data stand in it as JSON: images as WebP and label maps as binary, both in base64. A content security policy
keeps the page from loading or running anything else, whatever files and classes are called.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from ffcv_fields import CropSampler
from PIL import Image

from ...errors import BadInput
from ...files import in_units, write_text
from ..inspection import Sample, Samples

SIDE, QUALITY = 400, 75  # of the images: the longer side in pixels, WebP's quality
CROPS = 16  # random crops of each image
GREATEST = 250_000_000  # bytes of a page: browsers take no string much longer
SCRIPTS = ("pooling.js", "charts.js", "page.js")


def page_data(
    samples: Samples, chosen: Sequence[int], names: Sequence[str], num_classes: int, temperature: float,
    crops: CropSampler,
) -> dict[str, Any]:  # fmt: skip
    """What the page shows of some samples, for `write_page`.

    Args:
        chosen: their places in `samples`.
        names: for people, of the classes that the maps name, by index.
        num_classes: of the network, that share the probability; as many as `names`, or more.
        temperature: of the pooled targets.
        crops: the training's, whose crops of the first epochs are shown; of a folder they are like the
            training's, which depend on a sample's place in the `.beton`.

    Raises:
        BadInput: they would make a page too large for a browser.
    """
    take, _ = crops.compile()
    entries: list[dict[str, Any]] = []
    size = 0
    for place in chosen:
        sample, number = samples[place], samples.numbers[place]
        width, height = sample.image.size
        drawn = []
        for crops.epoch in range(CROPS):
            y, x, h, w = take(number, height, width)
            drawn.append([int(x), int(y), int(w), int(h)])
        entry = _entry(samples, sample, num_classes, temperature)
        entry |= {"name": samples.names[place], "number": number, "labelName": _label(samples, sample, names)}
        entries.append(entry | {"crops": drawn})
        size += len(entry["pixels"]) + len(entry["map"])
        if size > GREATEST:
            raise BadInput(
                f"a page with {len(chosen)} images would take more than {in_units(GREATEST)}; "
                f"{len(entries) - 1} fit: give --count={len(entries) - 1}"
            )
    return {
        "images": entries,
        "shape": list(sample.scores.shape),
        "names": list(names),
        "pooling": {"numClasses": num_classes, "temperature": temperature, "softmax": samples.scores == "logits"},
        "drawn": f"The crop that training draws in epoch {{}} with compute.seed={crops.seed} and "
        f"data.rrc_minimum={crops.scale[0]:g}"
        if samples.packed
        else f"Random crop {{}} of {CROPS}, as training draws them with data.rrc_minimum={crops.scale[0]:g}",
        "exchanged": False,
        "axesNote": f"The maps are read in axis order {samples.axis_order}.",
        "run": None,
    }


def _entry(samples: Samples, sample: Sample, num_classes: int, temperature: float) -> dict[str, Any]:
    whole = sample.targets(np.array([[0.0, 0, 1, 1]]), num_classes, temperature)[0].astype(np.float64)
    label = int(samples.label_of[sample.label])
    width, height = sample.image.size
    return {
        "width": width,
        "height": height,
        "pixels": _webp(sample.image),
        "map": _base64(sample.scores.astype("<f4").tobytes() + sample.classes.astype("<i2").tobytes()),
        "label": label,
        "share": float(whole[label]) if label >= 0 else 0.0,
        "best": int(whole.argmax()),
        "entropy": float(-(whole * np.log(whole.clip(1e-30))).sum()),
    }


def _label(samples, sample, names):
    label = samples.label_of[sample.label]
    return names[label] if label >= 0 else samples.classes[sample.label]


def _webp(image: Image.Image) -> str:
    small, out = image.copy(), BytesIO()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(out, "WEBP", quality=QUALITY)
    return _base64(out.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def write_page(file: Path, data: Mapping[str, Any]) -> int:
    """Write the page, complete or not at all; returns its bytes.

    Args:
        data: `page_data`'s, with `title`, and `report`, a list of lines; of a run also `run`, `{"lines": its log}`.

    Raises:
        BadInput: there is no room for it.
    """
    folder = Path(__file__).parent
    script = "\n".join((folder / name).read_text() for name in SCRIPTS)
    style = (folder / "page.css").read_text()
    values = {
        "style": style,
        "script": script,
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # it cannot end the element that it is in
        "policy": f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}",
    }
    frame = (folder / "page.html").read_text()
    text = re.sub(r"\{(style|script|data|policy)\}", lambda match: values[match[1]], frame)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    return file.stat().st_size


def _hash(text: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'"
