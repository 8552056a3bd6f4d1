"""A CUDA runtime without a GPU: streams whose work is done as late, or as early, as CUDA's rules allow.

The program's own code runs on it: `Runtime.install` puts streams, events and copies in the place of `torch.cuda`'s.
"Device memory" is CPU memory of its own, written by copies that a stream does at its own time. Nothing is left to
chance or to a clock:

- work of a lazy stream is done when something that must have it asks for it: a host thread that synchronizes, or work
  of another stream that was asked for and waits for it. This is the GPU that is far behind.
- work of an eager stream is done as soon as what it waits for is done. This is the GPU that has nothing else to do.

A wait that a program forgets is therefore seen in every run.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import contextmanager

import torch


class Work:
    """Something that a stream does after all that it was given before, and after `dependency`."""

    def __init__(self, stream, action: Callable[[], None] | None, dependency: "Work | None" = None) -> None:
        self.stream, self.action, self.dependency = stream, action, dependency
        self.before: Work | None = None
        self.asked, self.done = threading.Event(), threading.Event()

    def ask(self) -> None:
        """Have it done, with all that must come before."""
        todo = [self]
        while todo:
            work = todo.pop()
            if work is not None and not work.asked.is_set():
                work.asked.set()
                todo += [work.before, work.dependency]

    def wait(self) -> None:
        """Block this thread until it is done."""
        self.ask()
        assert self.done.wait(60), "the simulated GPU hangs"

    def run(self) -> None:
        if self.dependency:
            self.dependency.done.wait()
        if self.action:
            self.action()
        self.before = self.dependency = self.action = None
        self.done.set()


class Runtime:
    """A machine with GPUs, each with a default stream, which is lazy; `eager` says how the other streams are."""

    def __init__(self, eager: bool = False) -> None:
        self.eager = eager
        self.copies = 0  # that were done
        self.contexts: defaultdict[threading.Thread, set[int]] = defaultdict(set)  # the GPUs that a thread used
        self.streams: list[Stream] = []
        self._default: dict[int, Stream] = {}
        self._own = threading.local()
        self._lock = threading.Lock()

    def install(self, monkeypatch, *modules) -> "Runtime":
        """Take the place of `torch.cuda`; `modules` have a constant `IS_CUDA`, decided when they were imported."""
        runtime, copy = self, torch.Tensor.copy_

        class OwnStream(Stream):
            def __init__(self) -> None:
                super().__init__(runtime, runtime.current_device(), runtime.eager)

        class OwnEvent(Event):
            def __init__(self, blocking: bool = False) -> None:
                super().__init__(runtime)

        def copy_(self, source, non_blocking=False):
            stream = getattr(runtime._own, "stream", None)
            if stream is None:
                return copy(self, source, non_blocking)

            def action():
                copy(self, source)
                runtime.copies += 1

            work = stream.submit(action)
            if not non_blocking:
                work.wait()
            return self

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        for name, value in {"Stream": OwnStream, "Event": OwnEvent}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("current_device", "set_device", "current_stream", "stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for module in modules:
            monkeypatch.setattr(module, "IS_CUDA", True)
        return self

    def uses(self, device: int) -> None:
        self.contexts[threading.current_thread()].add(device)

    def current_device(self) -> int:
        return getattr(self._own, "device", 0)

    def set_device(self, device: int) -> None:
        self._own.device = device
        self.uses(device)

    def current_stream(self, device: int | None = None) -> "Stream":
        stream = getattr(self._own, "stream", None)
        if stream is not None:
            return stream
        device = self.current_device() if device is None else device
        with self._lock:
            if device not in self._default:
                self._default[device] = Stream(self, device, eager=False)
        return self._default[device]

    @contextmanager
    def stream(self, stream: "Stream"):
        """As torch's: on leaving, the device that was the thread's becomes its device again, in use or not."""
        before, device = getattr(self._own, "stream", None), self.current_device()
        self._own.stream, self._own.device = stream, stream.device
        try:
            yield
        finally:
            self._own.stream = before
            self.set_device(device)

    def synchronize(self) -> None:
        for stream in list(self.streams):
            stream.synchronize()

    def close(self) -> None:
        """Do all that is left, end the streams' threads."""
        self.synchronize()
        for stream in self.streams:
            stream.submit(None, last=True).ask()
            stream.thread.join()


class Stream:
    """A thread that does its work in order."""

    def __init__(self, runtime: Runtime, device: int, eager: bool) -> None:
        self.runtime, self.device, self.eager = runtime, device, eager
        self._todo: deque[Work] = deque()
        self._changed = threading.Condition()
        self._last: Work | None = None
        self._end: Work | None = None
        runtime.uses(device)
        runtime.streams.append(self)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, action, dependency: Work | None = None, last: bool = False) -> Work:
        self.runtime.uses(self.device)
        work = Work(self, action, dependency)
        with self._changed:
            idle = self._last is None or self._last.done.is_set()
            work.before, self._last = (None if idle else self._last), work
            if self.eager and idle and (dependency is None or dependency.done.is_set()) and not last:
                work.run()  # here and now: never later than it could be
                return work
            if last:
                self._end = work
            self._todo.append(work)
            self._changed.notify()
        return work

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._todo:
                    self._changed.wait()
                work = self._todo.popleft()
            if not self.eager:
                work.asked.wait()
            work.run()
            if work is self._end:
                return

    @property
    def idle(self) -> bool:
        """Whether all its work is done."""
        return self._last is None or self._last.done.is_set()

    def wait_stream(self, other: "Stream") -> None:
        self.submit(None, other.submit(None))

    def wait_event(self, event: "Event") -> None:
        self.submit(None, event.work)

    def synchronize(self) -> None:
        if self._last is not None:
            self._last.wait()


class Event:
    """A place in a stream's work."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.work = runtime, None

    def record(self, stream: Stream | None = None) -> None:
        self.work = (stream or self.runtime.current_stream()).submit(None)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.runtime.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if self.work:
            self.work.wait()
