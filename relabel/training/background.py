"""Saving while training goes on: a copy of the state in the CPU's memory, and a thread that writes it."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from types import TracebackType
from typing import Any

import torch


def on_cpu(state: Any) -> Any:
    """A copy of `state`, nested dicts, lists and tuples of tensors and numbers, that training does not change.

    From a GPU through pinned memory, which torch keeps for the next time: the CPU waits once, for all of it.
    """
    copied = _copied(state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        target = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return target.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        copied = copy(state)  # a state dict has attributes
        copied.update((key, _copied(value)) for key, value in state.items())
        return copied
    if isinstance(state, list | tuple):
        return type(state)(map(_copied, state))
    return state


class Background:
    """A thread for one piece of work at a time.

    As a context manager it waits for the work at the end of the block, however that comes. Work that fails raises its
    error in the main thread, at the next call of whatever method, or at the end of the block; where that ends with an
    error of its own, the work's is printed.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the last piece of work, and begin the next."""
        self.wait()
        self._work = self._executor.submit(work)

    def wait(self) -> None:
        """Until the work is done."""
        work, self._work = self._work, None
        if work:
            work.result()

    def check(self) -> None:
        """Raise what made the work fail, if it has; wait for nothing."""
        if self._work and self._work.done():
            self.wait()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            print(failure, file=sys.stderr, flush=True)
