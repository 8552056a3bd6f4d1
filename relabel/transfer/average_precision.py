"""What a detector finds in a set, written as COCO's results, and its average precision, by pycocotools."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..errors import BadInput
from ..files import write_text
from ..precision import Precision
from ..processes import Processes, hide_progress
from .coco import CocoSet
from .samples import Samples, batches_of, on

# As COCOeval.stats has them: over IoU 0.50:0.95, at 0.50, at 0.75; of small, medium, large objects; then recall with 1,
# 10, 100 detections an image, and of small, medium, large ones with 100.
MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MASK_THRESHOLD = 0.5  # of a pixel's probability


def check_pycocotools() -> None:
    """Raise BadInput where pycocotools is not installed."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"detection needs a package ({error}): pip install pycocotools, or this project's extra `detection`"
        ) from None


@torch.inference_mode()
def detect(
    detector: nn.Module, coco: CocoSet, precision: Precision, num_workers: int, processes: Processes
) -> list[dict[str, Any]]:
    """What a detector finds in every image of a set, by the file's own ids; the same list in every process.

    Each image goes through alone, so that it is not padded to others' sizes.

    Returns:
        For each detection `image_id`, `category_id`, `bbox` `[x, y, width, height]` in the image's pixels, `score`; of
        Mask R-CNN also `segmentation`, run lengths.
    """
    detector.eval()
    ids, found = list(coco.categories), list[dict[str, Any]]()
    places = range(processes.rank, len(coco.images), processes.world_size)
    batches = batches_of(Samples(coco, places, masks=False), 1, num_workers)
    progress = tqdm(batches, "detect", len(places), leave=False, disable=hide_progress(), dynamic_ncols=True)
    for place, batch in zip(places, progress, strict=True):
        images, _ = on(precision.device, batch)
        with precision.autocast():
            (output,) = detector(images)
        boxes, scores, labels = (output[key].float().cpu() for key in ("boxes", "scores", "labels"))
        boxes[:, 2:] -= boxes[:, :2]
        segmentations = _run_lengths(output["masks"]) if "masks" in output else [None] * len(boxes)
        for box, score, label, segmentation in zip(
            boxes.tolist(), scores.tolist(), labels.int().tolist(), segmentations, strict=True
        ):
            one = {"image_id": coco.images[place].id, "category_id": ids[label - 1], "bbox": box, "score": score}
            found.append(one | ({"segmentation": segmentation} if segmentation else {}))
    return processes.gather(found)


def _run_lengths(masks: torch.Tensor) -> list[dict[str, Any]]:
    from pycocotools import mask as coco_mask

    binary = (masks[:, 0] > MASK_THRESHOLD).to(torch.uint8).cpu().numpy()
    encoded = [coco_mask.encode(np.asfortranarray(mask)) for mask in binary]
    return [{"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()} for rle in encoded]


def write_results(found: list[dict[str, Any]], kinds: tuple[str, ...], folder: Path) -> dict[str, Path]:
    """Write detections as COCO's servers and tools take them: `detections_bbox.json`, `detections_segm.json`.

    The latter has no boxes: with them, COCO's evaluation would take a mask's size from its box.
    """
    files = {}
    for kind in kinds:
        without = "segmentation" if kind == "bbox" else "bbox"
        results = [{key: value for key, value in one.items() if key != without} for one in found]
        files[kind] = folder / f"detections_{kind}.json"
        write_text(files[kind], json.dumps(results))
    return files


def average_precision(content: dict[str, Any], results: list[dict[str, Any]], kind: str) -> dict[str, float | None]:
    """COCO's twelve measures in percent; None where there are no objects of the size.

    Args:
        content: the annotations, as they stand in the file.
        results: detections, as `write_results` writes them.
        kind: "bbox" or "segm".
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth, detections = COCO(), COCO()
        truth.dataset = content
        truth.createIndex()
        if results:
            detections = truth.loadRes([dict(result) for result in results])
        else:
            detections.dataset = {**content, "annotations": []}
            detections.createIndex()
        evaluation = COCOeval(truth, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: None if v < 0 else 100 * float(v) for name, v in zip(MEASURES, evaluation.stats, strict=True)}


def evaluate(
    detector: nn.Module, coco: CocoSet, kinds: tuple[str, ...], folder: Path, precision: Precision, num_workers: int,
    processes: Processes,
) -> dict[str, float | None]:  # fmt: skip
    """Average precision on a set, `bbox_AP` ... and for masks `segm_AP` ...; the detections stay in `folder`."""
    found = detect(detector, coco, precision, num_workers, processes)
    if not processes.first:
        return {}
    files = write_results(found, kinds, folder)
    measured: dict[str, float | None] = {}
    for kind, file in files.items():
        values = average_precision(coco.content, json.loads(file.read_text()), kind)
        measured |= {f"{kind}_{name}": value for name, value in values.items()}
    return measured


def table(line: dict[str, Any], kinds: tuple[str, ...]) -> str:
    """Markdown: the measures of a log line, a row for boxes and one for masks."""
    names = {"bbox": "boxes", "segm": "masks"}
    lines = [f"| % | {' | '.join(MEASURES)} |", "|---" * (1 + len(MEASURES)) + "|"]
    for kind in kinds:
        values = [line[f"{kind}_{name}"] for name in MEASURES]
        lines.append(f"| {names[kind]} | {' | '.join('-' if v is None else f'{v:.1f}' for v in values)} |")
    return "\n".join(lines)
