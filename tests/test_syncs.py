"""No step of training or validation makes the CPU wait for the GPU: the real steps, on fake CUDA tensors."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_cuda import DEVICE, fake_cuda, stubbed_backward
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import train_imagenet
from relabel.data.loader import Batch
from relabel.evaluation.predictions import predict
from relabel.precision import precision_of
from relabel.processes import Processes
from relabel.settings import load_settings
from relabel.training.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by copy.deepcopy
PROCESSES = Processes(0, 1, 0, 1, DEVICE)
STEPS = 4


def settings_of(monkeypatch, **values):
    words = [f"--{name.replace('__', '.')}={value}" for name, value in values.items()]
    monkeypatch.setattr(
        "sys.argv", ["train_imagenet.py", f"--config-file={ROOT}/rn50_configs/relabel_rn50.yaml", *words]
    )
    return load_settings(train_imagenet.Settings, "")


def batch_of(settings, count=8, size=64):
    with torch.device(DEVICE):
        maps = torch.zeros(count, 2, 5, 15, 15, dtype=torch.int16) if settings.data.relabel.use else None
        boxes = torch.zeros(count, 4) if settings.data.relabel.use else None
        images = torch.zeros(count, size, size, 3, dtype=torch.uint8)
        return Batch(images, torch.zeros(count, dtype=torch.int64), maps, boxes)


def network_of(settings):
    with torch.device("meta"):
        return train_imagenet.make_network(settings, replace(PROCESSES, device=torch.device("meta")))


def run_of(settings, network) -> Run:
    with torch.device(DEVICE):
        run = train_imagenet.make_run(settings, network, PROCESSES, precision_of(settings.compute.precision, DEVICE))
        run.losses = torch.zeros(STEPS)
    return run


RECIPES = {
    "relabel": {},
    "relabel, cutmix, ema": {"data__cutmix__prob": 1, "data__cutmix__beta": 1, "optim__ema_decay": 0.999},
    "fast": {"data__color_jitter": 0, "data__lighting": 0, "model__use_blurpool": True, "optim__bn__decay": False},
    "bce": {"optim__loss": "bce", "data__cutmix__prob": 1, "data__cutmix__beta": 1},
    "single labels": {"data__relabel__use": False, "optim__label_smoothing": 0.1},
    "global labels": {"data__relabel__localized": False},
    "best labels": {"data__relabel__multi": False},
    "in parts, bf16": {"optim__accumulate": 2, "compute__precision": "bf16"},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamp", "adamw", "lamb"])
def test_a_training_step_waits_for_nothing(monkeypatch, optimizer, recipe):
    settings = settings_of(monkeypatch, model__arch="resnet18", optim__optimizer=optimizer, **RECIPES[recipe])
    network = network_of(settings)
    with fake_cuda(monkeypatch, network) as watch:
        run = run_of(settings, network)
        parts = settings.optim.accumulate
        batches = (batch_of(settings) for _ in range(parts * STEPS))
        with stubbed_backward(monkeypatch, run.network):
            train_imagenet.train_step(settings, run, batches)  # constants are made, kernels compiled
            watch.reset()
            for _ in range(STEPS - 1):
                train_imagenet.train_step(settings, run, batches)
        assert watch.syncs == []
        if settings.compute.precision == "bf16":  # for which torch picks another backend where there is no GPU
            assert {dtype for dtype, _ in watch.conv_inputs} == {torch.bfloat16}
        else:
            assert watch.conv_inputs == {(torch.float16, True)}


LAUNCHES = {"sgd": 10, "adamw": 10, "adamp": 520, "lamb": 60}  # dispatched operations of the optimizer a step


@pytest.mark.parametrize("optimizer", LAUNCHES)
def test_optimizers_launch_little(monkeypatch, optimizer):
    """ResNet-50, 161 parameters: timm's AdamP launches about 3,400 kernels."""
    settings = settings_of(monkeypatch, model__arch="resnet50", optim__optimizer=optimizer, optim__ema_decay=0.99)
    network = network_of(settings)
    with fake_cuda(monkeypatch, network) as watch:
        run = run_of(settings, network)
        with stubbed_backward(monkeypatch, run.network):
            for _ in range(2):
                torch.zeros((), device=DEVICE).backward()
                run.scaler.scale(run.losses[0])
                watch.reset()
                run.optimizer_step()
        assert watch.syncs == []
        of_the_scaler = 161 if optimizer in ("adamp", "lamb") else 0  # what is not finite is taken out of each gradient
        assert sum(watch.launches.values()) <= LAUNCHES[optimizer] + of_the_scaler + 20, watch.launches


class Validation:
    """Like a loader, for `predict`: three batches, then the end of the test. `syncs`: those before each batch."""

    num_classes, labels = 1000, list(range(24))

    def __init__(self, watch, settings):
        self.watch, self.settings, self.syncs = watch, settings, []

    def __len__(self):
        return 3

    def order_of(self, epoch):
        return np.arange(24)

    def epoch(self, epoch):
        for _ in range(3):
            self.syncs.append(list(self.watch.syncs))
            yield batch_of(self.settings)
        self.syncs.append(list(self.watch.syncs))
        raise EndOfTest


class EndOfTest(Exception):
    pass


@pytest.mark.parametrize("flip_average", [True, False])
@pytest.mark.parametrize("some_classes", [True, False])
def test_a_validation_step_waits_for_nothing(monkeypatch, flip_average, some_classes):
    settings = settings_of(monkeypatch, model__arch="resnet18", optim__ema_decay=0.99)
    classes = np.arange(0, 1000, 5) if some_classes else None
    network = network_of(settings)
    with fake_cuda(monkeypatch, network) as watch:
        run = run_of(settings, network)
        loader = Validation(watch, settings)
        for _ in range(2):
            loader.syncs.clear()
            watch.reset()
            with pytest.raises(EndOfTest):
                predict(run.to_validate(), loader, run.precision, flip_average, classes)
        assert loader.syncs == [[]] * 4
        assert watch.conv_inputs == {(torch.float16, True)}


def test_the_watch_sees_what_waits(monkeypatch):
    with fake_cuda(monkeypatch, torch.nn.Identity()) as watch:
        x = torch.zeros(5, device=DEVICE)
        for wait in (
            lambda: x[0].item(), lambda: bool(x.max() > 0), lambda: torch.tensor([1.0, 2], device=DEVICE),
            lambda: torch.arange(3).to(DEVICE), lambda: torch.arange(3).to(DEVICE, non_blocking=True), lambda: x.cpu(),
            lambda: x.copy_(torch.zeros(5)), lambda: torch.zeros(5).copy_(x, non_blocking=True),
            lambda: x[x > 0], lambda: x.nonzero(),
        ):  # fmt: skip
            watch.reset()
            with suppress(DynamicOutputShapeException):  # the size of what comes out is not known
                wait()
            assert len(watch.syncs) == 1
        watch.reset()
        torch.arange(3).pin_memory().to(DEVICE, non_blocking=True)
        torch.empty(5, pin_memory=True).copy_(x, non_blocking=True)
        torch.zeros(3, device=DEVICE)
        x.masked_fill_(x > 0, 1)
        assert watch.syncs == []
