"""Check that a .beton, say a copy, is what write_datasets.py wrote: every sample against its checksum.

    python verify_datasets.py --cfg.path=train.beton

Exit codes: 0 intact; 1 damaged, and the samples are named; 2 a bad setting.
"""

from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from relabel.commands import run_command
from relabel.data.verification import verify
from relabel.settings import group, load_settings, setting


@dataclass(frozen=True, kw_only=True)
class File:
    """what to check"""

    path: str = setting(str, "the .beton")


@dataclass(frozen=True, kw_only=True)
class Settings:
    cfg: File = group(File)


def main(settings: Settings) -> None:
    count = verify(settings.cfg.path)
    print(f"{settings.cfg.path}: {count:,} samples are as they were written")


def run() -> NoReturn:
    """The command line."""
    run_command(partial(main, load_settings(Settings, __doc__)))


if __name__ == "__main__":
    run()
