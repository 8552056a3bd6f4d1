"""A signal ends a command that starts, or packs, wherever it is: also where Python lets no exception through."""

import subprocess
import sys

import pytest
from conftest import ROOT

# `number` arrives inside a finalizer, or in what runs after a fork: an exception is dropped there.
PROGRAM = """
import os, signal, sys, time
from relabel.stopping import sigterm_unwinds, stop_at_once

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.{number})
        for _ in range(100):  # the handler runs between these
            pass

def after_a_fork():
    os.register_at_fork(after_in_parent=Finalized().__del__)
    if os.fork() == 0:
        os._exit(0)

def run():
    try:
        {where}
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

{how}
"""
STARTING = "stop_at_once(); run()"
PACKING = "with sigterm_unwinds(): run()"


@pytest.mark.parametrize(
    ("how", "number", "code"), [(STARTING, "SIGINT", 75), (STARTING, "SIGTERM", 75), (PACKING, "SIGTERM", 143)]
)
@pytest.mark.parametrize("where", ["Finalized()", "after_a_fork()", "os.kill(os.getpid(), signal.{number})"])
def test_a_signal_ends_the_command_wherever_it_arrives(how, number, code, where):
    program = PROGRAM.format(number=number, where=where.format(number=number), how=how)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == code and "cleaned up" in done.stdout, done.stderr


def test_another_exception_in_a_finalizer_is_reported_as_ever():
    program = """
import os, signal
from relabel.stopping import stop_at_once

class Fails:
    def __del__(self):
        raise ValueError("in a finalizer")

stop_at_once()
try:
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    Fails()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 75 and "ValueError: in a finalizer" in done.stderr
