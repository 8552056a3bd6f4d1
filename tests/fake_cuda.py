"""Training and validation steps on fake CUDA tensors: what they would make the CPU wait for, and how much they launch.

`FakeTensorMode` computes shapes, dtypes and devices without memory or a GPU; a dispatch mode above it sees every
operation. What it cannot do is replaced: backward (it needs a real engine) sets gradients, kernels launched through
CuPy are only counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from relabel import normalization
from relabel.training import augment as augment_module

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
# Operations whose output's size or value the CPU must know.
ASKS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_}
IN_PLACE = {aten._fused_sgd_, aten._fused_adamw_}  # without an implementation for fake tensors; they need none
FREE = {
    aten.detach,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.alias,
    aten.lift_fresh,
    torch.ops.prim.device,
}


def tensors_in(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


class Watch(TorchDispatchMode):
    """Counts what is launched on the GPU, and names what blocks the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.launches: Counter[str] = Counter()
        self.syncs: list[str] = []
        self.conv_inputs: set[tuple[torch.dtype, bool]] = set()  # dtype, whether channels last

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation, name = function.overloadpacket, str(function)
        inputs = list(tensors_in([*args, *kwargs.values()]))
        on_gpu = any(tensor.device.type == "cuda" for tensor in inputs)
        if on_gpu and operation in ASKS:
            self.syncs.append(name)
            if operation is aten._local_scalar_dense:
                return 1.0 if args[0].is_floating_point() else True if args[0].dtype == torch.bool else 1
            if operation in (aten.is_nonzero, aten.equal):
                return True
        if operation in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.syncs.append(f"{name} by a mask")
        if operation in (aten.convolution, aten.conv2d):
            image = args[0]
            self.conv_inputs.add((image.dtype, image.is_contiguous(memory_format=torch.channels_last)))
        result = None if operation in IN_PLACE else function(*args, **kwargs)
        outputs = list(tensors_in(result))
        if kwargs.get("pin_memory"):
            outputs[0].is_fake_pinned = True
        if operation in COPIES:
            self._copy(name, args, kwargs, outputs)
        if any(tensor.device.type == "cuda" for tensor in [*inputs, *outputs]) and not (
            operation in FREE or function.is_view
        ):
            self.launches[name] += 1
        return result

    def _copy(self, name, args, kwargs, outputs):
        target, source = (outputs[0], args[0]) if name.startswith("aten._to_copy") else (args[0], args[1])
        if isinstance(target, list):
            return
        if target.device.type == source.device.type:
            return
        non_blocking = kwargs.get("non_blocking") or args[2:3] == (True,)
        on_cpu = target if target.device.type == "cpu" else source
        if not (non_blocking and getattr(on_cpu, "is_fake_pinned", False)):
            self.syncs.append(f"{name} {source.device.type} to {target.device.type} {list(source.shape)}")


def on_fake_gpu(fake: FakeTensorMode, network: torch.nn.Module) -> torch.nn.Module:
    """A network on the device "meta", its tensors replaced by fake ones on the GPU."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(FakeTensor(fake, p.detach(), DEVICE))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(fake, buffer, DEVICE)
    return network


@contextmanager
def fake_cuda(monkeypatch, network: torch.nn.Module) -> Iterator[Watch]:
    """The context in which "cuda" tensors can be made; what happens in it is in the `Watch`.

    Args:
        network: on the device "meta"; becomes one on the fake GPU.
    """
    fake, watch = FakeTensorMode(allow_non_fake_inputs=True), Watch()
    caches = (normalization._constants, augment_module._statistics)

    def pin_memory(tensor):
        pinned = fake.from_tensor(tensor) if not isinstance(tensor, FakeTensor) else tensor.clone()
        pinned.is_fake_pinned = True
        return pinned

    def launch(*arguments):
        watch.launches["CuPy"] += 1

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    monkeypatch.setattr(augment_module, "compiled", lambda *arguments: (None, 0))
    monkeypatch.setattr(augment_module, "launch", launch)
    for cache in caches:
        cache.cache_clear()
    try:
        on_fake_gpu(fake, network)
        with fake, watch:
            yield watch
    finally:
        for cache in caches:
            cache.cache_clear()


@contextmanager
def stubbed_backward(monkeypatch, network: torch.nn.Module):
    """`backward` that gives each parameter of `network` a gradient, of its own layout."""

    def backward(loss, *arguments, **keywords):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.grad = torch.empty_like(parameter)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        yield
