"""What happens to a batch between loader and network: colour augmentation, normalization, CutMix, soft targets.

All random numbers come from a generator that the caller seeds with (seed, epoch, iteration): a restarted run draws
what the uninterrupted one drew, on whatever device.
"""

import numpy as np
import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision
# Eigenvalues and eigenvectors (columns) of ImageNet's RGB covariance (Krizhevsky et al., NeurIPS 2012).
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def normalize(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 `[B, S, S, 3]` RGB -> `[B, 3, S, S]` of `dtype`, channels last, ImageNet's mean 0 and deviation 1."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device) * 255
    inverse_std = 1 / (torch.tensor(IMAGENET_STD, device=images.device) * 255)
    return ((images - mean) * inverse_std).to(dtype).permute(0, 3, 1, 2)


def augment(
    images: torch.Tensor, rng: np.random.Generator, color_jitter: float, lighting: float, dtype: torch.dtype
) -> torch.Tensor:
    """The official recipe's colour augmentation, then `normalize`.

    Per sample: brightness, contrast and saturation, each by a factor uniform in `1 -/+ color_jitter`, in random
    order (torchvision's `ColorJitter(j, j, j)`); then PCA lighting with deviation `lighting`.

    Args:
        images: uint8 `[B, S, S, 3]`, RGB.
        rng: where the draws come from.
        color_jitter: 0 to 1; the paper's 0.4; 0: off.
        lighting: the paper's 0.1; 0: off.
        dtype: of the result.

    Returns:
        `[B, 3, S, S]` of `dtype`, channels last.
    """
    batch = len(images)
    if not color_jitter and not lighting:
        return normalize(images, dtype)
    pixels = images.float() / 255
    if color_jitter:
        factors = rng.uniform(max(0, 1 - color_jitter), 1 + color_jitter, (batch, 3)).astype(np.float32)
        order = rng.random((batch, 3)).argsort(axis=1)
        pixels = jitter(pixels, torch.from_numpy(factors).to(images.device), torch.from_numpy(order).to(images.device))
    if lighting:
        alpha = rng.normal(0, lighting, (batch, 3)).astype(np.float32)
        shift = (alpha * np.float32(PCA_VALUES)) @ np.float32(PCA_VECTORS).T
        pixels = pixels + torch.from_numpy(shift).to(images.device)[:, None, None, :]
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)
    inverse_std = 1 / torch.tensor(IMAGENET_STD, device=images.device)
    return ((pixels - mean) * inverse_std).to(dtype).permute(0, 3, 1, 2)


def jitter(pixels: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of each sample, in its own order.

    Each is a blend `f * pixels + (1 - f) * base`, clamped to 0..1, with base 0, the image's mean gray, and each
    pixel's gray.

    Args:
        pixels: float `[B, S, S, 3]`, 0..1.
        factors: `[B, 3]`: of brightness, contrast, saturation.
        order: `[B, 3]`: which of the three (0, 1, 2) is first, second, third.
    """
    gray_weights = torch.tensor(GRAY, device=pixels.device)
    for place in range(3):
        which = order[:, place]
        factor = factors.gather(1, which[:, None])[:, :, None, None]
        which = which[:, None, None, None]
        gray = (pixels @ gray_weights)[..., None]
        base = torch.where(which == 1, gray.mean((1, 2), keepdim=True), gray) * (which != 0)
        pixels = (factor * pixels + (1 - factor) * base).clamp(0, 1)
    return pixels


def smooth(targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Label smoothing of soft targets `[B, C]`: a share `smoothing` is spread evenly over all classes."""
    return targets * (1 - smoothing) + smoothing / targets.shape[1] if smoothing else targets


def cutmix(
    images: torch.Tensor, targets: torch.Tensor, rng: np.random.Generator, prob: float, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """CutMix (Yun et al., ICCV 2019): with probability `prob`, one box of every image from another of the batch.

    The box has area `1 - lam`, lam ~ Beta(beta, beta), and is cut at the border; the targets are mixed by the area
    that was really pasted: `lam * t_a + (1 - lam) * t_b`.

    Args:
        images: `[B, 3, H, W]`; written in place.
        targets: `[B, C]`, rows sum to 1.
    """
    if beta <= 0 or rng.random() >= prob:
        return images, targets
    height, width = images.shape[2:]
    side = np.sqrt(1 - rng.beta(beta, beta))
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = rng.integers(height), rng.integers(width)
    y1, y2 = max(y - half_h, 0), min(y + half_h, height)
    x1, x2 = max(x - half_w, 0), min(x + half_w, width)
    other = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    images[:, :, y1:y2, x1:x2] = images[other, :, y1:y2, x1:x2]
    lam = 1 - (y2 - y1) * (x2 - x1) / (height * width)
    return images, lam * targets + (1 - lam) * targets[other]


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`-(t * log_softmax(logits)).sum(1).mean()`, in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(1).mean()
