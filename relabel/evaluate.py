"""Accuracy of a network on a validation set: single-label top-1 and top-5, and multi-label."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .augment import normalize
from .errors import BadInput


def read_multilabels(file: str, num_samples: int, num_classes: int) -> torch.Tensor:
    """Sets of right classes: a JSON list with one list of class indices for each sample, in the samples' order.

    Returns:
        bool `[num_samples, num_classes]`; a row without any class is a sample that does not count.

    Raises:
        BadInput: no such file, or contents of another form or length; named.
    """
    try:
        lists = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(lists, list) or len(lists) != num_samples:
        raise BadInput(f"{file}: must be a list of {num_samples} lists of classes, one for each sample")
    right = torch.zeros(num_samples, num_classes, dtype=torch.bool)
    for i, classes in enumerate(lists):
        if not isinstance(classes, list) or not all(type(c) is int and 0 <= c < num_classes for c in classes):
            raise BadInput(f"{file}: entry {i} is {classes}, must be a list of classes from 0 to {num_classes - 1}")
        right[i, classes] = True
    return right


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    autocast: Callable,
    flip_average: bool = False,
    multilabels: torch.Tensor | None = None,
) -> dict[str, float]:
    """Run `model` over a validation set once.

    Args:
        model: images `[B, 3, S, S]` -> logits `[B, C]`.
        batches: of images uint8 `[B, S, S, 3]` and labels int64 `[B, 1]`, in the file's order.
        device: where the model is.
        autocast: makes the context of the forward pass.
        flip_average: average the logits with those of the mirrored images.
        multilabels: bool `[N, C]`, the right classes of each sample.

    Returns:
        `top_1`, `top_5` and, with `multilabels`, `multilabel` (share of predictions that are one of the right
        classes), all in percent; `loss`, the cross-entropy; `images`, how many there were.
    """
    model.eval()
    predictions, sums = [], torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in tqdm(batches, desc="evaluate", leave=False, disable=None, dynamic_ncols=True):
        images, labels = normalize(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True).view(-1)
        with autocast():
            logits = model(images)
            if flip_average:
                logits = (logits + model(images.flip(3))) / 2
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        right = best == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([right[:, 0].sum().double(), right.sum().double(), loss.double()])
        predictions.append(best[:, 0])
    predictions = torch.cat(predictions).cpu()
    top_1, top_5, loss = (sums / len(predictions)).tolist()
    results = {"top_1": 100 * top_1, "top_5": 100 * top_5, "loss": loss, "images": len(predictions)}
    if multilabels is not None:
        counted = multilabels.any(1)
        hit = multilabels.gather(1, predictions[:, None]).squeeze(1)[counted]
        results["multilabel"] = 100 * hit.double().mean().item()
    return results
