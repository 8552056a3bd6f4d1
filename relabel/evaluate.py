"""Accuracy of a network on a validation set: single-label top-1 and top-5, and multi-label."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .augment import normalize
from .distributed import quiet, total
from .errors import BadInput
from .loading import Loader


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
def predict(
    model: nn.Module, loader: Loader, device: torch.device, autocast: Callable, flip_average: bool = False
) -> tuple[torch.Tensor, float]:
    """Run `model` over a validation set once, each process over its share of it.

    Args:
        model: images `[B, 3, S, S]` -> logits `[B, C]`.
        loader: sequential, of images uint8 `[B, S, S, 3]` (or float32, normalized) and labels int64 `[B, 1]`.
        device: where the model is.
        autocast: makes the context of the forward pass.
        flip_average: average the logits with those of the mirrored images.

    Returns:
        The five best classes of each sample of the file, best first, int64 `[N, 5]` on the CPU (fewer where the
        network has fewer classes), and the mean cross-entropy; the same in every process.
    """
    model.eval()
    samples = torch.from_numpy(loader.order_of(0)).to(device)
    best = torch.zeros(len(loader.labels), min(5, loader.num_classes), dtype=torch.int64, device=device)
    loss, done = torch.zeros((), dtype=torch.float64, device=device), 0
    batches = tqdm(loader.epoch(0), "evaluate", len(loader), leave=False, disable=quiet(), dynamic_ncols=True)
    for images, labels in batches:
        images, labels = normalize(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True).view(-1)
        with autocast():
            logits = model(images)
            if flip_average:
                logits = (logits + model(images.flip(3))) / 2
        logits = logits.float()
        best[samples[done : done + len(labels)]] = logits.topk(best.shape[1], dim=1).indices
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
        done += len(labels)
    return total(best).cpu(), total(loss).item() / len(loader.labels)


def evaluate(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    autocast: Callable,
    flip_average: bool = False,
    multilabels: torch.Tensor | None = None,
) -> dict[str, float]:
    """Accuracy over a validation set; arguments as for `predict`.

    Args:
        multilabels: bool `[N, C]`, the right classes of each sample.

    Returns:
        `top_1`, `top_5` and, with `multilabels`, `multilabel` (share of predictions that are one of the right
        classes), all in percent; `loss`, the cross-entropy; `images`, how many there were.
    """
    best, loss = predict(model, loader, device, autocast, flip_average)
    right = best == torch.from_numpy(loader.labels)[:, None]
    results = {
        "top_1": 100 * right[:, 0].double().mean().item(),
        "top_5": 100 * right.any(1).double().mean().item(),
        "loss": loss,
        "images": len(best),
    }
    if multilabels is not None:
        counted = multilabels.any(1)
        hit = multilabels.gather(1, best[:, :1]).squeeze(1)[counted]
        results["multilabel"] = 100 * hit.double().mean().item()
    return results
