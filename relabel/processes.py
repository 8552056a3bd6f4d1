"""Data-parallel processes, one per GPU (or several on a CPU), as torchrun starts them; one process needs none of it."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import ffcv_fields  # noqa: F401 - before numba's threads are started, which `set_num_threads` does
import numba
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .cores import usable_cores
from .errors import BadInput

GPU_FILE, DRIVER_FILE = Path("/dev/nvidia0"), Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` of `world_size`; `local_rank` of `local_size` on this machine; its device."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print `line`, once for all processes."""
        if self.first:
            print(line)

    def share(self, batch_size: int, accumulate: int) -> int:
        """Images per process and micro-batch, of a batch over all processes in `accumulate` micro-batches.

        Raises:
            BadInput: it does not divide.
        """
        parts = self.world_size * accumulate
        if batch_size % parts:
            raise BadInput(
                f"optim.batch_size is {batch_size}: not divisible by {self.world_size} processes x "
                f"optim.accumulate={accumulate}; {batch_size // parts * parts or parts} is"
            )
        return batch_size // parts

    def agree(self, value: int) -> int:
        """The first process's `value`, in every process."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        if self.world_size == 1:
            return values
        lists: list[Any] = [None] * self.world_size
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def parallel(self, network: nn.Module) -> nn.Module:
        """`network` with gradients averaged over all processes; it shares its weights.

        Its buffers (batch norm's statistics) are each process's own until `share_buffers`: DDP would broadcast them
        at every forward pass.
        """
        if self.world_size == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def share_buffers(self, *networks: nn.Module) -> None:
        """Give all processes the first one's buffers: what is validated is then what a checkpoint holds."""
        if self.world_size > 1:
            for buffer in (buffer for network in networks for buffer in network.buffers()):
                dist.broadcast(buffer, 0)

    def sync_batch_norm(self, network: nn.Module) -> nn.Module:
        """`network` with batch norm synchronized over all processes; unchanged with one process.

        timm's converter keeps the activation inside its `BatchNormAct2d`, which torch's own drops.

        Raises:
            BadInput: several processes without GPUs, among which torch synchronizes no batch norm.
        """
        if self.world_size == 1:
            return network
        if self.device.type == "cpu":
            raise BadInput("model.sync_bn needs GPUs: torch's SyncBatchNorm takes no CPU tensors; set it to False")
        from timm.layers import convert_sync_batchnorm  # takes a second to import

        return convert_sync_batchnorm(network)

    def exchange_gradients(self, model: Any, last: bool) -> AbstractContextManager:
        """The context of a backward pass: only the last of a step's micro-batches synchronizes gradients."""
        return model.no_sync() if self.world_size > 1 and not last else nullcontext()


def join(gpu: int, backend: str, timeout: int = 600) -> Processes:
    """Join the processes that torchrun started, if it did.

    Args:
        gpu: index of the GPU to use; -1: this process's local rank.
        backend: "nccl" or "gloo"; without a GPU always gloo.
        timeout: seconds after which a process that waits for another one fails.

    Raises:
        BadInput: there is no such GPU, or one that torch cannot use.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        number = local_rank if gpu < 0 else gpu
        if number >= torch.cuda.device_count():
            raise BadInput(
                f"GPU {number} was requested; there are {torch.cuda.device_count()}: start fewer processes, or "
                "lower compute.gpu"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    else:
        _check_that_no_gpu_is_wasted()
        if gpu >= 0:
            raise BadInput(f"compute.gpu is {gpu}; no GPU can be used here")
    if world_size > 1:
        dist.init_process_group(
            backend if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
    return Processes(rank, world_size, local_rank, local_size, device)


def _check_that_no_gpu_is_wasted() -> None:
    """Raise where torch uses the CPU because it cannot use the NVIDIA GPU that is here."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    try:
        torch.cuda.init()
        return
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch for CPUs
        reason = str(error).splitlines()[0]
    if not GPU_FILE.exists() and "too old" not in reason:
        return
    version = re.search(r"\d+\.\d+[.\d]*", DRIVER_FILE.read_text() if DRIVER_FILE.exists() else "")
    raise BadInput(
        f"torch {torch.__version__} cannot use the NVIDIA GPU here, driver {version[0] if version else 'unknown'}: "
        f"{reason.rstrip('.')}. Update the driver, or install a torch for its CUDA version "
        "(https://pytorch.org/get-started); CUDA_VISIBLE_DEVICES= (empty) chooses the CPU"
    )


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def hide_progress() -> bool | None:
    """For tqdm's `disable`: True in all processes but the first; None there, which hides the bar without a terminal."""
    return True if dist.is_initialized() and dist.get_rank() > 0 else None


def started_by_torchrun() -> bool:
    return "WORLD_SIZE" in os.environ


def start_one_process_a_gpu(url: str, first: Callable[[], object]) -> None:
    """Become torchrun, with this command, on all GPUs of this machine, unless that is done or there is but one.

    Args:
        url: `tcp://HOST:PORT` where they meet; empty: a free port of this machine.
        first: called before, in this process alone.
    """
    if started_by_torchrun() or torch.cuda.device_count() < 2:
        return
    first()
    where = ["--standalone"]
    if url:
        address = urlparse(url)
        where = ["--master-addr", str(address.hostname), "--master-port", str(address.port)]
    processes = str(torch.cuda.device_count())
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", processes]
    sys.stdout.flush()
    os.execv(sys.executable, [*torchrun, *sys.argv])


def barrier() -> None:
    """Wait until every process has reached this point."""
    if dist.is_initialized():
        dist.barrier()


def use_all_cores(processes: int = 1) -> None:
    """Let torch and numba use all cores again: importing FFCV limits both to one thread.

    `OMP_NUM_THREADS` (which torchrun sets) is respected for torch.

    Args:
        processes: that share this machine's cores.
    """
    cores = max(1, min(usable_cores() // processes, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(cores)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores))


def decoding_threads(asked: int, processes: Processes) -> int:
    """How many threads of this process decode: its share of the `asked` ones of the machine.

    0 stands for its share of the cores that it may use, without one (of 8 or more: two) for the threads that launch the
    GPU's work; and on the CPU for one thread: the network needs the cores there, and once there are more OpenMP threads
    than cores they block instead of spinning (two instead of one cost a third of the speed).
    """
    if asked:
        return -(-asked // processes.local_size)
    if processes.device.type == "cpu":
        return 1
    cores = usable_cores() // processes.local_size
    return max(1, cores - (2 if cores >= 8 else 1))
