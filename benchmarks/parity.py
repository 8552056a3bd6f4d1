"""How far this code is from the official project's, part by part, same inputs and draws: the table of docs/parity.md.

    python -m benchmarks.parity

The official computations (naver-ai/relabel_imagenet, commit 3e19ffb) are written here from what they compute, with the
calls that they use: torchvision's `roi_align`, transforms and networks, torch's SGD, PIL. AdamP is timm's, in place of
the package `adamp`. Whatever is drawn at random is compared by distribution, or with the draws of ours.
"""

import math
import platform
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.optim
import torch
import torchvision
import torchvision.transforms.functional as TF
from ffcv_fields import CropSampler, label_pooling, pack_label_map
from ffcv.libffcv import imdecode
from PIL import Image
from scipy.stats import ks_2samp
from skimage import data
from torch import nn
from torchvision.transforms import CenterCrop, ColorJitter, RandomResizedCrop, Resize

from relabel.data.apart import pack_apart
from relabel.data.reading import Reading, validation_loader
from relabel.data.settings import Packing
from relabel.models import build_model
from relabel.normalization import IMAGENET_MEAN, IMAGENET_STD
from relabel.processes import join
from relabel.training.augment import PCA_VALUES, PCA_VECTORS, augment, cutmix
from relabel.training.optim import build_optimizer, learning_rate, set_learning_rate

from .decoding import crop, jpegs_of
from .label_pooling import inputs, official

SIZES = [(375, 500), (500, 375), (333, 500), (400, 400), (60, 400), (400, 30), (1200, 1600)]
STEPS_AN_EPOCH = math.ceil(1_281_167 / 1024)  # officially with the last, partial batch


@dataclass(frozen=True)
class Recipe:
    """What the two official recipes differ in."""

    optimizer: str
    lr: float
    weight_decay: float
    cutmix: bool


RELABEL, RELABEL_CUTMIX = Recipe("sgd", 0.1, 1e-4, False), Recipe("adamp", 2e-3, 1e-2, True)


def greatest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(((a.astype(float) - b.astype(float)) ** 2).mean(), 1e-12))


# --- labels ---------------------------------------------------------------------------------------------------


def maps_of_objects(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and classes `[count, 5, 15, 15]`: of eight classes an image, so that crops have pronounced targets."""
    rng = np.random.default_rng(1)
    objects = rng.permuted(np.arange(1000)[None].repeat(count, 0), axis=1)[:, :8]
    places = rng.random((count, 8, 15, 15)).argsort(1)[:, :5]
    return rng.normal(10, 4, places.shape).astype(np.float32), objects[np.arange(count)[:, None, None, None], places]


def labels(count: int, score_dtype: str = "float32") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps as the official files hold them, the same packed, and crop boxes of 500 x 375 images."""
    scores, classes = maps_of_objects(count)
    packed = np.stack([pack_label_map(s, c, score_dtype) for s, c in zip(scores, classes, strict=True)])
    _, _, boxes = inputs(count)
    return torch.from_numpy(np.stack([scores, classes.astype(np.float32)], 1)), torch.from_numpy(packed), boxes


def pooling(score_dtype: str) -> str:
    """Of 256 images, from maps and boxes to targets; scores are float32 before they are packed."""
    maps, packed, boxes = labels(256, score_dtype)
    return f"{greatest(official(maps, boxes), label_pooling(packed, boxes, 1000)):.1e}"


def official_cutmix(images: torch.Tensor, targets: torch.Tensor, rng: np.random.Generator) -> tuple:
    """With beta 1 and probability 1; `rng` is asked in the order in which ours asks it."""
    rng.random()
    height, width = images.shape[2:]
    cut = math.sqrt(1 - rng.beta(1.0, 1.0))
    cut_h, cut_w = int(height * cut), int(width * cut)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    (y1, y2), (x1, x2) = (
        np.clip([at - side // 2, at + side // 2], 0, end) for at, side, end in ((y, cut_h, height), (x, cut_w, width))
    )
    other = torch.from_numpy(rng.permutation(len(images)))
    lam = float(1 - (y2 - y1) * (x2 - x1) / (height * width))
    images[:, :, y1:y2, x1:x2] = images[other][:, :, y1:y2, x1:x2]
    return images, lam * targets + (1 - lam) * targets[other]


def cutmix_batches() -> str:
    worst = 0.0
    for seed in range(200):
        images = torch.randn(16, 3, 45, 64, generator=torch.Generator().manual_seed(seed))
        targets = torch.randn(16, 100, generator=torch.Generator().manual_seed(seed)).softmax(1)
        ours = cutmix(images.clone(), targets, np.random.default_rng(seed), 1.0, 1.0)
        theirs = official_cutmix(images.clone(), targets, np.random.default_rng(seed))
        worst = max(worst, *(greatest(a, b) for a, b in zip(ours, theirs, strict=True)))
    return f"{worst:.1e}"


# --- optimization ---------------------------------------------------------------------------------------------


def official_lr(epoch: int, iteration: int, recipe: Recipe) -> float:
    """300 epochs, 5 of warm-up from 0, then half a cosine."""
    if epoch < 5:
        return recipe.lr * (iteration + epoch * STEPS_AN_EPOCH) / (5 * STEPS_AN_EPOCH)
    done = (iteration + (epoch - 5) * STEPS_AN_EPOCH) / (295 * STEPS_AN_EPOCH)
    return recipe.lr * (np.cos(np.pi * done) + 1) / 2


def schedule(recipe: Recipe) -> str:
    """At every step, of as many an epoch as there are officially."""
    worst = 0.0
    for epoch in range(300):
        for i in range(STEPS_AN_EPOCH):
            ours = learning_rate(epoch + i / STEPS_AN_EPOCH, 300, recipe.lr, "cos", 0.0, 5)
            worst = max(worst, abs(ours - official_lr(epoch, i, recipe)))
    return f"{worst:.1e}"


def official_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters, decay = network.parameters(), recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, momentum=0.9, weight_decay=decay, nesterov=True)
    return timm.optim.AdamP(parameters, recipe.lr, betas=(0.9, 0.999), weight_decay=decay, nesterov=True)


def our_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return build_optimizer(network, recipe.optimizer, recipe.lr, 0.9, True, recipe.weight_decay, True)


def optimizer_steps(recipe: Recipe) -> str:
    """50 steps with the same random gradients; float64."""
    networks = [torchvision.models.resnet18(num_classes=10).double() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [make(n, recipe) for make, n in zip((our_optimizer, official_optimizer), networks, strict=True)]
    for seed in range(50):
        for network, optimizer in zip(networks, optimizers, strict=True):
            generator = torch.Generator().manual_seed(seed)
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
    return f"{weights_apart(*networks):.1e}"


def weights_apart(ours: nn.Module, theirs: nn.Module) -> float:
    states = ours.state_dict(), theirs.state_dict()
    assert states[0].keys() == states[1].keys()
    return max(greatest(states[0][k], v) for k, v in states[1].items() if v.is_floating_point())


def training_steps(recipe: Recipe) -> str:
    """Six steps of ResNet-18 at 64 px in float64 from epoch 3 on: weights and batch norm's statistics afterwards.

    Both have our targets: a difference of 1e-6 in them turns some ReLUs, and the networks are soon far apart.
    """
    theirs = torchvision.models.resnet18().double().train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.eps = 1 - 0.9, 1e-5
    ours = build_model("resnet18", 1000, 1 - 0.9, 1e-5).double().train()
    ours.load_state_dict(theirs.state_dict())
    optimizers = our_optimizer(ours, recipe), official_optimizer(theirs, recipe)
    _, packed, boxes = labels(6 * 8)
    for step in range(6):
        part = slice(8 * step, 8 * step + 8)
        images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(step)).double()
        pooled = label_pooling(packed[part], boxes[part], 1000).double()
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            x, t, rng = images.clone(), pooled, np.random.default_rng(step)
            if recipe.cutmix:
                x, t = cutmix(x, t, rng, 1.0, 1.0) if network is ours else official_cutmix(x, t, rng)
            if network is ours:
                lr = learning_rate(3 + step / STEPS_AN_EPOCH, 300, recipe.lr, "cos", 0.0, 5)
                loss = nn.functional.cross_entropy(network(x), t, label_smoothing=0.0)
            else:
                lr = official_lr(3, step, recipe)
                loss = (-t * nn.functional.log_softmax(network(x), -1)).sum(-1).mean()
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return f"{weights_apart(ours, theirs):.1e}"


# --- images ---------------------------------------------------------------------------------------------------


def kolmogorov_smirnov(pairs: list[tuple[Any, Any]]) -> str:
    values = [ks_2samp(ours, theirs).pvalue for ours, theirs in pairs]
    return f"{len(values)} KS tests, least p {min(values):.2g}"


def crops() -> str:
    """4,000 crops of each of seven image sizes: y, x, height, width."""
    sample, _ = CropSampler(0).compile()
    torch.manual_seed(0)
    pairs: list[tuple[Any, Any]] = []
    for height, width in SIZES:
        ours = np.array([sample(i, height, width) for i in range(4000)])
        image = torch.empty(3, height, width)
        theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
        pairs += zip(ours.T, np.array(theirs).T, strict=True)
    return kolmogorov_smirnov(pairs)


def colors() -> str:
    """2,000 draws of color jitter and lighting on each of four photographs: mean and deviation of each channel."""
    torch.manual_seed(0)
    vectors, values = torch.tensor(PCA_VECTORS), torch.tensor(PCA_VALUES)
    jitter, pairs = ColorJitter(0.4, 0.4, 0.4), []
    for photograph in photographs():
        small = torch.from_numpy(np.array(photograph.resize((12, 12))))
        ours = augment(small.expand(2000, -1, -1, -1).contiguous(), np.random.default_rng(0), 0.4, 0.1, torch.float32)
        image = small.permute(2, 0, 1) / 255
        theirs = []
        for _ in range(2000):
            shift = (vectors * torch.randn(3) * 0.1 * values).sum(1)
            theirs.append(TF.normalize(jitter(image) + shift[:, None, None], list(IMAGENET_MEAN), list(IMAGENET_STD)))
        stacks = ours, torch.stack(theirs)
        for statistic in (torch.mean, torch.std):
            a, b = (statistic(stack, dim=(2, 3)).numpy() for stack in stacks)
            pairs += zip(a.T, b.T, strict=True)
    return kolmogorov_smirnov(pairs)


def photographs() -> list[Image.Image]:
    """Four, as the packer stores them: the longest side 500 pixels."""
    found = [Image.fromarray(p()) for p in (data.chelsea, data.astronaut, data.coffee, data.rocket)]
    for photograph in found:
        photograph.thumbnail((500, 500), Image.Resampling.LANCZOS)
    return found


def jpeg_pixels(fast: bool) -> str:
    """A 224 x 224 region of each photograph's JPEG, not resized, against PIL's decoder."""
    apart, levels = [], []
    for photograph in photographs():
        (plain, marked), (width, height) = jpegs_of(photograph), photograph.size
        with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
            file.write(plain.tobytes())
            file.flush()
            theirs = np.array(Image.open(file.name).convert("RGB"))[48:272, 64:288]
        if fast:
            ours = np.empty((224, 224, 3), np.uint8)
            crop(marked, photograph.size, (48, 64, 224, 224), ours)
        else:
            full = np.empty((height, width, 3), np.uint8)
            imdecode(plain, full, height, width, height, width, 0, 0, 1, 1, False, False)
            ours = full[48:272, 64:288]
        apart.append(psnr(ours, theirs))
        levels.append(np.abs(ours.astype(float) - theirs).mean())
    return f"{np.mean(apart):.1f} dB, {np.mean(levels):.2f} of 255 on average"


def validation_pixels() -> str:
    """Each photograph through a `.beton` of raw pixels and the validation loader, against Resize(256), CenterCrop."""
    with tempfile.TemporaryDirectory() as folder:
        for i, photograph in enumerate(photographs()):
            place = Path(folder) / "images" / f"class{i}"
            place.mkdir(parents=True)
            photograph.save(place / "0.png")
        path = f"{folder}/val.beton"
        with redirect_stdout(sys.stderr):
            pack_apart(Packing(data_dir=f"{folder}/images", write_path=path, write_mode="raw", order="sorted"))
            loader = validation_loader(path, Reading(4, join(-1, "gloo"), num_workers=1), 4, 224, 0.875)
        (images,) = (batch.images.clone() for batch in loader)
    if images.dtype != torch.uint8:
        images = (images * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)) * 255
    official_crop = torchvision.transforms.Compose([Resize(math.ceil(224 / 0.875)), CenterCrop(224)])
    found = [psnr(i.numpy(), np.array(official_crop(p))) for i, p in zip(images, photographs(), strict=True)]
    return f"{np.mean(found):.1f} dB, the least {np.min(found):.1f} dB"


ROWS: list[tuple[str, str, Callable[[], str]]] = [
    ("LabelPooling, float32 maps", "targets, greatest difference", lambda: pooling("float32")),
    ("LabelPooling, float16 maps", "targets, greatest difference", lambda: pooling("float16")),
    ("CutMix, 200 batches, same draws", "images and targets, greatest difference", cutmix_batches),
    ("AdamP, 50 steps, float64", "weights, greatest difference", lambda: optimizer_steps(RELABEL_CUTMIX)),
    ("SGD, 50 steps, float64", "weights, greatest difference", lambda: optimizer_steps(RELABEL)),
    ("learning rate, 300 epochs, SGD recipe", "greatest difference", lambda: schedule(RELABEL)),
    ("learning rate, 300 epochs, AdamP recipe", "greatest difference", lambda: schedule(RELABEL_CUTMIX)),
    ("six steps, ReLabel, same targets, float64", "weights", lambda: training_steps(RELABEL)),
    ("six steps, + CutMix, same targets, float64", "weights", lambda: training_steps(RELABEL_CUTMIX)),
    ("random crops", "distribution", crops),
    ("color jitter and lighting", "distribution", colors),
    ('JPEG, decode="fast"', "pixels against PIL", lambda: jpeg_pixels(True)),
    ('JPEG, decode="exact"', "pixels against PIL", lambda: jpeg_pixels(False)),
    ("validation, raw pixels", "pixels against Resize and CenterCrop", validation_pixels),
]


def main() -> None:
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    print(f"{platform.machine()}, CPU, Python {platform.python_version()}, {versions}, Pillow {Image.__version__}\n")
    print("| part | what is compared | official against ours |\n|---|---|---|")
    for what, measure, compute in ROWS:
        print(f"| {what} | {measure} | {compute()} |", flush=True)


if __name__ == "__main__":
    main()
