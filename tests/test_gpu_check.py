"""The check of a GPU machine, as far as it runs without one: on the CPU, and its CUDA calls on stand-ins."""

import re
import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT

from benchmarks import gpu_check, label_pooling
from benchmarks.gpu_check import Row, count_syncs, seconds_of


def test_a_dry_run_fills_the_table():
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    head, empty, *table, last, seconds = result.stdout.strip().splitlines()
    assert "figures mean nothing" in head and not empty and not last and re.fullmatch(r"\d+ s", seconds)
    assert all(line.count("|") == 5 for line in table)
    text = "\n".join(table)
    for part in ("Error", "pooling |", "training |"):  # what failed or was not run
        assert part not in text, text
    checks = (
        "from the official computation", "bfloat16", "3 of 3", "copying its bytes", ": synthetic", ": relabel",
        ": stock_ffcv", "peak GPU memory", "waits for the GPU in 2 steps | 0", "tests on the GPU",
    )  # fmt: skip
    for check in checks:
        assert check in text, check


def test_a_part_that_fails_is_a_line_and_the_rest_goes_on(monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("no such kernel")
        yield

    for name in ("parity", "bits", "pooling", "training_rows", "gpu_tests"):
        monkeypatch.setattr(gpu_check, name, lambda *arguments, **keywords: iter([Row("fine", "0", "0", True)]))
    monkeypatch.setattr(gpu_check, "bits", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert gpu_check.main(gpu_check.TINY, dry_run=False) == 1
    out = capsys.readouterr().out
    assert "| bits | RuntimeError: no such kernel |  | NO |" in out and out.count("| fine |") == 4
    monkeypatch.setattr(gpu_check, "SECONDS", 0)
    assert gpu_check.main(gpu_check.TINY, dry_run=False) == 0
    assert capsys.readouterr().out.count("not run: time is up") == 5


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(gpu_check.TINY, dry_run=False) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_a_kernel_s_time_is_that_of_its_launches_in_a_graph(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 40.0  # ms

    class Graph:
        def replay(self):
            calls.append("replay")

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def within(_):
        calls.append("begin")
        yield
        calls.append("end")

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": within,
        "stream": within,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    seconds = seconds_of(lambda: calls.append("run"), torch.device("cuda", 0), repeats=4, rounds=2)
    assert seconds == pytest.approx(0.01)
    assert calls == ["run", "begin", "run", "end", "begin", *["run"] * 4, "end", *["record", "replay", "record"] * 5]


def test_waits_are_counted_with_their_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for _ in range(2):  # as torch says it
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = count_syncs(step)
    assert len(found) == 2 and len(set(found)) == 1 and found[0].startswith("test_gpu_check.py:")
    assert modes == ["warn", "default"]


def test_the_maps_that_are_timed_repeat_their_classes_over_neighboring_cells():
    maps, packed, _ = label_pooling.inputs(3, repeat=5)
    classes = maps[:, 1]
    assert (classes[:, :, :5, :5] == classes[:, :, :1, :1]).all() and len(classes[0, 0].unique()) > 5
    assert all(len(set(cell.tolist())) == 5 for cell in classes[0].flatten(1).T) and packed.shape == maps.shape
