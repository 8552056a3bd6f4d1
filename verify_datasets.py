"""Check that a .beton, say a copy, is what write_datasets.py wrote: every sample against its checksum.

    python verify_datasets.py --cfg.path=train.beton

Exit codes: 0 intact; 1 damaged, and the samples are named; 2 a bad setting.
"""

from relabel.data.settings import Verification
from relabel.settings import load_settings

if __name__ == "__main__":  # the settings are read first: the libraries take seconds to import
    settings = load_settings(Verification, __doc__)

from functools import partial

from relabel.commands import run_command
from relabel.data.verification import verify


def main(settings: Verification) -> None:
    count = verify(settings.cfg.path)
    print(f"{settings.cfg.path}: {count:,} samples are as they were written")


if __name__ == "__main__":
    run_command(partial(main, settings))
