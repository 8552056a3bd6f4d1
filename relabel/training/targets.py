"""The paper's core: the soft multi-label target of each random crop; and the losses of a network's answer to it."""

import torch
from ffcv_fields import label_pooling
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from ..data.loader import Batch


def soft_targets(
    batch: Batch,
    num_classes: int,
    *,
    localized: bool = True,
    multi: bool = True,
    temperature: float = 1.0,
) -> torch.Tensor:
    """LabelPooling (Yun et al., CVPR 2021, section 3.2); without label maps the single labels, one-hot.

    Args:
        localized: pool over each sample's crop; else over the full image (the paper's "global" labels).
        multi: the pooled distribution; else its best class alone.
        temperature: scores are divided by it before the softmax, which probabilities do not get.

    Returns:
        float32 `[B, num_classes]`, rows sum to 1.
    """
    if batch.label_maps is None or batch.crop_boxes is None:
        return one_hot(batch.labels, num_classes).float()
    boxes = batch.crop_boxes
    if not localized:
        boxes = torch.zeros_like(boxes)
        boxes[:, 2:] = 1
    softmax = batch.scores == "logits"
    targets = label_pooling(
        batch.label_maps, boxes, num_classes, batch.labels, temperature=temperature, softmax=softmax
    )
    return targets if multi else one_hot(targets.argmax(1), num_classes).float()


def soft_loss(logits: torch.Tensor, targets: torch.Tensor, kind: str, label_smoothing: float = 0.0) -> torch.Tensor:
    """The loss of a batch, mean of its samples.

    Args:
        logits: float32 `[B, C]`.
        targets: float32 `[B, C]`, 0..1.
        kind: "ce": cross-entropy of the softmax, the paper's. "bce": binary cross-entropy of each class's sigmoid,
            summed over the classes as the cross-entropy is (timm's `BinaryCrossEntropy` with `sum_classes`): the
            target of one class says nothing of another.
        label_smoothing: fraction of each target that is spread over all classes.
    """
    if kind == "ce":
        return cross_entropy(logits, targets, label_smoothing=label_smoothing)
    smoothed = targets * (1 - label_smoothing) + label_smoothing / targets.shape[1]
    return binary_cross_entropy_with_logits(logits, smoothed, reduction="sum") / len(logits)
