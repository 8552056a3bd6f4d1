"""The loader on simulated CUDA streams: every batch is what was decoded, however far the CPU runs ahead of the GPU."""

import copy
import threading
from collections import deque
from queue import Queue

import ffcv_fields
import cuda_simulation
import pytest
import torch
from cuda_simulation import Runtime
from ffcv.loader import epoch_iterator
from ffcv.transforms import ToDevice, ToTensor

from relabel.data import loader as loader_module
from relabel.data.loader import Batch, _EpochIterator
from relabel.data.reading import Reading, training_loader
from relabel.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture(params=["the GPU is late", "copies are early"])
def runtime(request, monkeypatch):
    simulated = Runtime(eager=request.param == "copies are early")
    yield simulated.install(monkeypatch, loader_module, epoch_iterator)
    simulated.close()


def late(monkeypatch):
    return Runtime(eager=False).install(monkeypatch, loader_module, epoch_iterator)


def early(monkeypatch):
    return Runtime(eager=True).install(monkeypatch, loader_module, epoch_iterator)


@pytest.fixture(scope="module")
def compiled(beton):
    """A training loader, batches of one sample, whose device memory is memory of its own, filled by FFCV's copies."""
    reading = Reading(8, Processes(0, 1, 0, 1, CPU), num_workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reading, "to_device", lambda self: [ToTensor(), ToDevice(CPU, non_blocking=True)])
        return training_loader(str(beton), reading, 1, ffcv_fields.CropSampler(0), 16, normalize=False)


def like(loader, **attributes):
    """The same loader with other attributes, and memory of its own; nothing is compiled again."""
    other = copy.copy(loader)
    vars(other).update(attributes, memory=None)
    return other


def contents(batch: Batch) -> list[torch.Tensor]:
    return [part.clone() for part in vars(batch).values() if isinstance(part, torch.Tensor)]


@pytest.fixture(scope="module")
def decoded(compiled):
    """The batches of an epoch as they are without a GPU."""
    return [contents(batch) for batch in compiled.epoch(0)]


@pytest.fixture(scope="module")
def four_epochs(compiled):
    return [[contents(batch) for batch in compiled.epoch(number)] for number in range(4)]


@pytest.fixture(scope="module")
def in_fives(compiled):
    """A loader of batches of five of the 48 samples, the last one of three, and its batches."""
    loader = like(compiled, batch_size=5, drop_last=False)
    return loader, [contents(batch) for batch in loader.epoch(0)]


def wrong(seen, expected):
    """How many batches are not what was decoded."""
    assert len(seen) == len(expected)
    return sum(
        not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(seen, expected, strict=True)
    )


def train(runtime, batches, run_ahead, parts=1, steps=1000):
    """What the GPU sees in each batch when the CPU is `run_ahead` steps ahead of it, a step taking `parts` batches."""
    compute, seen, ends = runtime.current_stream(), [], deque()
    for _ in range(steps):
        for _ in range(parts):
            batch = next(batches, None)
            if batch is None:
                return seen
            end = compute.submit(lambda batch=batch: seen.append(contents(batch)))
        ends.append(end)
        if len(ends) > run_ahead:
            ends.popleft().wait()
    return seen


@pytest.mark.parametrize("run_ahead", [1, 2, 3, 4, 5, 6, 7, 12, 1000])
def test_no_batch_is_torn_however_far_the_cpu_is_ahead(compiled, decoded, runtime, run_ahead):
    seen = train(runtime, compiled.epoch(0), run_ahead)
    runtime.synchronize()
    assert wrong(seen, decoded) == 0 and len(seen) == 48


@pytest.mark.parametrize("run_ahead", [1, 3, 1000])
def test_nor_with_several_parts_a_step_and_a_last_batch_of_another_size(
    compiled, decoded, in_fives, runtime, run_ahead
):
    seen = train(runtime, compiled.epoch(0), run_ahead, parts=4)
    runtime.synchronize()
    assert wrong(seen, decoded) == 0
    loader, expected = in_fives
    seen = train(runtime, loader.epoch(0), run_ahead)
    runtime.synchronize()
    assert wrong(seen, expected) == 0 and [len(parts[0]) for parts in seen] == [5] * 9 + [3]


def copy_streams(runtime):
    return [stream for stream in runtime.streams if stream is not runtime.current_stream()]


def test_an_epoch_that_is_left_early_waits_for_its_copies_and_its_thread(compiled, runtime):
    for epoch in range(3):
        batches = compiled.epoch(epoch)
        train(runtime, batches, 1000, steps=4)
        threads = [thread for thread in threading.enumerate() if isinstance(thread, epoch_iterator.EpochIterator)]
        batches.close()
        assert threads and not any(thread.is_alive() for thread in threads)
        assert all(stream.idle for stream in copy_streams(runtime))


def test_an_error_in_the_thread_comes_after_good_batches_and_leaves_no_copy_behind(
    compiled, decoded, runtime, monkeypatch
):
    run_pipeline = _EpochIterator.run_pipeline

    def fails_at_the_fourth(self, number, *arguments):
        if number == 3:
            raise RuntimeError("this batch cannot be made")
        return run_pipeline(self, number, *arguments)

    monkeypatch.setattr(_EpochIterator, "run_pipeline", fails_at_the_fourth)
    seen = []
    with pytest.raises(RuntimeError, match="this batch cannot be made"):
        for batch in compiled.epoch(0):
            runtime.current_stream().submit(lambda batch=batch: seen.append(contents(batch)))
    assert all(stream.idle for stream in copy_streams(runtime))
    runtime.synchronize()
    assert wrong(seen, decoded[:3]) == 0


def test_the_buffers_are_not_written_while_their_memory_is_still_in_use(compiled, decoded, runtime):
    copies_by_then = []
    runtime.current_stream().submit(lambda: copies_by_then.append(runtime.copies))  # a kernel of the epoch before
    seen = train(runtime, compiled.epoch(0), 1000)
    runtime.synchronize()
    assert copies_by_then == [0] and wrong(seen, decoded) == 0


def allocations(monkeypatch, loader):
    """A list of what is allocated for an epoch."""
    made, allocate = [], loader.graph.allocate_memory

    def count(*sizes):
        made.append(allocate(*sizes))
        return made[-1]

    monkeypatch.setattr(loader.graph, "allocate_memory", count)
    return made


def epochs(runtime, loader, count, steps=1000):
    """What the GPU sees in each of several epochs, for which the CPU never waits for it."""
    seen = []
    for number in range(count):
        batches = loader.epoch(number)
        seen.append(train(runtime, batches, 1000, steps=steps))
        batches.close()
    runtime.synchronize()
    return seen


def test_the_memory_is_kept_from_epoch_to_epoch_and_no_batch_is_torn(compiled, four_epochs, runtime, monkeypatch):
    loader, expected = like(compiled), four_epochs
    made = allocations(monkeypatch, loader)
    seen = epochs(runtime, loader, 4)
    assert [wrong(*pair) for pair in zip(seen, expected, strict=True)] == [0, 0, 0, 0] and len(made) == 1
    seen = epochs(runtime, loader, 4, steps=7)  # left early, with batches decoded that nobody has asked for
    assert [wrong(ours, theirs[:7]) for ours, theirs in zip(seen, expected, strict=True)] == [0, 0, 0, 0]
    assert len(made) == 1


def test_memory_of_another_size_or_stream_or_in_use_is_not_taken(compiled, runtime, monkeypatch):
    loader = like(compiled)
    made = allocations(monkeypatch, loader)
    try:
        for size, count in ((16, 1), (24, 2), (24, 2), (16, 3)):
            loader.set_image_size(size)
            epochs(runtime, loader, 1)
            assert len(made) == count
    finally:
        loader.set_image_size(16)
    loader.batch_size = 2
    epochs(runtime, loader, 1)
    assert len(made) == 4
    outer, inner = loader.epoch(0), loader.epoch(1)
    next(outer)
    next(inner)
    assert len(made) == 5  # two at once have two memories; one is kept
    outer.close()
    inner.close()
    epochs(runtime, loader, 3)
    assert len(made) == 5
    with torch.cuda.stream(torch.cuda.Stream()):
        batches = loader.epoch(0)
        next(batches)
        batches.close()
    assert len(made) == 6


def test_a_batch_holds_until_the_next_is_asked_for(compiled, monkeypatch):
    made, run_pipeline = Queue(), _EpochIterator.run_pipeline

    def run_and_tell(self, number, *arguments):
        result = run_pipeline(self, number, *arguments)
        made.put(number)
        return result

    monkeypatch.setattr(_EpochIterator, "run_pipeline", run_and_tell)
    for number, batch in enumerate(compiled.epoch(0)):
        now, ahead = contents(batch), number + compiled.batches_ahead + 1  # as far as the thread comes meanwhile
        while ahead < len(compiled) and made.get(timeout=60) < ahead:
            pass
        assert all(map(torch.equal, contents(batch), now))


def test_two_processes_stay_on_their_own_gpus(compiled, runtime):
    seen = {}

    def process(rank):
        torch.cuda.set_device(rank)
        seen[rank] = train(runtime, like(compiled, rank=rank, world_size=2).epoch(0), 6)
        runtime.current_stream().synchronize()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(seen[rank]) for rank in range(2)] == [24, 24]
    used = [devices for thread, devices in runtime.contexts.items() if thread is not threading.current_thread()]
    assert sorted(map(sorted, used)) == [[0], [0], [1], [1]]  # each process's main thread and its loader's


# What the simulation would find. Each wait is taken away in turn.


def without(monkeypatch, cls, name):
    monkeypatch.setattr(cls, name, lambda *arguments: None)


def test_without_the_wait_for_a_slot_s_copy_batches_are_torn(compiled, decoded, monkeypatch):
    """FFCV as it is."""
    runtime = late(monkeypatch)
    without(monkeypatch, cuda_simulation.Event, "synchronize")
    torn = {}
    for run_ahead in (6, 12):
        seen = train(runtime, compiled.epoch(0), run_ahead)
        runtime.synchronize()
        torn[run_ahead] = wrong(seen, decoded)
    runtime.close()
    assert torn[6] > 20 and torn[12] > 20


def test_without_the_wait_for_the_network_s_work_batches_are_overwritten(compiled, decoded, monkeypatch):
    runtime = early(monkeypatch)
    without(monkeypatch, cuda_simulation.Event, "wait")
    seen = train(runtime, compiled.epoch(0), 12)
    runtime.synchronize()
    runtime.close()
    assert wrong(seen, decoded) > 20


def test_without_the_wait_for_the_memory_s_stream_it_is_written_while_in_use(compiled, monkeypatch):
    runtime, copies_by_then = early(monkeypatch), []
    runtime.current_stream().submit(lambda: copies_by_then.append(runtime.copies))
    without(monkeypatch, cuda_simulation.Stream, "wait_stream")
    train(runtime, compiled.epoch(0), 1000)
    monkeypatch.undo()
    runtime.close()
    assert copies_by_then[0] > 0


def test_without_a_device_of_its_own_the_loader_s_thread_uses_gpu_0(compiled, monkeypatch):
    runtime = late(monkeypatch)
    torch.cuda.set_device(1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    train(runtime, compiled.epoch(0), 1000)
    runtime.close()
    assert any(0 in devices for devices in runtime.contexts.values())
