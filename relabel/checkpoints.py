"""Checkpoints of any origin, read without running code from them: torch's formats, safetensors, shards of both.

torch's `weights_only` unpickler does the reading: it builds tensors and plain containers, and knows foreign names only
as far as it is told. Here it is told of a stand-in for every foreign name in the file: an empty class that keeps items
and attributes and runs nothing, for whatever stands beside the weights (`argparse.Namespace`, Munch, OmegaConf, numpy's
scalars and arrays, paths, ...). No foreign module is imported. Unpickling builds such objects; a file that *calls*
something which is not the constructor of plain data is refused.
"""

import _compat_pickle
import json
import pickletools
import tarfile
import warnings
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from .errors import BadInput

# Where programs keep weights, those to take first: averaged ones (ours; torchvision's; timm's), then others (`model`:
# ours, torchvision, DeiT; `state_dict`: the official project, timm, Lightning, open_clip).
CONTAINERS = ("ema", "model_ema", "state_dict_ema", "model", "state_dict", "network", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, AveragedModel; torch.compile; Lightning
# Constructors of plain data, which pickle calls; their stand-ins may be called. Everything else that is called is code.
PLAIN = {
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *(f"numpy.random._pickle.__{name}_ctor" for name in ("generator", "bit_generator", "randomstate")),
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
    "numpy.dtype", "numpy.ndarray", "collections.defaultdict", "collections.deque", "types.SimpleNamespace",
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in (
        "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"builtins.{name}" for name in (
        "bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "copyreg._reconstructor", "decimal.Decimal", "fractions.Fraction", "uuid.UUID",
}  # fmt: skip
NETWORK = "a pickled network, whose code is needed: save its state_dict()"
BLOCKED = ("os", "posix", "nt", "sys")  # torch refuses these modules whatever it is told


class _WouldRun(Exception):
    """A file asks for a call of what is not plain data; the argument names it."""


class _StandInType(type):
    """Of the stand-ins: what pickle may do with them, where an unpickler of torch's asks."""

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        if cls.__name__ not in PLAIN:
            raise _WouldRun(cls.__name__)
        if cls.__name__ == "collections.deque":
            return []  # torch appends to lists alone
        return dict.__new__(cls)  # type: ignore[arg-type]

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is dict  # torch sets items of `dict` alone, and asks by ==

    __hash__ = type.__hash__


def _stand_in(name: str) -> _StandInType:
    """An inert class for the foreign name `MODULE.NAME`: instances keep items, and attributes as items."""

    def new(cls: type, *arguments: Any, **keywords: Any) -> Any:
        return dict.__new__(cls)

    def set_state(self: dict, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # attributes, or (attributes, slots)
            if isinstance(part, dict):
                dict.update(self, part)

    methods = {"__new__": new, "__setstate__": set_state, "__hash__": object.__hash__, "__eq__": object.__eq__}
    return _StandInType(name, (dict,), methods)


def read_file(file: str | Path, device: torch.device | str = "cpu") -> Any:
    """What a checkpoint file holds, its tensors on `device`; foreign objects as inert stand-ins.

    Args:
        file: what torch.save wrote (also its format before zip files), a safetensors file, or the `*.index.json` of
            a checkpoint in shards of either (Hugging Face's).

    Raises:
        BadInput: no such file, none of these, damaged, or it would run code; nothing in it was run.
    """
    path = Path(file)
    if not path.is_file():
        raise BadInput(f"{file}: no such checkpoint")
    if path.suffix == ".json":
        return _read_shards(path, device)
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path, device=str(device))
        names = _foreign_names(path)
        for name in names:
            if name.partition(".")[0] in BLOCKED:
                raise _WouldRun(name)
        known = [(_stand_in(name), name) for name in names]
        with torch.serialization.safe_globals(known), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # of other pickle protocols, before they fail; of old storages
            return torch.load(path, map_location=device, weights_only=True)
    except _WouldRun as call:
        module, _, name = str(call).rpartition(".")
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)  # torch leaves some of Python 2's names
        raise BadInput(
            f"{file}: refused: unpickling it would call {module}.{name}; nothing in it was executed. "
            "Where you trust it, save the state_dict() alone with the program that wrote it"
        ) from None
    except BadInput:
        raise
    except Exception as error:  # a damaged or hostile file can make a reader fail in any way
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # not torch's advice before it
        reason = said.splitlines()[0] if said else type(error).__name__
        if "persistent_load of storage" in reason:  # zip-less files keep a network's source code there
            reason = NETWORK
        raise BadInput(f"{file}: not a checkpoint that can be read safely ({reason})") from None


def saved_classes(file: str | Path) -> tuple[str, ...] | None:
    """The class list that a checkpoint of ours, or a `weights.safetensors`, was saved with; None: it has none.

    Raises:
        BadInput: as `read_file` does.
    """
    classes = _saved_beside(Path(file), "classes")
    return tuple(map(str, classes)) if isinstance(classes, list | tuple) else None


def saved_settings(file: str | Path) -> dict[str, Any]:
    """The settings, by dotted name, of the run that a checkpoint of ours is from; empty: it says none.

    Raises:
        BadInput: as `read_file` does.
    """
    settings = _saved_beside(Path(file), "settings")
    return settings if isinstance(settings, dict) else {}


def _saved_beside(path: Path, name: str) -> Any:
    """What a checkpoint of ours, or a `weights.safetensors`, holds beside the weights; None: not that."""
    if path.is_file() and _is_safetensors(path):
        with safetensors.safe_open(path, "pt") as content:
            return json.loads((content.metadata() or {}).get(name, "null"))
    content = read_file(path)
    return content.get(name, getattr(content, name, None)) if isinstance(content, dict) else None


def read_checkpoint(file: str | Path) -> tuple[dict[str, torch.Tensor], str]:
    """The weights in a checkpoint, under the names that it has.

    Returns:
        The state dict; and where in the file it is, if there are others: `ema` of a run of ours, `model_ema`, ...

    Raises:
        BadInput: as `read_file`; or it holds no state dict of tensors.
    """
    content = read_file(file)
    found = dict(_state_dicts(content))
    if not found:
        network = isinstance(content, dict) and "_modules" in content
        raise BadInput(f"{file}: holds no state dict of tensors" + (f" but {NETWORK}" if network else ""))
    where, state = next(iter(found.items()))
    return state, where if len(found) > 1 else ""


def plain_names(state: dict[str, torch.Tensor], own: Collection[str]) -> dict[str, torch.Tensor]:
    """`state` under the network's `own` names: without what wrappers put before all names, in whatever order."""
    while not any(key in own for key in state):
        state = {key: value for key, value in state.items() if key != "n_averaged"}  # AveragedModel's counter
        prefix = next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _state_dicts(content: Any, where: str = "") -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """`(place, state dict)` of each one in the containers, those to take first before others."""
    if not isinstance(content, dict):
        return
    if content and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        yield where, dict(content)
        return
    for key in CONTAINERS:
        yield from _state_dicts(content.get(key), f"{where}.{key}".lstrip("."))


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return 0 < int.from_bytes(head[:8], "little") <= path.stat().st_size - 8 and head[8:] == b"{"


def _read_shards(index: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError("a shard in another folder")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BadInput(f"{index}: not the index of a checkpoint in shards ({error!r})") from None
    state: dict[str, torch.Tensor] = {}
    for shard in shards:
        content = read_file(index.with_name(shard), device)
        if not isinstance(content, dict):
            raise BadInput(f"{index.with_name(shard)}: holds no state dict of tensors")
        state |= content
    missing = [name for name in places if name not in state]
    if missing:
        raise BadInput(f"{index.with_name(places[missing[0]])}: lacks {missing[0]}, which {index.name} says it holds")
    return state


def _foreign_names(path: Path) -> set[str]:
    """The globals that a torch file refers to, as `MODULE.NAME`; nothing is unpickled."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
            if any(entry.endswith("/constants.pkl") for entry in entries):
                raise BadInput(f"{path}: a TorchScript archive, which is a program: save the network's state_dict()")
            pickles = [entry for entry in entries if entry.endswith("/data.pkl")]
            if not pickles:
                raise ValueError("a zip file, but not torch's")
            with archive.open(pickles[0]) as file:
                return set(_globals(file))
    if tarfile.is_tarfile(path):
        raise BadInput(
            f"{path}: in the tar format of torch 0.1, which cannot be read without running it: "
            "load it with a torch of its time where you trust it, and save it again"
        )
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            raise ValueError("a zip file that was cut off")
        file.seek(0)  # magic number, version, system, content: a pickle each
        return {name for _ in range(4) for name in _globals(file)}


def _globals(file: IO[bytes]) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "PROTO" and int(argument or 0) > 2:
            raise ValueError(f"pickled with protocol {argument}; torch reads its own, 2: torch.save it without another")
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"
