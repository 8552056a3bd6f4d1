"""Compiling the CUDA kernels without a GPU: for real architectures, and as plain C++ to be run here."""

import ctypes
import subprocess
from pathlib import Path

from conftest import ROOT
from ffcv_fields.cuda import OPTIONS, source_of


def compile_for_gpu(file: Path, architecture: str, macros: tuple[str, ...]) -> None:
    """Compile with NVRTC, which needs no driver; fails with the compiler's message."""
    from cuda.bindings import nvrtc

    error, program = nvrtc.nvrtcCreateProgram(source_of(file).encode(), file.name.encode(), 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    options = [f"--gpu-architecture={architecture}", *OPTIONS, *macros]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size + 2)  # never of one byte: Python shares those, and the log is written into it
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    assert size > 1000


def compile_for_host(main: Path, library: Path, macros: tuple[str, ...]) -> ctypes.CDLL:
    """Compile a C++ file that includes a kernel, with one thread per block, and load it."""
    command = ["g++", "-O1", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-DHOST_SHIM", *macros]
    folders = [f"-I{ROOT / 'tests'}", f"-I{ROOT / 'ffcv_fields' / 'cuda'}"]
    subprocess.run([*command, *folders, str(main), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
