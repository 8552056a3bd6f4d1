"""Packing in a process of its own, for one that has threads: in workers forked from it, locks might stay held."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from typing import Any

from ..cores import ONE_THREAD
from ..errors import BadInput, BadSample, WorkerFailed
from ..settings import ROOT
from ..stopping import sigterm_unwinds
from .settings import Packing

PR_SET_PDEATHSIG = 1  # Linux's prctl


def pack_apart(settings: Packing) -> list[BadSample]:
    """`packing.pack` in a process without threads, which ends when this one does, however it ends.

    Raises:
        BadInput, OSError: as `pack` does.
        WorkerFailed: that process died, or a worker of its did.
    """
    inside, outside = os.pipe()
    paths = os.pathsep.join([str(ROOT), *sys.path])
    with os.fdopen(inside, "rb") as answers, sigterm_unwinds():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "relabel.data.apart", str(outside), str(os.getpid())],
            stdin=subprocess.PIPE, stdout=_stdout(), pass_fds=[outside],
            env=os.environ | ONE_THREAD | {"PYTHONPATH": paths},
        )  # fmt: skip
        os.close(outside)
        try:
            process.communicate(pickle.dumps(settings))
            answer = answers.read()
        finally:
            process.terminate()  # where this process is on its way out
            process.wait()
    if not answer:
        code = process.returncode
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        raise WorkerFailed(f"the process that packs {settings.data_dir} {why}; nothing was written")
    kind, value = pickle.loads(answer)  # of our own process
    if kind == "failed":
        raise value
    return value


def _stdout() -> int | None:
    """Where `sys.stdout` goes, also while it is redirected to another file."""
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError):  # it is closed, or no file
        return None


def _answer() -> tuple[str, Any]:
    settings = pickle.load(sys.stdin.buffer)
    from .packing import pack  # here, where no thread is started by what it imports

    try:
        return "done", pack(settings)
    except (BadInput, WorkerFailed, OSError) as error:
        return "failed", error
    except Exception:
        return "failed", WorkerFailed(traceback.format_exc())


def _main(outside: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        return
    answer = _answer()
    sys.stdout.flush()
    with os.fdopen(outside, "wb") as file:
        file.write(pickle.dumps(answer))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
