"""Settings of evaluate_imagenet.py. No library is imported here: settings are read before them."""

from dataclasses import dataclass

from ..settings import Choice, Files, Flag, Number, group, setting


@dataclass(frozen=True, kw_only=True)
class Model:
    """the network"""

    arch: str = setting(str, "a torchvision classifier, or timm/NAME", "resnet50")
    weights: str = setting(str, "its checkpoint, or published: torchvision's or timm's own")
    num_classes: int = setting(Number(2, 32767, whole=True), "classes", 1000)
    use_blurpool: bool = setting(Flag(), "it was trained with BlurPool", False)


@dataclass(frozen=True, kw_only=True)
class Data:
    """what to evaluate on: .beton files or folders; empty: not"""

    val: str = setting(Files(), "ImageNet's validation set: top-1, top-5", "")
    real: str = setting(str, "ReaL's real.json, for the images of data.val", "")
    multilabel_records: str = setting(str, "Shankar et al.'s human_accuracy_*.json, for the images of data.val", "")
    fgsm: float = setting(Number(0, 255), "FGSM on data.val: epsilon, a change of each pixel, of 255; 0: not", 0.0)
    imagenet_v2: str = setting(str, "ImageNetV2: a variant, or the folder of the three variants", "")
    imagenet_a: str = setting(str, "ImageNet-A: accuracy among its 200 classes", "")
    imagenet_r: str = setting(str, "ImageNet-R: the same", "")
    imagenet_o: str = setting(str, "ImageNet-O: AUPR of finding its images among data.val's of its classes", "")
    imagenet_c: str = setting(str, "ImageNet-C, CORRUPTION/SEVERITY/...: mean corruption error", "")
    imagenet_9: str = setting(str, "ImageNet-9 (Backgrounds Challenge), VARIATION/val/...: accuracy, BG-Gap", "")
    in9_map: str = setting(str, "the Backgrounds Challenge's in_to_in9.json, for data.imagenet_9", "")
    image_size: int = setting(Number(8, whole=True), "side of the center crop in pixels", 224)
    crop_ratio: float = setting(Number(0.1, 1), "side of the crop, fraction of the shorter side (-C, -9: 1)", 0.875)
    lr_tta: bool = setting(Flag(), "average with the horizontally flipped image", False)
    batch_size: int = setting(Number(1, whole=True), "images per step and process", 256)
    num_workers: int = setting(Number(0, whole=True), "decoding threads per machine; 0: most cores, 1 on CPU", 0)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """numbers"""

    precision: str = setting(Choice("fp32", "bf16", "fp16"), "of the forward pass", "fp32")
    gpu: int = setting(Number(-1, whole=True), "GPU index; -1: the first, or the process's own", -1)


@dataclass(frozen=True, kw_only=True)
class Output:
    """what is written"""

    folder: str = setting(str, "for evaluation.json and .csv", "")


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Model = group(Model)
    data: Data = group(Data)
    compute: Compute = group(Compute)
    output: Output = group(Output)
