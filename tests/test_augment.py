"""Color augmentation against torchvision's operations, CutMix, the loss."""

import ctypes

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from cuda_tools import ARCHITECTURES, compile_for_gpu, load_for_host
from ffcv_fields.cuda import OUT_MACROS
from torchvision.transforms import ColorJitter

from relabel.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize
from relabel.training.augment import (
    _STATISTICS,
    CUDA_SOURCE,
    apply_draws,
    augment,
    cutmix,
)


def pictures(batch=6, size=24, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), dtype=np.uint8))


def test_normalize_is_torchvision_s():
    images = pictures()
    expected = TF.normalize(images.permute(0, 3, 1, 2) / 255, IMAGENET_MEAN, IMAGENET_STD)
    ours = normalize(images)
    assert torch.allclose(ours, expected, atol=1e-5) and ours.is_contiguous(memory_format=torch.channels_last)


ORDERS = [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)]


def some_draws(order):
    rng = np.random.default_rng(1)
    draws = np.empty((6, 9), np.float32)
    draws[:, :3], draws[:, 3:6], draws[:, 6:] = rng.uniform(0.6, 1.4, (6, 3)), order, rng.normal(0, 0.02, (6, 3))
    return draws


@pytest.mark.parametrize("order", ORDERS)
def test_augmentation_with_given_draws_is_torchvision_s(order):
    operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    images, draws = pictures(), some_draws(order)
    ours = apply_draws(images, draws, torch.float32)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    for image, draw, result in zip(images, draws, ours, strict=True):
        expected = image.permute(2, 0, 1) / 255
        for which in order:
            expected = operations[which](expected, float(draw[which]))
        expected = TF.normalize(expected + torch.from_numpy(draw[6:])[:, None, None], IMAGENET_MEAN, IMAGENET_STD)
        assert torch.allclose(result, expected, atol=1e-3)  # torchvision's gray is 0.2989, 0.587, 0.114


@pytest.mark.parametrize("dtype", OUT_MACROS)
def test_the_cuda_source_compiles_and_agrees_with_its_cpu_counterpart(tmp_path, dtype):
    for architecture in ARCHITECTURES:
        compile_for_gpu(CUDA_SOURCE, architecture, OUT_MACROS[dtype])
    main = tmp_path / "main.cpp"
    main.write_text(
        f"""
        #include "{CUDA_SOURCE}"
        extern "C" void run(const unsigned char *images, const float *draws, const float *statistics, OUT_T *out,
                            int batch, int pixels) {{
          launch(batch, 64, [=] {{ augment(images, draws, statistics, out, pixels); }});
        }}
        """
    )
    library = load_for_host(main, tmp_path / "main.so", OUT_MACROS[dtype])
    images = pictures()
    for order in ORDERS:
        draws, out = some_draws(order), torch.empty(images.shape, dtype=dtype)
        pointers = [images.data_ptr(), draws.ctypes.data, _STATISTICS.ctypes.data, out.data_ptr()]
        library.run(*map(ctypes.c_void_p, pointers), 6, 24 * 24)
        on_cpu = apply_draws(images, draws, torch.float32)
        assert torch.allclose(out.permute(0, 3, 1, 2).float(), on_cpu, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", OUT_MACROS)
def test_on_a_gpu_augmentation_agrees_with_the_cpu(dtype):
    for order in ORDERS:
        draws = some_draws(order)
        ours = apply_draws(pictures().cuda(), draws, dtype).float().cpu()
        on_cpu = apply_draws(pictures(), draws, torch.float32)
        assert torch.allclose(ours, on_cpu, atol=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", OUT_MACROS)
def test_on_a_gpu_normalization_in_one_kernel_agrees_with_the_cpu(dtype):
    ours, cpu = normalize(pictures().cuda(), dtype), normalize(pictures())
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours.float().cpu(), cpu, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_augmented_images_are_distributed_as_torchvision_s():
    from scipy.stats import ks_2samp  # not in the GPU kit

    images = pictures(600, 8)
    rng = np.random.default_rng(0)
    ours = augment(images, rng, 0.4, 0.0, torch.float32)
    torch.manual_seed(0)
    transform = ColorJitter(0.4, 0.4, 0.4)
    theirs = torch.stack([transform(i.permute(2, 0, 1) / 255) for i in images])
    theirs = TF.normalize(theirs, IMAGENET_MEAN, IMAGENET_STD)
    for statistic in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)), lambda x: x[:, 0].mean((1, 2))):
        assert ks_2samp(statistic(ours).numpy(), statistic(theirs).numpy()).pvalue > 1e-3


def test_lighting_shifts_each_image_along_the_principal_colors():
    images = pictures(400, 4)
    shift = (augment(images, np.random.default_rng(0), 0.0, 0.1, torch.float32) - normalize(images)).mean((2, 3))
    shift = shift * torch.tensor(IMAGENET_STD)
    vectors = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    along = shift @ vectors
    assert torch.allclose(along.std(0), torch.tensor([0.02175, 0.00188, 0.00045]), rtol=0.12)


def test_augmentation_depends_on_the_generator_alone():
    a, b = (augment(pictures(), np.random.default_rng([3, 1, 2]), 0.4, 0.1, torch.float32) for _ in range(2))
    assert torch.equal(a, b)


def test_cutmix_mixes_targets_by_the_pasted_area():
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 32, 32)
    targets = torch.eye(8)
    pasted = []
    for seed in range(200):
        mixed, soft = cutmix(images.clone(), targets, np.random.default_rng(seed), 1.0, 1.0)
        assert torch.allclose(soft.sum(1), torch.ones(8))
        for i in range(8):
            shares = torch.bincount(mixed[i, 0].long().flatten(), minlength=8) / 1024
            assert torch.allclose(shares, soft[i], atol=1e-6)
        pasted.append(1 - soft.max(1).values.min().item())
    assert np.mean(pasted) > 0.1


def test_cutmix_is_off_at_probability_0_and_beta_0():
    images, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
    for prob, beta in ((0.0, 1.0), (1.0, 0.0)):
        mixed, soft = cutmix(images.clone(), targets, np.random.default_rng(0), prob, beta)
        assert torch.equal(mixed, images) and torch.equal(soft, targets)
