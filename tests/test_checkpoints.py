"""A corpus of checkpoints, written here in each style that programs write: what is read, and what is refused."""

import argparse
import collections
import datetime
import functools
import io
import json
import pathlib
import pickle
import runpy
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from safetensors import safe_open
from torch import nn
from torch.optim.swa_utils import AveragedModel

from relabel.checkpoints import plain_names, read_checkpoint, read_file
from relabel.errors import BadInput
from relabel.models import build_model, head_layers, load_weights
from relabel.training.export import export_weights


def network(classes=4):
    layers = {"conv": nn.Conv2d(3, 5, 3), "bn": nn.BatchNorm2d(5), "head": nn.Linear(5, classes)}
    return nn.Sequential(collections.OrderedDict(layers))


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return network().state_dict()


FORMATS = {"zip": True, "legacy": False}  # with torch.save's _use_new_zipfile_serialization


def save(content, file, form="zip"):
    torch.save(content, file, _use_new_zipfile_serialization=FORMATS[form])
    return str(file)


def same(state, weights):
    return state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)


def foreign(monkeypatch, name, cls):
    """`cls` as if it came from the module of the dotted `name`, which is there only while the file is written."""
    module, _, cls.__qualname__ = name.rpartition(".")
    cls.__module__ = module
    for part in range(1, module.count(".") + 2):
        parent = ".".join(module.split(".")[:part])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    setattr(sys.modules[module], cls.__qualname__, cls)
    return cls


class _Dict(dict):
    """As Munch, EasyDict and yacs pickle themselves: items, then the same again as the state."""

    def __getstate__(self):
        return dict(self)

    def __setstate__(self, state):
        raise AssertionError("foreign code was run")


class _Object:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __new__(cls, *arguments, **keywords):
        return object.__new__(cls)


class _Slots:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1


BESIDE = {
    "numpy scalars": lambda _: {"lr": np.float64(0.1), "best": np.float32(1), "epoch": np.int64(3), "ok": np.bool_(1)},
    "numpy arrays": lambda _: [np.arange(3.0), np.array(["a", "b"]), np.array([1, "b", None], dtype=object)],
    "numpy dtypes": lambda _: (np.dtype("f4"), np.dtype([("a", "i4")])),
    "numpy's random state": lambda _: (np.random.default_rng(0), np.random.RandomState(0).get_state()),
    "argparse": lambda _: argparse.Namespace(lr=0.1, output=pathlib.Path("x"), names=["a"]),
    "paths": lambda _: {pathlib.PurePosixPath("x"): pathlib.Path("y")},
    "collections": lambda _: [collections.defaultdict(list, a=[1]), collections.deque([1], 3), collections.Counter()],
    "other data": lambda _: [datetime.datetime(2020, 1, 1), frozenset([1]), {1}, types.SimpleNamespace(a=1), slice(1)],
    "names that are only named": lambda _: [dict, torch.optim.SGD, nn.functional.relu, json.loads, eval],
    "Munch": lambda m: foreign(m, "munch.Munch", type("Munch", (_Dict,), {}))(a=1, b={"c": 2}),
    "OmegaConf": lambda m: foreign(m, "omegaconf.dictconfig.DictConfig", type("DictConfig", (_Object,), {}))(
        _metadata={"ref_type": list}, _content={"a": 1}
    ),
    "a class with slots": lambda m: foreign(m, "their.code.Slots", type("Slots", (_Slots,), {"__slots__": ()}))(),
    "torch's own": lambda _: [torch.Size([1]), torch.float16, torch.device("cpu"), nn.Parameter(torch.ones(1))],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("beside", BESIDE)
def test_what_stands_beside_the_weights_is_read_and_runs_nothing(weights, tmp_path, monkeypatch, form, beside):
    with monkeypatch.context() as patch:
        file = save({"epoch": 3, "args": BESIDE[beside](patch), "state_dict": weights}, tmp_path / "w.pth", form)
    state, where = read_checkpoint(file)
    assert same(state, weights) and where == ""
    assert not {"munch", "omegaconf", "their"} & sys.modules.keys()  # no foreign module was looked for
    assert read_file(file)["epoch"] == 3


def test_stand_ins_keep_what_was_in_them(weights, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        munch = foreign(patch, "munch.Munch", type("Munch", (_Dict,), {}))
        file = save(munch(state_dict=munch(weights), args=argparse.Namespace(lr=0.1)), tmp_path / "w.pth")
    content = read_file(file)
    assert content["args"] == content["args"] and content["args"]["lr"] == 0.1  # a Namespace's attributes are items
    assert same(read_checkpoint(file)[0], weights)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("core", ["core", "_core"])  # numpy 1 and 2
def test_official_checkpoints(weights, tmp_path, form, core):
    """As main.py of the official project saves them: its cosine schedule makes the learning rate a numpy.float64."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.1), momentum=0.9, nesterov=True)
    optimizer.param_groups[0]["lr"] = 0.5 * np.float64(0.1) * (1 + np.cos(1.0))
    content = {
        "epoch": 300, "arch": "resnet50", "best_acc1": np.float64(78.9), "optimizer": optimizer.state_dict(),
        "state_dict": {f"module.{key}": value for key, value in weights.items()},
    }  # fmt: skip
    file = save(content, tmp_path / "w.pth", form)
    renamed(tmp_path / "w.pth", b"numpy._core.multiarray", f"numpy.{core}.multiarray".encode())
    assert load_weights(model, file) == "" and same(model.state_dict(), weights)


def renamed(file, old, new):
    """Change a name in the pickles of a torch file."""
    if not zipfile.is_zipfile(file):
        assert old in file.read_bytes()
        file.write_bytes(file.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            assert old in data or not name.endswith("data.pkl")
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


class _Calls:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


HOSTILE = {
    "posix.system": lambda marker: _Calls(__import__("os").system, f"touch {marker}"),
    "builtins.eval": lambda marker: _Calls(eval, f"open({str(marker)!r}, 'w')"),
    "builtins.exec": lambda marker: _Calls(exec, f"open({str(marker)!r}, 'w')"),
    "builtins.getattr": lambda marker: _Calls(getattr, pathlib.Path(marker), "touch"),
    "subprocess.Popen": lambda marker: _Calls(subprocess.Popen, ["touch", str(marker)]),
    "functools.partial": lambda marker: _Calls(functools.partial, print, str(marker)),
    "torch.hub.load": lambda marker: _Calls(torch.hub.load, str(marker.parent), "entry", "local"),
    "torch.serialization.load": lambda marker: _Calls(torch.load, str(marker)),
    "pickle.loads": lambda marker: _Calls(pickle.loads, b"."),
    "runpy.run_path": lambda marker: _Calls(runpy.run_path, str(marker)),
    "io.open": lambda marker: _Calls(open, str(marker), "w"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(weights, tmp_path, form, name):
    marker = tmp_path / "marker"
    content = {"state_dict": weights, "x": HOSTILE[name](marker)}
    file = save(content, tmp_path / "w.pth", form)
    with pytest.raises(BadInput) as caught:
        load_weights(network(), file)
    message = str(caught.value)
    assert message.startswith(f"{file}: refused: unpickling it would call {name};")
    assert "nothing in it was executed" in message and "weights_only" not in message and "\n" not in message
    assert not marker.exists() and caught.value.__cause__ is None and caught.value.__suppress_context__


def test_the_hostile_files_are_hostile(tmp_path):
    """The corpus proves nothing if the files do nothing elsewhere."""
    for name in ("posix.system", "builtins.eval", "io.open"):
        marker = tmp_path / name
        torch.load(save(HOSTILE[name](marker), tmp_path / "w.pth"), weights_only=False)
        assert marker.exists()


def test_safetensors_and_shards(weights, tmp_path):
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "named.otherwise").write_bytes((tmp_path / "w.safetensors").read_bytes())
    for name in ("w.safetensors", "named.otherwise"):
        assert same(read_checkpoint(tmp_path / name)[0], weights)
    names = list(weights)
    for end, write in (("safetensors", safetensors.torch.save_file), ("bin", torch.save)):
        shards = [f"model-0000{n}-of-00002.{end}" for n in (1, 2)]
        for shard, part in zip(shards, (names[:4], names[4:]), strict=True):
            write({name: weights[name] for name in part}, tmp_path / shard)
        places = {name: shards[position >= 4] for position, name in enumerate(names)}
        index = tmp_path / f"model.{end}.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
        model = network()
        assert load_weights(model, str(index)) == "" and same(model.state_dict(), weights)
        index.write_text(json.dumps({"weight_map": places | {"tail.weight": shards[1]}}))
        with pytest.raises(BadInput, match=rf"{shards[1]}: lacks tail\.weight"):
            read_checkpoint(index)
        (tmp_path / shards[0]).unlink()
        with pytest.raises(BadInput, match=rf"{shards[0]}: no such checkpoint"):
            read_checkpoint(index)
    for text in ('{"weight_map": {"a": "../a.bin"}}', "[]", "{", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(BadInput, match="not the index of a checkpoint in shards"):
            read_checkpoint(index)


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
def test_a_file_that_was_cut_off_is_one_line(weights, tmp_path, form):
    file = tmp_path / "w"
    file.write_bytes(safetensors.torch.save(weights)) if form == "safetensors" else save(weights, file, form)
    whole = file.read_bytes()
    for length in (0, 1, 9, 40, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:length])
        with pytest.raises(BadInput) as caught:
            read_checkpoint(file)
        message = str(caught.value)
        assert message.startswith(f"{file}: not a checkpoint that can be read safely (") and "\n" not in message
        assert "weights_only" not in message


def test_formats_that_cannot_be_read_say_what_to_do(weights, tmp_path):
    file = tmp_path / "w.pth"
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(BadInput, match=r"tar format of torch 0\.1"):
        read_checkpoint(file)
    torch.jit.trace(network()[:2].eval(), torch.zeros(1, 3, 8, 8)).save(str(file))
    with pytest.raises(BadInput, match="TorchScript archive"):
        read_checkpoint(file)
    torch.save(weights, file, pickle_protocol=4)
    with pytest.raises(BadInput, match="pickled with protocol 4"):
        read_checkpoint(file)
    for form in FORMATS:
        save(network(), file, form)
        with pytest.raises(BadInput, match=r"a pickled network, whose code is needed: save its state_dict\(\)"):
            read_checkpoint(file)
    for content in ([1], {"state_dict": {}}, {"state_dict": {"a": 1}}, {"epoch": 3}, torch.zeros(3)):
        save(content, file)
        with pytest.raises(BadInput, match="holds no state dict of tensors"):
            read_checkpoint(file)
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("a.txt", "a")
    with pytest.raises(BadInput, match="a zip file, but not torch's"):
        read_checkpoint(file)


WRAPPERS = ["", "module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.", "module.module.",
            "model._orig_mod.module.module."]  # fmt: skip


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_what_wrappers_put_before_the_names_comes_off(weights, tmp_path, prefix):
    file, model = save({prefix + key: value for key, value in weights.items()}, tmp_path / "w.pth"), network()
    assert load_weights(model, file) == "" and same(model.state_dict(), weights)


def test_prefixes_stay_where_the_network_has_them_or_not_all_names_do():
    own = {"model.a": 0, "model.b": 0}
    assert plain_names({"module.model.a": 0, "module.model.b": 0}, own) == own == plain_names(own, own)
    assert plain_names({"model.a": 0, "b": 0}, {"a": 0, "c": 0}) == {"model.a": 0, "b": 0}
    assert plain_names({"n_averaged": 0}, {"a": 0}) == {}


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.DataParallel(m), torch.compile])
def test_real_wrappers(weights, tmp_path, wrap):
    model = network()
    model.load_state_dict(weights)
    for wrapped in (wrap(model), wrap(AveragedModel(model)), AveragedModel(wrap(model))):
        content = wrapped.state_dict()
        other = network()
        assert load_weights(other, save(content, tmp_path / "w.pth")) == "" and same(other.state_dict(), weights)


def test_the_container_to_take_and_to_say(weights, tmp_path):
    average = {key: value + 1 for key, value in weights.items()}
    for key in ("ema", "model_ema", "state_dict_ema"):  # ours; torchvision's and timm's; timm's older
        content = {"model": weights, "state_dict": weights, key: average, "optimizer": {"state": {}}}
        state, where = read_checkpoint(save(content, tmp_path / "w.pth"))
        assert where == key and same(state, average)
        assert read_checkpoint(save(content | {key: None}, tmp_path / "w.pth"))[1] == "model"
    for key in ("model", "state_dict", "network", "net", "weights"):
        assert same(read_checkpoint(save({key: weights}, tmp_path / "w.pth"))[0], weights)
    assert same(read_checkpoint(save({"model": {"state_dict": weights}}, tmp_path / "w.pth"))[0], weights)
    model = network()
    assert load_weights(model, save({"model": weights, "ema": average}, tmp_path / "w.pth")) == "its ema"


def test_auxiliary_heads_are_left_out_and_said(tmp_path):
    theirs = torchvision.models.googlenet(weights=None, num_classes=10, init_weights=False, aux_logits=True)
    ours = build_model("googlenet", 10)
    said = load_weights(ours, save({f"module.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "w.pth"))
    assert said == "without its auxiliary heads aux1, aux2"
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    inception = {**network().state_dict(), "AuxLogits.fc.weight": torch.zeros(1)}
    assert load_weights(network(), save(inception, tmp_path / "w.pth")) == "without its auxiliary heads AuxLogits"
    with pytest.raises(BadInput, match=r"Unexpected key.*aux9\.fc"):
        load_weights(network(), save({**network().state_dict(), "aux9.fc": torch.zeros(1)}, tmp_path / "w.pth"))


def test_heads_of_another_size_are_known_by_name(tmp_path):
    for arch, heads in (("resnet18", ["fc"]), ("timm/deit_tiny_distilled_patch16_224", ["head", "head_dist"])):
        model = build_model(arch, 4)
        assert head_layers(model) == heads
        file = save(build_model(arch, 6).state_dict(), tmp_path / "w.pth")
        assert load_weights(model, file, new_head=True) == f"{', '.join(heads)} is re-initialized, for other classes"
        with pytest.raises(BadInput, match="does not fit the network"):
            load_weights(model, file)


# --- out ------------------------------------------------------------------------------------------------------


def exported(arch, folder, **keywords):
    torch.manual_seed(0)
    model = build_model(arch, 12, **keywords).to(memory_format=torch.channels_last)
    settings = {"model.arch": arch, "model.num_classes": 12, "optim.epochs": 3}
    export_weights(model, folder, settings, {"top_1": 78.9})
    return model.eval().to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("arch", ["rexnet_100", "test_vit", "resnet18"])
def test_timm_takes_the_weights_of_a_run(tmp_path, arch, name):
    ours, images = exported(f"timm/{arch}", tmp_path), torch.randn(2, 3, 160, 160)
    theirs = timm.create_model(arch, num_classes=12, checkpoint_path=str(tmp_path / name)).eval()
    assert same(theirs.state_dict(), ours.state_dict())
    torch.testing.assert_close(ours(images), theirs(images))
    again = build_model(f"timm/{arch}", 12)
    assert load_weights(again, str(tmp_path / name)) == "" and same(again.state_dict(), ours.state_dict())


def test_torchvision_and_its_detectors_take_the_weights_of_a_run(tmp_path):
    ours, images = exported("resnet50", tmp_path), torch.randn(2, 3, 64, 64)
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        card = file.metadata()
    assert card["format"] == "pt" and card["arch"] == "resnet50" and card["num_classes"] == "12"
    assert json.loads(card["measured"]) == {"top_1": 78.9} and json.loads(card["settings"])["optim.epochs"] == 3
    head = {f"{layer}.{part}" for layer in json.loads(card["head"]) for part in ("weight", "bias")}
    for state in (
        torch.load(tmp_path / "weights.pth", weights_only=True),
        safetensors.torch.load_file(tmp_path / "weights.safetensors"),
    ):
        theirs = torchvision.models.resnet50(num_classes=12)
        theirs.load_state_dict(state)
        assert same(theirs.state_dict(), ours.state_dict())
        torch.testing.assert_close(ours(images), theirs.eval()(images))
    body = {key: value for key, value in state.items() if key not in head}
    assert state.keys() - body.keys() == {"fc.weight", "fc.bias"}
    for detector in ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"):
        backbone = torchvision.models.get_model(detector, weights=None, weights_backbone=None).backbone.body.eval()
        backbone.load_state_dict(body)  # strict
        with torch.inference_mode():
            features = torchvision.models.feature_extraction.create_feature_extractor(ours, ["layer4"])(images)
            torch.testing.assert_close(backbone(images)["3"], features["layer4"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.pth", "weights.safetensors"]


def test_a_plain_network_refuses_the_weights_of_one_with_blurpool(tmp_path):
    ours = exported("resnet18", tmp_path, use_blurpool=True)
    with pytest.raises(RuntimeError, match=r"layer2\.0\.conv1\.conv\.weight"):
        torchvision.models.resnet18(num_classes=12).load_state_dict(torch.load(tmp_path / "weights.pth"))
    again = build_model("resnet18", 12, use_blurpool=True)
    load_weights(again, str(tmp_path / "weights.safetensors"))
    assert same(again.state_dict(), ours.state_dict())
