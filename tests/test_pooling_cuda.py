"""The CUDA kernel: compiled for real GPUs, run as plain C++ against the reference, and on a GPU where there is one."""

import ctypes
import re
import subprocess

import numpy as np
import pytest
import torch
from ffcv_fields import label_pooling
from ffcv_fields.label_map import NO_LABEL_MAP
from ffcv_fields.pooling import _MAP_MACROS, CUDA_SOURCE
from cuda_tools import ARCHITECTURES, compile_for_gpu, compile_for_host, load_for_host, ptx_of
from ffcv_fields.cuda import OUT_MACROS, source_of
from hypothesis import given, settings
from pooling_reference import pooled_scores, problems, random_maps, reference

VARIANTS = [(m, o) for m in _MAP_MACROS for o in OUT_MACROS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_compiles_for_gpus(architecture):
    compile_for_gpu(CUDA_SOURCE, architecture, (_MAP_MACROS[torch.int16], *OUT_MACROS[torch.float32]))


@pytest.mark.parametrize("map_dtype, out_dtype", VARIANTS)
def test_every_variant_compiles(map_dtype, out_dtype):
    compile_for_gpu(CUDA_SOURCE, "sm_90", (_MAP_MACROS[map_dtype], *OUT_MACROS[out_dtype]))


def test_the_atomics_are_of_integers_in_shared_memory():
    ptx = ptx_of(CUDA_SOURCE, "compute_80", (_MAP_MACROS[torch.int16], *OUT_MACROS[torch.float32]))
    atomics = set(re.findall(r"\b(?:atom|red)\.[\w.]+", ptx))
    assert any(".shared." in name for name in atomics) and any(".global." in name for name in atomics)
    assert all((".shared." in name or ".global." in name) and name.endswith(".u32") for name in atomics), atomics


SHIM = """
#include "{source}"
extern "C" void run(const MAP_T *maps, const float *boxes, const long long *labels, OUT_T *targets, unsigned *workspace,
                    const int *sizes, float inverse_temperature, int threads) {{
  int batch = sizes[0], num_classes = sizes[1], top_k = sizes[2], height = sizes[3], width = sizes[4];
  int softmax = sizes[5], parts = sizes[6];
  launch(batch * parts * parts, threads, [=] {{
    pool_labels(maps, boxes, labels, targets, workspace, num_classes, top_k, height, width, inverse_temperature,
                softmax, parts);
  }});
}}
"""


class Host:
    """The kernel's own source, compiled as C++ for each pair of dtypes, a block being 64 threads."""

    def __init__(self, folder):
        main = folder / "shim.cpp"
        main.write_text(SHIM.format(source=CUDA_SOURCE))
        self._libraries = {}
        for map_dtype, out_dtype in VARIANTS:
            macros = (_MAP_MACROS[map_dtype], *OUT_MACROS[out_dtype])
            library = load_for_host(main, folder / f"{map_dtype}_{out_dtype}.so", macros)
            self._libraries[map_dtype, out_dtype] = library

    def __call__(self, maps, boxes, num_classes, *, labels=None, temperature=1.0, **options):
        out_dtype, parts = options.get("out_dtype", torch.float32), options.get("output_size", 1)
        batch, _, top_k, height, width = maps.shape
        targets = torch.empty((batch, parts, parts, num_classes), dtype=out_dtype)
        workspace = torch.full(targets.shape, -1, dtype=torch.int64) if options.get("global_memory") else None
        sizes = np.array([batch, num_classes, top_k, height, width, options.get("softmax", True), parts], np.int32)
        tensors = [a.data_ptr() if a is not None else None for a in (labels, targets, workspace)]
        self._libraries[torch.from_numpy(maps).dtype, out_dtype].run(
            *map(ctypes.c_void_p, [maps.ctypes.data, boxes.ctypes.data, *tensors, sizes.ctypes.data]),
            ctypes.c_float(1 / temperature), options.get("threads", 64),
        )  # fmt: skip
        return targets if parts > 1 else targets.view(batch, num_classes)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("shim"))


def test_the_sums_are_the_same_bits_however_many_threads_add_in_whatever_order(host):
    """Maps where classes repeat over many places, as real ones do."""
    maps = random_maps(np.random.default_rng(0), 4, 12, 5, 15, 15, "float16")
    boxes = np.array([[0.1, 0.2, 0.7, 0.5], [0, 0, 1, 1], [0.3, 0, 0.9, 1], [0, 0.5, 0.4, 0.9]], np.float32)
    logits = [host(maps, boxes, 12, softmax=False, threads=threads) for threads in (32, 64, 256, 256, 256)]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    targets = [host(maps, boxes, 12, threads=256) for _ in range(5)]
    assert all(torch.equal(targets[0], other) for other in targets[1:])


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_scores_of_any_size_are_summed_to_the_last_digits(host, size):
    rng = np.random.default_rng(0)
    maps = random_maps(rng, 3, 60, 5, 15, 15, "float32")
    scores = (np.ascontiguousarray(maps[:, 0]).view(np.float32) * np.float32(size)).astype(np.float32)
    maps[:, 0] = scores.view(np.int32)
    boxes = np.array([[0.1, 0.2, 0.7, 0.5], [0, 0, 1, 1], [0.3, 0, 0.9, 1]], np.float32)
    expected = pooled_scores(maps, boxes, 60, 1).flatten(1)
    ours = host(maps, boxes, 60, softmax=False)
    assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


MAIN = """
#include <cstdio>
int main(int, char **names) {{
  static int sizes[7];
  FILE *file = fopen(names[1], "rb");
  size_t got = fread(sizes, 4, 7, file);
  size_t entries = (size_t)sizes[0] * 2 * sizes[2] * sizes[3] * sizes[4], outputs = (size_t)sizes[0] * sizes[1];
  std::vector<MAP_T> maps(entries);
  std::vector<float> boxes(4 * sizes[0]);
  std::vector<OUT_T> targets(outputs);
  std::vector<unsigned> workspace(2 * outputs);
  got += fread(maps.data(), sizeof(MAP_T), entries, file) + fread(boxes.data(), 4, boxes.size(), file);
  for (int global = 0; global < 2; ++global)
    run(maps.data(), boxes.data(), nullptr, targets.data(), global ? workspace.data() : nullptr, sizes, 1.0f, 64);
  return got == 7 + entries + boxes.size() ? 0 : 1;
}}
"""


def races(folder, source):
    """What ThreadSanitizer says of a kernel's source: 24 blocks, in shared and in global memory."""
    (folder / "kernel.cu").write_text(source)
    (folder / "main.cpp").write_text(SHIM.format(source=folder / "kernel.cu") + MAIN.format())
    macros = (_MAP_MACROS[torch.int16], *OUT_MACROS[torch.float32])
    program = compile_for_host(folder / "main.cpp", folder / "main", macros, "-fsanitize=thread")
    maps = random_maps(np.random.default_rng(0), 24, 70, 5, 7, 7, "float16")
    boxes = np.array([[0.1, 0.2, 0.7, 0.5], [0, 0, 1, 1]] * 12, np.float32)
    sizes = np.array([24, 70, 5, 7, 7, 1, 1], np.int32)
    (folder / "input").write_bytes(sizes.tobytes() + maps.tobytes() + boxes.tobytes())
    result = subprocess.run([str(program), str(folder / "input")], capture_output=True, text=True, timeout=300)
    assert "data race" in result.stderr or result.returncode == 0, result.stderr
    return "data race" in result.stderr


def test_thread_sanitizer_finds_no_race(tmp_path):
    assert not races(tmp_path, source_of(CUDA_SOURCE))


BARRIER = "__syncthreads();"


@pytest.mark.parametrize("number", range(source_of(CUDA_SOURCE).count(BARRIER)))
def test_thread_sanitizer_finds_each_barrier_that_is_taken_out(tmp_path, number):
    parts = source_of(CUDA_SOURCE).split(BARRIER)
    source = BARRIER.join(parts[: number + 1]) + BARRIER.join(["", *parts[number + 1 :]]).removeprefix(BARRIER)
    assert source.count(BARRIER) == len(parts) - 2 and races(tmp_path, source)


def test_the_kernel_s_arithmetic_agrees_with_roi_align(host):
    @settings(max_examples=100, deadline=None, derandomize=True)
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
def test_on_a_gpu_every_run_gives_the_same_bits():
    maps = torch.from_numpy(random_maps(np.random.default_rng(0), 64, 12, 5, 15, 15, "float16")).cuda()
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.5]] * 64).cuda()
    first = label_pooling(maps, boxes, 12)
    assert all(torch.equal(label_pooling(maps, boxes, 12), first) for _ in range(50))


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
