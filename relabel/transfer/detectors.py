"""torchvision's Faster R-CNN and Mask R-CNN on the backbone of a trained network.

As torchvision's own builders make them: a feature pyramid on the four stages of a ResNet (torchvision's, timm's), batch
norm frozen with the statistics that it was trained to. The images are normalized by the mean and the standard deviation
that the backbone was trained with.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from ..checkpoints import plain_names, read_checkpoint, saved_settings
from ..errors import BadInput
from ..models import build_model, load_weights, published_model
from ..normalization import IMAGENET_MEAN, IMAGENET_STD
from .settings import Data, Model

RESNETS = (  # torchvision's, for a checkpoint that does not say what it is
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
STAGES = ("layer1", "layer2", "layer3", "layer4")
FROM_LAST = ("layer4", "layer3", "layer2", "layer1", "conv1")  # how many of them are trained: model.trainable_layers
PUBLISHED, RANDOM = "published", "random"


@dataclass(frozen=True)
class Backbone:
    """A classifier to take the stages of, its architecture, and the SHA-256 of its weights; `said`: how it came."""

    network: nn.Module
    arch: str
    digest: str
    said: str


def load_backbone(weights: str, arch: str) -> Backbone:
    """A ResNet with the weights that `model.weights` names; with random ones its batch norm is trained.

    Args:
        weights: a checkpoint, "published" or "random".
        arch: a ResNet of torchvision, or `timm/NAME` of one; "auto": what the checkpoint's run says.

    Raises:
        BadInput: no such checkpoint, one of another architecture, or none that says which it is.
    """
    if weights in (PUBLISHED, RANDOM):
        if arch == "auto":
            raise BadInput(f"model.weights={weights} needs model.arch, e.g. --model.arch=resnet50")
        network = published_model(arch, 1000) if weights == PUBLISHED else build_model(arch, 1000)
        said = f"{arch}, {weights} weights"
    else:
        network, arch, said = _trained(weights, arch)
    if not all(isinstance(getattr(network, name, None), nn.Module) for name in (*FROM_LAST, "fc")):
        raise BadInput(f"model.arch is {arch}, whose stages are not a ResNet's ({', '.join(FROM_LAST[::-1])})")
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if weights != RANDOM:
        _freeze_batch_norm(network)
    return Backbone(network, arch, digest.hexdigest(), said)


def _trained(weights: str, arch: str) -> tuple[nn.Module, str, str]:
    run = saved_settings(weights)
    trained_as = run.get("model.arch")
    if arch == "auto":
        if not trained_as:
            raise BadInput(f"{weights}: does not say what it is; give --model.arch, e.g. --model.arch=resnet50")
        arch = trained_as
    elif trained_as not in (None, arch):
        raise BadInput(f"{weights}: was trained as {trained_as}; model.arch is {arch}")
    state, _ = read_checkpoint(weights)
    state = plain_names(state, ["fc.weight"])
    if "fc.weight" not in state:
        raise BadInput(f"{weights}: has no fc.weight: not the weights of a ResNet classifier, as {arch} would be")
    blurred = any(key.endswith(".blur_filter") for key in state)
    eps = float(run.get("optim.bn.eps", 1e-5))
    network = build_model(arch, state["fc.weight"].shape[0], bn_eps=eps, use_blurpool=blurred)
    try:
        said = load_weights(network, weights)
    except BadInput as error:
        fitting = [other for other in RESNETS if _fits(other, state, blurred)]
        raise BadInput(f"{error}; it is of a {' or '.join(fitting)}: --model.arch" if fitting else str(error)) from None
    return network, arch, "; ".join(filter(None, (f"{weights}: {arch}", said, "BlurPool" if blurred else "")))


def _fits(arch: str, state: dict[str, torch.Tensor], blurred: bool) -> bool:
    with torch.device("meta"):
        own = build_model(arch, state["fc.weight"].shape[0], use_blurpool=blurred).state_dict()
    return {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in state.items()}


def _freeze_batch_norm(module: nn.Module) -> None:
    """Put fixed statistics, scales and shifts in place of every batch norm, with the same values and epsilon."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child)


def build_detector(model: Model, data: Data, network: nn.Module, num_classes: int) -> FasterRCNN:
    """A detector on a ResNet: images float `[3, H, W]` in 0..1 -> boxes, labels, scores and, of Mask R-CNN, masks.

    Args:
        network: as `load_backbone` gives it; its stages become the detector's.
        num_classes: without the background.
    """
    backbone = _pyramid(network, model)
    channels, width = model.channels, 4 * model.channels
    sizes = tuple((model.anchor_size * 2**level,) for level in range(len(STAGES) + 1))
    parts = {
        "min_size": data.min_size,
        "max_size": data.max_size,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_head": TwoMLPHead(channels * 7**2, width),
        "box_predictor": FastRCNNPredictor(width, num_classes + 1),
        "box_batch_size_per_image": model.rois,
    }
    if model.detector == "faster_rcnn":
        return FasterRCNN(backbone, **parts)
    head = MaskRCNNHeads(channels, [channels] * 4, 1)
    return MaskRCNN(
        backbone, **parts, mask_head=head, mask_predictor=MaskRCNNPredictor(channels, channels, 1 + num_classes)
    )


def _pyramid(network: nn.Module, model: Model) -> BackboneWithFPN:
    trained = FROM_LAST[: len(FROM_LAST) if model.weights == RANDOM else model.trainable_layers]
    everything = len(trained) == len(FROM_LAST)  # the first batch norm too
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(everything or name.startswith(trained))
    stages = {stage: str(i) for i, stage in enumerate(STAGES)}
    body = IntermediateLayerGetter(network, stages)
    with torch.no_grad():
        maps = body.eval()(torch.zeros(1, 3, 64, 64))
    return BackboneWithFPN(network, stages, [values.shape[1] for values in maps.values()], model.channels)


def save_detector(detector: nn.Module, file: Path) -> None:
    """Write the state dict as torchvision's detectors load it."""
    torch.save({name: value.detach().cpu().clone() for name, value in detector.state_dict().items()}, file)
