"""The commands as pip installs them: `relabel-train ...` is `python -m train_imagenet ...`, and so on."""

from functools import partial
from runpy import run_module

_run = partial(run_module, run_name="__main__", alter_sys=True)
write_datasets = partial(_run, "write_datasets")
verify_datasets = partial(_run, "verify_datasets")
train = partial(_run, "train_imagenet")
evaluate = partial(_run, "evaluate_imagenet")
generate_label_maps = partial(_run, "generate_label_maps")
inspect_label_maps = partial(_run, "inspect_label_maps")
reproduce_tables = partial(_run, "reproduce_tables")
finetune_detector = partial(_run, "finetune_detector")
