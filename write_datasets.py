"""Pack a folder of images, and a folder of label maps, into one .beton file.

  training set, with the label maps of the official archive:
    python write_datasets.py --cfg.data_dir=ILSVRC/train --cfg.label_map_dir=relabel_imagenet \\
        --cfg.write_path=train.beton
  validation set, which has none:
    python write_datasets.py --cfg.data_dir=ILSVRC/val --cfg.write_path=val.beton

Exit codes: 0 written; 1 bad data or a failure, and nothing was written; 2 a bad setting.
"""

from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from relabel.commands import run_command
from relabel.data.packing import Packing, pack
from relabel.settings import group, load_settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    cfg: Packing = group(Packing)


def main(settings: Settings) -> None:
    pack(settings.cfg)


def run() -> NoReturn:
    """The command line."""
    settings = load_settings(Settings, __doc__)
    run_command(partial(main, settings), interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    run()
