"""Compiling and launching the project's CUDA kernels on torch's memory and stream, through CuPy (the `gpu` extra)."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

# Contraction of a * b + c is off, so that a kernel rounds as its CPU counterpart does.
OPTIONS = ("--std=c++17", "--fmad=false")
OUT_MACROS = {
    torch.float32: ("-DOUT_BYTES=4",),
    torch.float16: ("-DOUT_BYTES=2",),
    torch.bfloat16: ("-DOUT_BYTES=2", "-DOUT_BFLOAT16"),
}
COMMON = Path(__file__).with_name("common.cuh")


def source_of(file: Path) -> str:
    """The text of a kernel, with `common.cuh` in place of its include (NVRTC gets no include folders)."""
    return file.read_text().replace('#include "common.cuh"', COMMON.read_text())


def import_cupy() -> Any:
    """CuPy.

    Raises:
        ImportError: it is not installed, or not usable; says what to install.
    """
    try:
        import cupy
    except ImportError as error:
        cuda = (torch.version.cuda or "13").split(".")[0]
        raise ImportError(f"the CUDA kernels need CuPy ({error}): pip install cupy-cuda{cuda}x") from None
    return cupy


@lru_cache
def compiled(file: Path, name: str, macros: tuple[str, ...], device: int) -> tuple[Any, int]:
    """A kernel and the bytes of dynamic shared memory that a block of it may have.

    Args:
        file: the .cu file.
        name: of the `extern "C"` kernel.
        macros: definitions for the compiler.
        device: the GPU's CUDA index.

    Raises:
        ImportError: CuPy is not installed.
    """
    cupy = import_cupy()
    with cupy.cuda.Device(device):
        kernel = cupy.RawKernel(source_of(file), name, options=(*OPTIONS, *macros))
        limit = cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"] - kernel.shared_size_bytes
        kernel.max_dynamic_shared_size_bytes = limit
    return kernel, limit


def launch(kernel: Any, blocks: int, threads: int, arguments: tuple, shared: int, device: torch.device) -> None:
    """Launch on torch's current stream of `device`; tensors go in by their addresses, None as a null pointer."""
    cupy = import_cupy()
    addresses = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    values = tuple(0 if a is None else a for a in addresses)
    with cupy.cuda.Device(device.index), stream_of(cupy, torch.cuda.current_stream(device)):
        kernel((blocks,), (threads,), values, shared_mem=shared)


def stream_of(cupy: Any, stream: Any) -> Any:
    """CuPy's view of a stream of torch's; `ExternalStream` where CuPy or torch is older than the stream protocol."""
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)
