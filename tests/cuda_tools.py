"""Compiling the CUDA kernels without a GPU: for real architectures, and as plain C++ to be run here."""

import ctypes
import subprocess
from pathlib import Path

from conftest import ROOT
from ffcv_fields.cuda import OPTIONS, source_of

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")  # Turing to Blackwell


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


def ptx_of(file: Path, architecture: str, macros: tuple[str, ...]) -> str:
    """The PTX that NVRTC makes, say for "compute_80"."""
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(source_of(file).encode(), file.name.encode(), 0, [], [])
    options = [f"--gpu-architecture={architecture}", *OPTIONS, *macros]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytes(size + 2)
    nvrtc.nvrtcGetPTX(program, text)
    return text.decode()


def compile_for_host(main: Path, output: Path, macros: tuple[str, ...], option: str = "-shared") -> Path:
    """Compile a C++ file that includes a kernel, its threads being threads of the CPU: a library, or a program."""
    command = ["g++", "-O1", "-g", "-ffp-contract=off", "-std=c++17", "-fPIC", "-pthread", "-DHOST_SHIM", *macros]
    folders = [f"-I{ROOT / 'tests'}", f"-I{ROOT / 'ffcv_fields' / 'cuda'}"]
    subprocess.run([*command, *folders, option, str(main), "-o", str(output)], check=True)
    return output


def load_for_host(main: Path, library: Path, macros: tuple[str, ...]) -> ctypes.CDLL:
    """Compile as a library, and load it."""
    return ctypes.CDLL(str(compile_for_host(main, library, macros)))
