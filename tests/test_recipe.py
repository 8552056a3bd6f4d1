"""Networks, optimizers, schedules, evaluation."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.batchnorm import _BatchNorm

from relabel.data.loader import Batch
from relabel.data.names import Identity
from relabel.errors import BadInput
from relabel.evaluation.label_sets import read_multilabels
from relabel.evaluation.predictions import evaluate
from relabel.models import BlurPoolConv2d, build_model, check_input, compiled, load_weights
from relabel.precision import precision_of
from relabel.processes import Processes
from relabel.training.optim import build_optimizer, learning_rate, optimizer_bytes
from relabel.training.run import Run, average_of
from relabel.training.run_folder import bytes_of
from relabel.training.settings import Resolution


@pytest.mark.parametrize("arch, nearest", [("resnet5", "resnet50"), ("timm/rexnet_10", "timm/rexnet_100")])
def test_an_unknown_network_suggests_the_nearest(arch, nearest):
    with pytest.raises(BadInput, match=nearest):
        build_model(arch, 10)


@pytest.mark.parametrize("arch", ["resnet18", "timm/rexnet_100", "shufflenet_v2_x0_5"])
def test_networks_have_the_head_and_batch_norm_asked_for(arch):
    model = build_model(arch, 12, bn_momentum=0.2, bn_eps=1e-4).eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 12)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.momentum == 0.2 and m.eps == 1e-4 for m in norms)


def test_blurpool_stands_before_strided_convolutions():
    model = build_model("resnet50", 10, use_blurpool=True)
    assert sum(isinstance(m, BlurPoolConv2d) for m in model.modules()) == 6
    assert not isinstance(model.conv1, BlurPoolConv2d)  # 3 channels
    blur = BlurPoolConv2d(nn.Conv2d(16, 16, 1, 2))
    assert torch.allclose(blur.blur_filter.sum((1, 2, 3)), torch.ones(16))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_checkpoints_load(tmp_path, wrap, prefix):
    source, target = build_model("resnet18", 10), build_model("resnet18", 10)
    torch.save(wrap({prefix + k: v for k, v in source.state_dict().items()}), tmp_path / "w.pth")
    load_weights(target, str(tmp_path / "w.pth"))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_bad_checkpoints_are_named(tmp_path):
    model, file = build_model("resnet18", 10), tmp_path / "w.pth"
    with pytest.raises(BadInput, match="no such checkpoint"):
        load_weights(model, str(file))
    torch.save(build_model("resnet18", 11).state_dict(), file)
    with pytest.raises(BadInput, match=r"does not fit.*fc\.weight"):
        load_weights(model, str(file))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BadInput, match=r"cannot be read safely|not a checkpoint"):
        load_weights(model, str(file))
    torch.save([1, 2], file)
    with pytest.raises(BadInput, match="no state dict"):
        load_weights(model, str(file))


def test_optimizers_and_their_parameter_groups():
    model = build_model("resnet18", 10)
    sgd = build_optimizer(model, "sgd", 0.1, 0.9, True, 1e-4, True)
    assert (
        len(sgd.param_groups) == 1 and sgd.param_groups[0]["nesterov"] and sgd.param_groups[0]["weight_decay"] == 1e-4
    )
    split = build_optimizer(model, "sgd", 0.1, 0.9, False, 1e-4, False)
    assert [g["weight_decay"] for g in split.param_groups] == [1e-4, 0.0]
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert sum(p.numel() for p in split.param_groups[1]["params"]) == norms
    adamp = build_optimizer(model, "adamp", 2e-3, 0.9, True, 1e-2, True)
    assert type(adamp).__name__ == "AdamP" and adamp.param_groups[0]["betas"] == (0.9, 0.999)


def converted(arch, size=64, device="cuda"):
    """A network with statistics of its own, and the same for several processes on GPUs; both in eval mode."""
    torch.manual_seed(0)
    network = build_model(arch, 10, bn_momentum=0.3, bn_eps=1e-4)
    network(torch.randn(4, 3, size, size))
    processes = Processes(0, 2, 0, 2, torch.device(device))
    return network.eval(), processes.sync_batch_norm(copy.deepcopy(network)).eval()


@pytest.mark.parametrize("arch, size", [("timm/rexnet_100", 64), ("timm/levit_128s", 224), ("resnet18", 64)])
def test_synchronized_batch_norm_computes_and_decays_the_same(arch, size):
    (plain, synchronized), images = converted(arch, size), torch.randn(2, 3, size, size)
    norms = [m for m in plain.modules() if isinstance(m, _BatchNorm)]
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synchronized.modules()) == len(norms) > 0
    torch.testing.assert_close(synchronized(images), plain(images))  # torch's converter: off by 69.6 in rexnet_100
    groups = [
        [[tuple(p.shape) for p in group["params"]] for group in build_optimizer(
            network, "sgd", 0.1, 0.9, True, 1e-4, False).param_groups]
        for network in (plain, synchronized)
    ]  # fmt: skip
    assert groups[0] == groups[1] and len(groups[0][1]) == 2 * len(norms)


def test_a_run_with_synchronized_batch_norm_goes_on_with_one_process():
    _, synchronized = converted("timm/rexnet_100")
    runs = [
        Run(
            network, network, build_optimizer(network, "sgd", 0.1, 0.9, True, 1e-4, False),
            precision_of("fp32", torch.device("cpu")), Processes(0, 1, 0, 1, torch.device("cpu")),
            average_of(network, 0.9),
        )
        for network in (synchronized, build_model("timm/rexnet_100", 10, bn_momentum=0.3, bn_eps=1e-4).eval())
    ]  # fmt: skip
    runs[0].losses, images = torch.zeros(2), torch.randn(2, 3, 64, 64)
    runs[0].model(images).square().mean().backward()  # in eval mode: torch synchronizes on GPUs alone
    runs[0].optimizer_step()
    runs[1].restore(copy.deepcopy(runs[0].state()))
    torch.testing.assert_close(runs[1].model(images), runs[0].model(images))
    for run in runs:
        run.model(images).square().mean().backward()
        run.optimizer_step()
    for name, value in runs[0].validated.state_dict().items():
        torch.testing.assert_close(runs[1].validated.state_dict()[name], value)


def test_without_gpus_batch_norm_is_not_synchronized():
    with pytest.raises(BadInput, match=r"model\.sync_bn needs GPUs"):
        converted("resnet18", device="cpu")
    network = build_model("resnet18", 10)
    assert Processes(0, 1, 0, 1, torch.device("cpu")).sync_batch_norm(network) is network


@pytest.mark.parametrize(
    "arch, batch, size, says",
    [
        ("vit_b_16", 2, 64, "Expected 224 but got 64"),
        ("timm/swin_tiny_patch4_window7_224", 2, 64, "doesn't match model"),
        ("resnet18", 1, 32, "Expected more than 1 value per channel"),
        ("timm/rexnet_100", 1, 32, "Expected more than 1 value per channel"),
        ("inception_v3", 2, 64, "Output size is too small"),
    ],
)
def test_a_batch_that_a_network_does_not_take_is_named_before_it_comes(arch, batch, size, says):
    network, fits = build_model(arch, 10), 320 if arch == "inception_v3" else 224
    state, rng = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    shape = f"{batch} x 3 x {size} x {size}"
    with pytest.raises(BadInput, match=rf"{arch} does not take a batch of {shape} in training: .*{says}"):
        check_input(network, arch, batch, [fits, size])
    check_input(network.train(batch > 1), arch, batch, [fits])  # one image is enough in validation
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_what_the_optimizer_will_take_is_known_before_its_first_step():
    for name, moments in (("sgd", 1), ("adamw", 2), ("adamp", 2), ("lamb", 2)):
        model = nn.Linear(100, 100)
        optimizer = build_optimizer(model, name, 0.1, 0.9, True, 0.0, True)
        expected = optimizer_bytes(optimizer)
        model(torch.ones(1, 100)).sum().backward()
        optimizer.step()
        assert expected == moments * 4 * 10100 and 0 <= bytes_of(optimizer.state_dict()) - expected < 100


def test_learning_rate_follows_the_official_schedule():
    arguments = {"epochs": 300, "peak": 0.1, "warmup_lr": 0.0, "warmup_epochs": 5}
    assert learning_rate(0, decay_type="cos", **arguments) == 0
    assert learning_rate(2.5, decay_type="cos", **arguments) == pytest.approx(0.05)
    assert learning_rate(5, decay_type="cos", **arguments) == pytest.approx(0.1)
    assert learning_rate(152.5, decay_type="cos", **arguments) == pytest.approx(0.05)
    assert learning_rate(300, decay_type="cos", **arguments) == pytest.approx(0)
    assert learning_rate(152.5, decay_type="linear", **arguments) == pytest.approx(0.05)
    assert learning_rate(61, decay_type="step", **arguments) == pytest.approx(0.001)


def test_image_size_ramps_in_steps_of_32():
    ramp = Resolution(min_res=160, max_res=192, start_ramp=11, end_ramp=13)
    sizes = [ramp.at(e, 224) for e in range(16)]
    assert sizes == [160] * 12 + [192] * 4  # 176 rounds up
    ramp = Resolution(min_res=128, max_res=224, start_ramp=0, end_ramp=4)
    assert [ramp.at(e, 0) for e in range(6)] == [128, 160, 192, 192, 224, 224]
    assert Resolution().at(3, 224) == 224


class Oracle(nn.Module):
    """Reads the class from the first pixel."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        value = (images[:, 0, 0, 0] * 0.229 + 0.485) * 255
        return -((value[:, None] - torch.arange(6.0)) ** 2)


class Batches(list):
    """Looks like a loader over 7 samples of 6 classes."""

    num_classes = 6

    def __init__(self, batches):
        super().__init__(batches)
        self.labels = torch.cat([batch.labels for batch in batches]).numpy()

    def order_of(self, epoch):
        return np.arange(len(self.labels))

    def epoch(self, epoch):
        return iter(self)


@pytest.mark.parametrize("batch_norm", [True, False])
@torch._dynamo.config.patch(recompile_limit=8)
def test_each_image_size_is_compiled_once_with_constant_shapes(batch_norm):
    """More sizes than torch compiles without being asked to (8), some of which come again."""
    torch._dynamo.reset()
    layers = [nn.Conv2d(3, 4, 3), *([nn.BatchNorm2d(4)] if batch_norm else []), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    sizes = [*Resolution(min_res=32, max_res=384, start_ramp=1, end_ramp=20).sizes(30, 0)]
    assert len(sizes) == 12
    counter = CompileCounterWithBackend("eager")
    model = compiled(nn.Sequential(*layers), len(sizes), backend=counter)
    for size in (*sizes, *sizes[::-1], *sizes):
        model(torch.rand(2, 3, size, size)).sum().backward()
    assert counter.frame_count == 12
    inputs = {
        value.shape for graph in counter.graphs for node in graph.graph.nodes
        if node.op == "placeholder" and isinstance(value := node.meta["example_value"], torch.Tensor)
    }  # fmt: skip
    assert {torch.Size((2, 3, size, size)) for size in sizes} <= inputs
    assert all(isinstance(side, int) for shape in inputs for side in shape)  # none is a symbol
    torch._dynamo.reset()


def test_evaluate_counts_exactly():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    shown = torch.tensor([0, 1, 2, 3, 4, 4, 5])  # the last two are wrong; 5 -> 4 is in the top 5, 0 -> 5 is not
    images = shown.to(torch.uint8)[:, None, None, None].expand(7, 4, 4, 3)
    batches = Batches([Batch(images[:4], labels[:4]), Batch(images[4:], labels[4:])])
    multilabels = torch.zeros(7, 6, dtype=torch.bool)
    multilabels[torch.arange(7), labels] = True
    multilabels[5, 4] = True
    multilabels[0] = False  # does not count
    oracle = Oracle()
    result = evaluate(oracle, batches, precision_of("fp32", torch.device("cpu")), True, multilabels.numpy())
    assert oracle.seen == 14  # each image and its horizontal flip
    assert result["images"] == 7
    assert result["top_1"] == pytest.approx(100 * 5 / 7) and result["top_5"] == pytest.approx(100 * 6 / 7)
    assert result["multilabel"] == pytest.approx(100 * 5 / 6)


IDENTITY = Identity(("cat", "dog", "owl", "pig", "rat"), np.arange(5), ["cat/a.jpg", "dog/b.jpg"])


@pytest.mark.parametrize(
    "content",
    ["[[1]]", "[[1], [9]]", '[[1], "a"]', "{", "[[1], [true]]", "[[], []]", "{}", '{"cat/x.jpg": ["cat"]}',
     '{"cat/a.jpg": ["cow"]}', '{"cat/a.jpg": [0]}', "7", "null"],
)  # fmt: skip
def test_bad_multilabel_files_are_named(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(BadInput, match=r"m\.json"):
        read_multilabels(str(tmp_path / "m.json"), IDENTITY, 5)


def test_multilabel_files_go_by_name_or_in_order(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([[1, 2], []]))
    assert read_multilabels(str(tmp_path / "m.json"), IDENTITY, 5).sum(1).tolist() == [2, 0]
    (tmp_path / "m.json").write_text("\ufeff" + json.dumps({"dog/b.jpg": ["dog", "rat"]}))
    assert np.argwhere(read_multilabels(str(tmp_path / "m.json"), IDENTITY, 5)).tolist() == [[1, 1], [1, 4]]
    other = Identity(IDENTITY.classes, np.array([4, 3, 2, 1, 0]), IDENTITY.names)  # the network's order
    assert np.argwhere(read_multilabels(str(tmp_path / "m.json"), other, 5)).tolist() == [[1, 0], [1, 3]]
