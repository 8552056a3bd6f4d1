"""The CUDA kernel: compiled for real GPUs, run as plain C++ against the reference, and on a GPU where there is one."""

import ctypes

import numpy as np
import pytest
import torch
from ffcv_fields import label_pooling
from ffcv_fields.label_map import NO_LABEL_MAP
from ffcv_fields.pooling import _MAP_MACROS, CUDA_SOURCE
from cuda_tools import compile_for_gpu, compile_for_host
from ffcv_fields.cuda import OUT_MACROS
from hypothesis import given, settings
from pooling_reference import problems, random_maps, reference

VARIANTS = [(m, o) for m in _MAP_MACROS for o in OUT_MACROS]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("map_dtype, out_dtype", VARIANTS)
def test_the_kernel_compiles_for_gpus(architecture, map_dtype, out_dtype):
    compile_for_gpu(CUDA_SOURCE, architecture, (_MAP_MACROS[map_dtype], *OUT_MACROS[out_dtype]))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """pool(maps, boxes, num_classes, ...) by the kernel's own source, compiled as C++."""
    folder = tmp_path_factory.mktemp("shim")
    main = folder / "shim.cpp"
    main.write_text(
        f"""
        #include "{CUDA_SOURCE}"
        extern "C" void run(const MAP_T *maps, const float *boxes, const long long *labels, OUT_T *targets,
                            float *workspace, int batch, int num_classes, int top_k, int height, int width,
                            float inverse_temperature, int softmax, int parts) {{
          for (blockIdx.x = 0; blockIdx.x < (unsigned)(batch * parts * parts); ++blockIdx.x)
            pool_labels(maps, boxes, labels, targets, workspace, num_classes, top_k, height, width,
                        inverse_temperature, softmax, parts);
        }}
        """
    )
    libraries = {}
    for map_dtype, out_dtype in VARIANTS:
        macros = (_MAP_MACROS[map_dtype], *OUT_MACROS[out_dtype])
        libraries[map_dtype, out_dtype] = compile_for_host(main, folder / f"{map_dtype}_{out_dtype}.so", macros)

    def pool(
        maps, boxes, num_classes, labels=None, temperature=1.0, out_dtype=torch.float32, global_memory=False,
        softmax=True, output_size=1,
    ):  # fmt: skip
        shape = (len(maps), output_size, output_size, num_classes)
        targets = torch.empty(shape if output_size > 1 else (len(maps), num_classes), dtype=out_dtype)
        workspace = torch.full((len(maps), num_classes), float("nan")) if global_memory else None
        pointers = [ctypes.c_void_p(a.data_ptr() if a is not None else None) for a in (labels, targets, workspace)]
        batch, _, top_k, height, width = maps.shape
        libraries[torch.from_numpy(maps).dtype, out_dtype].run(
            ctypes.c_void_p(maps.ctypes.data), ctypes.c_void_p(boxes.ctypes.data), *pointers,
            batch, num_classes, top_k, height, width, ctypes.c_float(1 / temperature), int(softmax), output_size,
        )  # fmt: skip
        return targets

    return pool


def test_the_kernel_s_arithmetic_agrees_with_roi_align(host):
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(problems())
    def check(problem):
        maps, boxes, num_classes = problem
        assert np.abs(host(maps, boxes, num_classes).numpy() - reference(maps, boxes, num_classes)).max() <= 1e-5

    check()


def test_the_second_path_for_many_classes_agrees(host):
    maps = random_maps(np.random.default_rng(0), 2, 60, 5, 15, 15, "float32")
    maps[:, 1] = np.where(maps[:, 1] >= 0, maps[:, 1] * 364, -1)
    boxes = np.array([[0.1, 0.2, 0.7, 0.5], [0, 0, 1, 1]], np.float32)
    ours = host(maps, boxes, 21841, temperature=1.5, global_memory=True).numpy()
    assert np.abs(ours - reference(maps, boxes, 21841, 1.5)).max() <= 1e-6


def test_grids_of_targets_and_probabilities_are_the_cpu_s(host):
    maps = random_maps(np.random.default_rng(0), 3, 60, 5, 18, 18, "float16")
    boxes = np.array([[0.1, 0.2, 0.7, 0.5], [0, 0, 1, 1], [-0.1, 0.4, 0.41, 1.2]], np.float32)
    for softmax in (True, False):
        ours = host(maps, boxes, 80, softmax=softmax, output_size=14).permute(0, 3, 1, 2)
        on_cpu = label_pooling(torch.from_numpy(maps), torch.from_numpy(boxes), 80, softmax=softmax, output_size=14)
        assert torch.allclose(ours, on_cpu, atol=1e-5)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_half_outputs_are_rounded_to_nearest(host, out_dtype):
    maps = random_maps(np.random.default_rng(0), 3, 50, 5, 15, 15, "float16")
    boxes = np.array([[0.2, 0.2, 0.9, 0.5]] * 3, np.float32)
    exact = host(maps, boxes, 50)
    assert torch.equal(host(maps, boxes, 50, out_dtype=out_dtype), exact.to(out_dtype))


def bad_samples():
    """Maps, boxes and labels of six samples: good, bad box three times, bad class, no label map; and one more."""
    maps = random_maps(np.random.default_rng(0), 7, 10, 5, 15, 15, "float16")
    boxes = np.array([[0.1, 0.1, 0.8, 0.8]] * 7, np.float32)
    boxes[1, 2], boxes[2, 0], boxes[3, 3] = np.nan, 0.9, 1e9
    maps[4, 1, 0, 7, 7] = 10
    maps[5:] = -1
    maps[5:, 1, 0, 0, 0] = NO_LABEL_MAP
    return maps, boxes, torch.tensor([0, 0, 0, 0, 0, 3, -1])


def check_bad_samples(targets):
    """Where raising would synchronize the device the row is NaN, which the loss shows."""
    assert torch.isfinite(targets[0]).all() and torch.isnan(targets[1:5]).all()
    assert torch.equal(targets[5], torch.eye(10)[3]) and torch.isnan(targets[6]).all()


def test_bad_samples_become_nan(host):
    maps, boxes, labels = bad_samples()
    check_bad_samples(host(maps, boxes, 10, labels=labels))


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@gpu
def test_on_a_gpu_agrees_with_roi_align():
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(problems())
    def check(problem):
        maps, boxes, num_classes = problem
        ours = label_pooling(torch.from_numpy(maps).cuda(), torch.from_numpy(boxes).cuda(), num_classes).cpu().numpy()
        assert np.abs(ours - reference(maps, boxes, num_classes)).max() <= 1e-5

    check()


@gpu
def test_on_a_gpu_bad_samples_become_nan_and_many_classes_agree():
    maps, boxes, labels = bad_samples()
    check_bad_samples(
        label_pooling(torch.from_numpy(maps).cuda(), torch.from_numpy(boxes).cuda(), 10, labels.cuda()).cpu()
    )
    maps = random_maps(np.random.default_rng(0), 2, 60, 5, 15, 15, "float16")
    for num_classes in (1000, 21841, 32767):
        ours = (
            label_pooling(torch.from_numpy(maps).cuda(), torch.from_numpy(boxes[5:]).cuda(), num_classes).cpu().numpy()
        )
        assert np.abs(ours - reference(maps, boxes[5:], num_classes)).max() <= 1e-5


@gpu
def test_on_a_gpu_in_a_cuda_graph_on_another_stream_and_compiled():
    maps = torch.from_numpy(random_maps(np.random.default_rng(0), 8, 60, 5, 15, 15, "float16")).cuda()
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.5]] * 8).cuda()
    expected = label_pooling(maps, boxes, 100)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = label_pooling(maps, boxes, 100)
    boxes.copy_(torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 8))
    graph.replay()
    assert torch.equal(captured, label_pooling(maps, boxes, 100)) and not torch.equal(captured, expected)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = label_pooling(maps, boxes, 100)
    stream.synchronize()
    assert torch.equal(other, captured)
    compiled = torch.compile(lambda m, b: label_pooling(m, b, 100) * 2, fullgraph=True)
    assert torch.allclose(compiled(maps, boxes), captured * 2)
