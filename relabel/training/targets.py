"""The paper's core: the soft multi-label target of each random crop."""

import torch
from ffcv_fields import label_pooling
from torch.nn.functional import one_hot

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
