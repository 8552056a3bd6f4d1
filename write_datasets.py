"""Pack images and label maps, in the form that they were downloaded in, into one .beton file.

  training set, with the label maps of the official archive:
    python write_datasets.py --cfg.data_dir=ILSVRC/train --cfg.label_map_dir=relabel_imagenet \\
        --cfg.write_path=train.beton
  validation set, which has none:
    python write_datasets.py --cfg.data_dir=ILSVRC/val --cfg.write_path=val.beton
  the same from the archives, as they are; Kaggle, Hugging Face, WebDataset: docs/datasets.md:
    python write_datasets.py --cfg.data_dir=ILSVRC2012_img_train.tar --cfg.label_map_dir=relabel_imagenet.tar \\
        --cfg.write_path=train.beton

Exit codes: 0 written; 1 bad data or a failure, and nothing was written; 2 a bad setting.
"""

import os

from relabel.cores import ONE_THREAD
from relabel.data.settings import Writing
from relabel.settings import load_settings

if __name__ == "__main__":  # the settings are read first: the libraries take seconds to import
    settings = load_settings(Writing, __doc__)
    os.environ.update(ONE_THREAD)  # the workers are forked: a thread's lock would never be released in them

from functools import partial

from relabel.commands import run_command
from relabel.data.packing import pack


def main(settings: Writing) -> None:
    pack(settings.cfg)


if __name__ == "__main__":
    run_command(partial(main, settings), interrupted="interrupted; nothing was written")
