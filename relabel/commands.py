"""Running a command to its exit code, and starting another as a user would."""

import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .errors import BadInput, WorkerFailed
from .settings import ROOT
from .stopping import abandon, leave, lost_another


def run_command(main: Callable[[], int | None], interrupted: str = "interrupted") -> NoReturn:
    """Run a command's `main` to its exit code: what it returns (None: 0); 1 with one message where it fails.

    Args:
        main: without arguments.
        interrupted: the message after Ctrl-C.
    """
    name = Path(sys.argv[0]).name
    try:
        code = main()
    except (BadInput, WorkerFailed, OSError) as error:
        abandon(f"{name}: {error}")
    except KeyboardInterrupt:
        abandon(f"{name}: {interrupted}")
    except SystemExit as end:
        abandon("", int(end.code or 0))
    except Exception as error:
        if lost_another(error):
            why = str(error).splitlines()[0]
            abandon(f"{name}: another process has ended, as its message says, or cannot be reached ({why})")
        abandon(traceback.format_exc().rstrip())
    leave()
    sys.exit(code)


def call(name: str, *arguments: object, processes: int = 1) -> int:
    """Print and run a command, e.g. `train_imagenet.py`, with torchrun where `processes` > 1. Returns its exit code.

    For callers of the commands: `scenes`, `reproduce_tables.py`.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ python {name} {' '.join(words)}", flush=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.run([sys.executable, *launch, str(ROOT / name), *words]).returncode
