"""The official project's settings (naver-ai/relabel_imagenet): its names, its values, its base.yaml.

Facts of its `configs/` and of its parser, which merges `configs/base.yaml` under the one file that it is given with
`--config-file-path`, whatever that file is.
"""

from .dialects import Dialect, OtherName

OFFICIAL = Dialect(
    names={
        "resume": OtherName("logging.resume"),
        "data.dataset": OtherName(None, {"imagenet": ""}),
        "compute.num_workers": OtherName("data.num_workers"),
        # Apex's O1 and O2 are mixed precision, O3 is float16 throughout, which this project does not offer.
        "compute.opt_level": OtherName("compute.precision", {"O0": "fp32", "O1": "auto", "O2": "auto", "O3": "auto"}),
        "compute.distributed.num_processes_per_node": OtherName(
            None,
            {"1": ""},
            "the official code multiplies the number of GPUs by it, starts one process a GPU all the same, and waits "
            "for the others forever. For several machines see docs/training.md",
        ),
        "util.val_batch_size": OtherName("validation.batch_size"),
    },
    base={
        "model.arch": "resnet50",
        "data.dataset": "imagenet",
        "data.data_path": "/home/data/ILSVRC2015/",
        "data.image_size": 224,
        "data.rrc_minimum": 0.08,
        "data.crop_ratio": 0.875,
        "optim.optimizer": "sgd",
        "optim.epochs": 100,
        "optim.start_epoch": 0,
        "optim.bn.momentum": 0.9,
        "optim.bn.eps": 1e-5,
        "optim.batch_size": 512,
        "optim.lr.init": 0.5,
        "optim.lr.decay_type": "cos",
        "optim.warmup.lr": 0.0,
        "optim.warmup.epochs": 5,
        "optim.nesterov": True,
        "optim.momentum": 0.9,
        "optim.wd.base": 1e-5,
        "optim.label_smoothing": 0.0,
        "compute.seed": -1,
        "compute.gpu": -1,
        "compute.opt_level": "O1",
        "compute.num_workers": 32,
        "compute.distributed.use": True,
        "compute.distributed.num_processes_per_node": 1,
        "compute.distributed.url": "tcp://127.0.0.1:6946",
        "compute.distributed.backend": "nccl",
        "util.print_freq": 250,
        "util.val_batch_size": 512,
        "data.relabel.pairing": "official",  # not a setting there: what its code does
    },
    more=frozenset(
        {
            "data.cutmix.prob",
            "data.cutmix.beta",
            "data.cutmix.off_epoch",
            "data.relabel.use",
            "data.relabel.path",
            "util.test_only",
            "util.test_weight_file",
        }
    ),
    superseded={"data.data_path": ("data.train_dataset", "data.val_dataset")},  # who names a .beton packs none
)
