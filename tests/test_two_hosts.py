"""Two machines: network namespaces with names and addresses of their own, a cable between them, torchrun on each.

The commands are those of docs/training.md. The file system is shared, as a cluster's is. Needs root and iproute2.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from faults import descendants
from test_train import log_of, small, weights  # noqa: F401  (a fixture)

NAMES, ADDRESSES = ("relabel-host0", "relabel-host1"), ("10.77.31.1", "10.77.31.2")
TIMEOUT = 8  # seconds, compute.distributed.timeout
IP, ETC = shutil.which("ip") or "/usr/sbin/ip", Path("/etc/netns")
NAMED = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'


def ip(*words):
    subprocess.run([IP, *words], check=True, capture_output=True)


def can_make_hosts():
    name = f"relabel-probe-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "exec", name, "unshare", "--uts", "true")
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return os.access("/etc", os.W_OK)


@pytest.fixture
def hosts():
    """Two namespaces with `eth0` in each, where each other's name is known (`/etc/netns/*/hosts`)."""
    names = [f"{name}-{os.getpid()}" for name in NAMES]
    known = "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True))
    try:
        for name in names:
            ip("netns", "add", name)
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run([IP, "netns", "del", name], capture_output=True)
            shutil.rmtree(ETC / name, ignore_errors=True)
        with suppress(OSError):
            ETC.rmdir()  # if it is empty


def recipe(small, folder):  # noqa: F811
    """A run of 2 epochs of 16 steps, without batch norm, that saves after every step."""
    return [
        f"--config-file={ROOT}/rn50_configs/demo.yaml", f"--data.train_dataset={small}/train.beton",
        f"--data.val_dataset={small}/val.beton", "--data.image_size=32", "--model.arch=timm/test_convnext",
        "--data.num_workers=2", "--optim.batch_size=8", "--optim.epochs=2", "--validation.every=2",
        "--util.print_freq=1", "--logging.checkpoint_minutes=0.00001", "--resume=auto", f"--logging.folder={folder}",
        f"--compute.distributed.timeout={TIMEOUT}",
    ]  # fmt: skip


class Host:
    """One machine's torchrun."""

    def __init__(self, namespace, name, arguments, output):
        self.output = open(output, "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [IP, "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", NAMED, name,
             sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
             "--rdzv-backend=c10d", f"--rdzv-endpoint={NAMES[0]}:29500", str(ROOT / "train_imagenet.py"), *arguments],
            stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def wait(self, timeout=300):
        return self.process.wait(timeout)

    def kill(self):
        """As a machine that is switched off: its torchrun and what that started (each in a session of its own)."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def text(self):
        self.output.seek(0)
        return self.output.read()


@pytest.fixture
def start(hosts, tmp_path):
    """Starts the same command on both; whatever is left at the end is killed."""
    started = []

    def start(arguments):
        pair = [
            Host(namespace, name, arguments, tmp_path / f"output{len(started) + i}.txt")
            for i, (namespace, name) in enumerate(zip(hosts, NAMES, strict=True))
        ]
        started.extend(pair)
        return pair

    yield start
    for host in started:
        if host.process.poll() is None:
            host.kill()
        host.output.close()


def losses(folder):
    lines = map(json.loads, (folder / "steps.jsonl").read_text().splitlines())
    return [(line["epoch"], line["step"], line["loss"]) for line in lines]


@pytest.mark.skipif(not can_make_hosts(), reason="needs network namespaces: root and iproute2")
def test_two_hosts_train_as_one_process_and_resume_when_one_was_cut_off(small, hosts, start, tmp_path):  # noqa: F811
    one = run("train_imagenet.py", *recipe(small, tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    whole = subprocess.run(
        [*launch, str(ROOT / "train_imagenet.py"), *recipe(small, tmp_path / "whole")],
        capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr

    folder = tmp_path / "cut"
    first, second = start(recipe(small, folder))
    log = folder / "steps.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert first.process.poll() is None and second.process.poll() is None, first.text() + second.text()
        time.sleep(0.005)
    ip("-n", hosts[1], "link", "set", "eth0", "down")
    cut = time.monotonic()
    code, seconds = first.wait(), time.monotonic() - cut
    print(f"left {seconds:.1f} s after the cut")
    assert code != 0 and seconds < TIMEOUT + 30  # torchrun ends its processes within 30 s
    assert "cannot be reached" in first.text() and "relabel/processes.py" not in first.text(), first.text()
    second.kill()
    saved = weights(folder)
    assert saved["epoch"] == 0 and 0 < saved["step"] < 16

    ip("-n", hosts[1], "link", "set", "eth0", "up")
    first, second = start(recipe(small, folder))
    assert (first.wait(), second.wait()) == (0, 0), first.text() + second.text()
    assert f"epoch 0, step {saved['step']} of 2 epochs of 16 steps" in first.text() + second.text()
    assert losses(folder) == losses(tmp_path / "whole")
    ours, theirs = weights(folder), weights(tmp_path / "whole")
    assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
    np.testing.assert_allclose([x[2] for x in losses(folder)], [x[2] for x in losses(tmp_path / "one")], atol=1e-4)
    assert log_of(folder)[-1]["top_1"] == log_of(tmp_path / "one")[-1]["top_1"]
