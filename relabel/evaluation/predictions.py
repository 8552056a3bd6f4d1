"""Accuracy of a network on a validation set: single-label top-1 and top-5, multi-label, and over subsets of classes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..data.folder_loader import FolderLoader
from ..data.loader import Loader
from ..normalization import normalize, on_device
from ..precision import Precision
from ..processes import all_reduce_sum, hide_progress

Network = Callable[[torch.Tensor], torch.Tensor]  # images `[B, 3, S, S]` -> logits `[B, C]`
Attack = Callable[[Network, torch.Tensor, torch.Tensor], torch.Tensor]  # network, images, labels -> images


@dataclass(frozen=True)
class Predictions:
    """What a network predicts for each sample of a set, in the file's order; the same in every process.

    `best`: its five best classes, best first, int64 `[N, 5]` (fewer where it has fewer); `confidence`: the first's
    probability, float32 `[N]`; `labels`: the single labels, int64 `[N]`; `loss`: the mean cross-entropy.
    """

    best: np.ndarray
    confidence: np.ndarray
    labels: np.ndarray
    loss: float

    def top(self, k: int) -> float:
        """Top-k accuracy in percent."""
        return 100 * float((self.best[:, :k] == self.labels[:, None]).any(1).mean())

    def multilabel(self, right: np.ndarray) -> float:
        """Fraction of the predictions that are among the correct classes, in percent.

        Args:
            right: bool `[N, C]`; samples without any correct class are not counted (as in ReaL).
        """
        counts = right.any(1)
        return 100 * float(self._hits(right)[counts].mean())

    def class_averaged_multilabel(self, right: np.ndarray, counts: np.ndarray) -> float:
        """The mean over classes of their samples' accuracy, in percent (Shankar et al., 2020).

        Args:
            right: bool `[N, C]`, the correct classes.
            counts: bool `[N]`, the samples that count; a sample's class is its single label.
        """
        samples = np.bincount(self.labels[counts])
        hits = np.bincount(self.labels[counts], self._hits(right)[counts])
        return 100 * float((hits[samples > 0] / samples[samples > 0]).mean())

    def grouped(self, groups: np.ndarray, right: np.ndarray) -> float:
        """Fraction of the predictions that are classes of the right group, in percent (as ImageNet-9 has nine).

        Args:
            groups: int64 `[C]`, the group of each class; -1: of none, which is never right.
            right: int64 `[N]`, each sample's group.
        """
        return 100 * float((groups[self.best[:, 0]] == right).mean())

    def _hits(self, right):
        return right[np.arange(len(self.best)), self.best[:, 0]]


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: Loader | FolderLoader,
    precision: Precision,
    flip_average: bool = False,
    classes: np.ndarray | None = None,
    attack: Attack | None = None,
) -> Predictions:
    """Run `model` over a validation set once, each process over its shard.

    Args:
        model: images `[B, 3, S, S]` -> logits `[B, C]`.
        loader: of a validation set, in order.
        precision: of the forward pass, on the model's device.
        flip_average: average the logits with those of the horizontally flipped images.
        classes: int64, the only classes that may be predicted (ImageNet-A, -R and -O have 200).
        attack: changes each batch's normalized images; it knows all that is predicted by, the flipped images too.
    """
    model.eval()

    def network(images: torch.Tensor) -> torch.Tensor:
        logits = model(images)
        return (logits + model(images.flip(3))) / 2 if flip_average else logits

    device = precision.device
    samples = on_device(loader.order_of(0), device)
    forbidden = None
    if classes is not None:
        forbidden = on_device(~np.isin(np.arange(loader.num_classes), classes), device)
    count = len(loader.labels)
    best = torch.zeros(count, min(5, loader.num_classes), dtype=torch.int64, device=device)
    confidence = torch.zeros(count, device=device)
    loss, done = torch.zeros((), dtype=torch.float64, device=device), 0
    batches = tqdm(loader.epoch(0), "evaluate", len(loader), leave=False, disable=hide_progress(), dynamic_ncols=True)
    for batch in batches:
        images, labels = (part.to(device, non_blocking=True) for part in (batch.images, batch.labels))
        images = normalize(images, precision.dtype)
        if attack:
            images = attack(network, images, labels)  # in float32: float16's gradients can become 0
        with precision.autocast():
            logits = network(images).float()
        if forbidden is not None:
            logits = logits.masked_fill(forbidden, -torch.inf)
        which = samples[done : done + len(labels)]
        best[which] = logits.topk(best.shape[1], dim=1).indices
        confidence[which] = logits.softmax(1).amax(1)
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
        done += len(labels)
    best_of_all, confidence_of_all = all_reduce_sum(best).cpu().numpy(), all_reduce_sum(confidence).cpu().numpy()
    return Predictions(best_of_all, confidence_of_all, np.asarray(loader.labels), all_reduce_sum(loss).item() / count)


def evaluate(
    model: nn.Module,
    loader: Loader | FolderLoader,
    precision: Precision,
    flip_average: bool = False,
    multilabels: np.ndarray | None = None,
) -> dict[str, float]:
    """Accuracy over a validation set; arguments as for `predict`.

    Args:
        multilabels: bool `[N, C]`, the correct classes of each sample.

    Returns:
        `top_1`, `top_5` and, with `multilabels`, `multilabel` (fraction of predictions that are one of the correct
        classes), all in percent; `loss`, the cross-entropy; `images`, how many there were.
    """
    predictions = predict(model, loader, precision, flip_average)
    results = {"top_1": predictions.top(1), "top_5": predictions.top(5)}
    results |= {"loss": predictions.loss, "images": len(predictions.labels)}
    if multilabels is not None:
        results["multilabel"] = predictions.multilabel(multilabels)
    return results


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision-recall curve, as average precision.

    Args:
        scores: float `[N]`, higher for what is predicted positive.
        positive: bool `[N]`.
    """
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    last = np.append(scores[1:] != scores[:-1], True)  # equal scores share one threshold
    found, seen = np.cumsum(positive)[last], (np.arange(len(scores)) + 1)[last]
    gained = np.diff(found, prepend=0)
    return float((gained * found / seen).sum() / positive.sum())
