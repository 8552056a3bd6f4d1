"""Saving in a thread: training goes on, nothing that ends the run leaves before it, and its failures end the run."""

import errno
import threading
from concurrent import futures
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import DEVICE, fake_cuda

from relabel.errors import BadInput
from relabel.precision import precision_of
from relabel.processes import Processes
from relabel.training import monitor as monitor_module
from relabel.training.background import Background, on_cpu
from relabel.training.monitor import STOPPED, Monitor
from relabel.training.run import Plan, Run, average_of
from relabel.training.run_folder import RunFolder

CPU = torch.device("cpu")
STEPS = 4


class Training:
    """A run of a small network, of epochs of 4 steps, with a report after each."""

    def __init__(self, path) -> None:
        network, processes = torch.nn.Linear(3, 2), Processes(0, 1, 0, 1, CPU)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        precision = precision_of("fp32", CPU)
        self.run = Run(network, network, optimizer, precision, processes, average_of(network, 0.9))
        self.folder = RunFolder(str(path), {})
        self.monitor = Monitor(self.run, self.folder, SimpleNamespace(data=dict), processes, Plan(9, STEPS, 2), 1, 0)

    def steps(self, count: int) -> None:
        for _ in range(count):
            loss = self.run.model(torch.ones(2, 3)).square().mean()
            loss.backward()
            self.run.add_loss(loss.detach())
            self.run.optimizer_step()
            self.monitor.step_done(0.1)

    def epoch(self) -> None:
        self.monitor.begin_epoch()
        self.steps(STEPS)
        self.monitor.end_epoch({"epoch": self.run.epoch} | self.monitor.of_epoch())


@pytest.fixture
def training(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_module, "StopSignals", lambda: SimpleNamespace(asked=False))
    return Training(tmp_path / "run")


@pytest.fixture
def held(monkeypatch):
    """An event without which no checkpoint is written; set by whoever waits for the thread."""
    event, save, result = threading.Event(), RunFolder.save, futures.Future.result

    def wait_and_save(self, state):
        assert event.wait(60)
        save(self, state)

    def release_and_wait(self, timeout=None):
        event.set()
        return result(self, timeout)

    monkeypatch.setattr(RunFolder, "save", wait_and_save)
    monkeypatch.setattr(futures.Future, "result", release_and_wait)
    return event


def saved(training):
    return torch.load(training.folder.path / "checkpoint.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_training_goes_on_while_the_state_of_the_epoch_s_end_is_written(training, held):
    with training.folder.begin(None):
        training.epoch()
        then = on_cpu(training.run.state())
        training.monitor.begin_epoch()
        training.steps(STEPS - 1)
        assert not held.is_set() and not (training.folder.path / "checkpoint.pt").exists()
        assert not equal(then["model"], training.run.state()["model"])
    state = saved(training)  # the block's end has waited
    assert equal({key: state[key] for key in then}, then) and state["epoch"] == 1 and state["step"] == 0
    assert (training.folder.path / "curves.png").stat().st_size > 1000


def test_the_next_save_waits_for_the_last(training, held):
    with training.folder.begin(None):
        training.epoch()
        assert not held.is_set()
        training.epoch()
        assert held.is_set() and saved(training)["epoch"] >= 1
    assert saved(training)["epoch"] == 2
    assert torch.load(training.folder.path / "checkpoint_before.pt", weights_only=True)["epoch"] == 1


def test_a_signal_s_exit_waits_until_the_state_is_saved(training, held, capsys):
    with pytest.raises(SystemExit) as end, training.folder.begin(None):
        training.monitor.begin_epoch()
        training.steps(2)
        training.monitor.stop.asked = True
        try:
            training.steps(1)
        except SystemExit:
            assert saved(training)["step"] == 3  # before the message, not only at the block's end
            raise
    assert end.value.code == STOPPED and "step 3, state saved" in capsys.readouterr().out


def test_the_end_of_the_run_waits(training, held, capsys):
    with training.folder.begin(None):
        training.epoch()
        assert not held.is_set()
        training.folder.settings |= {"model.arch": "linear", "model.num_classes": 2}
        training.monitor.end_run()
        assert saved(training)["epoch"] == 1 and "done:" in capsys.readouterr().out


@pytest.fixture
def full_disk(monkeypatch):
    def save(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


MESSAGE = r"no room for checkpoint\.pt.*once there is room, --resume=auto resumes"


def test_a_failure_ends_the_run_at_its_next_report(training, full_disk):
    with pytest.raises(BadInput, match=MESSAGE), training.folder.begin(None):
        training.epoch()
        futures.wait([training.folder.background._work])
        training.monitor.begin_epoch()
        training.steps(1)
        pytest.fail("it went on")
    assert not list(training.folder.path.glob("*.part"))


@pytest.mark.parametrize("end", ["the block's", "the run's", "a signal"])
def test_a_failure_comes_at_the_latest_at_the_end(training, full_disk, capsys, end):
    with pytest.raises(BadInput, match=MESSAGE), training.folder.begin(None):
        training.epoch()
        if end == "the run's":
            training.monitor.end_run()
            pytest.fail("it went on")
        elif end == "a signal":
            training.monitor.stop.asked = True
            training.epoch()
            pytest.fail("it went on")
    assert "done" not in (said := capsys.readouterr().out) and "saved" not in said


def test_an_error_of_the_run_itself_waits_and_stays_the_one_that_is_raised(training, held, capsys):
    with pytest.raises(ZeroDivisionError), training.folder.begin(None):
        training.epoch()
        1 / 0  # noqa: B018
    assert saved(training)["epoch"] == 1


def test_when_both_fail_both_are_said(training, full_disk, capsys):
    with pytest.raises(ZeroDivisionError), training.folder.begin(None):
        training.epoch()
        1 / 0  # noqa: B018
    assert "no room for checkpoint.pt" in capsys.readouterr().err


def test_work_that_failed_is_reported_once():
    background = Background()
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.check()
    background.wait()


def test_the_copy_is_equal_and_of_its_own():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "losses": None}
    copied = on_cpu(state)
    assert equal(state, copied) and copied["model"]._metadata == state["model"]._metadata
    assert copied["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        network[0].weight.zero_()
    optimizer.param_groups[0]["lr"] = 5.0
    assert copied["model"]["0.weight"].abs().min() > 0 and copied["optimizer"]["param_groups"][0]["lr"] == 1e-3


def test_from_a_gpu_it_is_copied_to_pinned_memory_and_waited_for_once(monkeypatch):
    network, waits = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to("meta"), []
    stream = SimpleNamespace(synchronize=lambda: waits.append(1))
    with fake_cuda(monkeypatch, network) as watch:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        copied = on_cpu({"model": network.state_dict(), "losses": torch.zeros(3, device=DEVICE)})
        assert watch.syncs == [] and waits == [1]
    assert {tensor.device.type for tensor in (*copied["model"].values(), copied["losses"])} == {"cpu"}
