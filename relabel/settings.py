"""Settings of a command: frozen dataclasses, filled by fastargs from YAML files and the command line.

A command declares its settings once, as nested dataclasses whose fields are made by `setting` and `group`; from them
come the fastargs sections, `--help`, the checks, and the types that mypy sees: `settings.optim.lr.init` is a float.
Nothing is registered when a command is imported.

fastargs ignores keys it does not know, takes `--x=False` for true and exits with code 0 on a bad value.
Here each of these is one clear error and exit code 2.
"""

import argparse
import dataclasses
import difflib
import inspect
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import yaml
from fastargs import Param, Section
from fastargs.config import Config
from fastargs.dict_utils import expand_keys, fix_dict
from fastargs.exceptions import MissingValueError, ValidationError
from fastargs.validation import Checker

ROOT = Path(__file__).parent.parent  # of the commands and of `rn50_configs`, in a checkout as when installed
S = TypeVar("S")


def setting(checker: Checker | type, meaning: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that is one setting.

    Args:
        checker: what values are accepted: `Flag()`, `Number(...)`, `Choice(...)`, or `str`.
        meaning: one line for `--help`, with the unit.
        default: without one the setting is required.
    """
    required = default is dataclasses.MISSING
    param = Param(checker, meaning, required=required, default=None if required else default)
    return dataclasses.field(default=default, metadata={"param": param})


def group(settings: type[S]) -> S:
    """A dataclass field that is a group of settings, itself a dataclass of `setting`s and groups."""
    return dataclasses.field(default_factory=settings)


class Flag(Checker):
    """A boolean that also understands the words of a command line."""

    WORDS: ClassVar = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

    def check(self, value: Any) -> bool:
        return self.WORDS[str(value).lower()]

    def help(self) -> str:
        return "True or False"


class Number(Checker):
    """A finite number (or, with `whole=True`, an integer) within bounds, inclusive."""

    def __init__(self, least: float = -math.inf, greatest: float = math.inf, whole: bool = False) -> None:
        self.least, self.greatest, self.whole = least, greatest, whole

    def check(self, value: Any) -> float | int:
        number = float(value)
        if not math.isfinite(number) or not self.least <= number <= self.greatest:
            raise ValueError(value)
        if self.whole:
            if number != int(number):
                raise ValueError(value)
            return int(number)
        return number

    def help(self) -> str:
        kind = "an integer" if self.whole else "a number"
        bounds = [f"{self.least:g} or more"] if self.least > -math.inf else []
        bounds += [f"at most {self.greatest:g}"] if self.greatest < math.inf else []
        return f"{kind}{', ' if bounds else ''}{', '.join(bounds)}"


class Choice(Checker):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def check(self, value: Any) -> str:
        if value not in self.words:
            raise ValueError(value)
        return value

    def help(self) -> str:
        return " | ".join(self.words)


# Names of the official project's base.yaml that have another name here, and --resume.
OFFICIAL_NAMES = {
    "resume": ("logging.resume", None),
    "data.dataset": (None, {"imagenet": ""}),
    "compute.num_workers": ("data.num_workers", None),
    "compute.opt_level": ("compute.precision", {"O0": "fp32", "O1": "auto", "O2": "auto"}),
    "compute.distributed.num_processes_per_node": (None, {"1": ""}),  # there a factor on the number of GPUs
    "util.val_batch_size": ("validation.batch_size", None),
}
Translations = dict[str, tuple[str | None, dict[str, str] | None]]


def load_settings(kind: type[S], description: str, translations: Translations | None = None) -> S:
    """Read `--config-file` YAMLs, in order, then the command line, into a command's settings.

    Args:
        kind: a dataclass of `group`s, one a section; a section's docstring describes it.
        description: the head of `--help`; the table of all settings follows it.
        translations: other names that are understood: name -> (ours, None for one that is accepted and changes
            nothing; and what its values are called here, None where they are the same).

    Raises:
        SystemExit: code 2 with one message that names an unknown key (and the nearest known one), an unreadable
            file, a missing or bad value.
    """
    for stream in (sys.stdout, sys.stderr):  # file names that are not UTF-8 are shown, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    translations = translations or {}
    config = _config_of(kind)
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_table(config, translations),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-C",
        "--config-file",
        "--config-file-path",
        action="append",
        default=[],
        help="YAML file of settings, one of yours or of rn50_configs/; repeatable, later ones override earlier ones; "
        "a file's key `base: FILE.yaml`, relative to itself, names another whose settings it overrides",
    )
    arguments, rest = parser.parse_known_args()
    known = {".".join(path) for path in config.entries} | set(translations)
    for file in arguments.config_file:
        own = ROOT / file  # e.g. rn50_configs/relabel_rn50.yaml, from wherever the command is called
        path = own if own.exists() and not Path(file).exists() else Path(file)
        config.collect(_read_yaml(path, known, translations))
    config.collect(_translated(_read_command_line(rest, known), translations))
    for path, entry in config.entries.items():
        name = ".".join(path)
        try:
            config[path]
        except MissingValueError:
            _stop(f"--{name} is missing: {entry.desc}")
        except ValidationError:
            _stop(f"--{name} is {config.content.get(path)!r}; must be {entry.checker.help()} ({entry.desc})")
    return _resolve(kind, config)


def as_dict(settings: Any) -> dict[str, Any]:
    """Every setting with the value in force, by its dotted name: what config.yaml and checkpoints hold."""
    return {".".join(path): value for path, _, value in _leaves(type(settings), settings)}


def _leaves(kind: Any, values: Any = None, prefix: tuple = ()) -> Iterator[tuple[tuple, Param, Any]]:
    """`(path, param, value)` of each setting below the dataclass `kind`."""
    for field in dataclasses.fields(kind):
        value, path = getattr(values, field.name, None), (*prefix, field.name)
        if "param" in field.metadata:
            yield path, field.metadata["param"], value
        else:
            yield from _leaves(field.default_factory, value, path)


def _config_of(kind: Any) -> Config:
    config = Config()
    for field in dataclasses.fields(kind):
        section = Section(field.name, inspect.cleandoc(field.default_factory.__doc__ or ""), config)
        section.params(**{".".join(path): param for path, param, _ in _leaves(field.default_factory)})
    return config


def _resolve(kind: Any, config: Config, prefix: tuple = ()) -> Any:
    values = {}
    for field in dataclasses.fields(kind):
        path = (*prefix, field.name)
        is_setting = "param" in field.metadata
        values[field.name] = config[path] if is_setting else _resolve(field.default_factory, config, path)
    return kind(**values)


def _stop(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def _check_known(key: str, known: set[str], where: str) -> None:
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; --help lists the settings"
    _stop(f"unknown setting {key} in {where}{hint}")


def _translated(values: dict[str, Any], translations: Translations) -> dict[str, Any]:
    """`values` under our names; a setting's own name takes precedence over a translated one."""
    result = {}
    for key, value in values.items():
        if key in translations:
            name, words = translations[key]
            if words is not None and str(value) not in words:
                _stop(f"--{key} is {value!r}; must be one of {', '.join(words)}")
            if name is not None and name not in values:
                result[name] = value if words is None else words[str(value)]
        else:
            result[key] = value
    return result


def _read_yaml(
    file: Path, known: set[str], translations: Translations, children: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """A YAML file's settings, under our names, over those of its `base`; `children` are the files it is a base of."""
    if file.resolve() in [child.resolve() for child in children]:
        _stop(f"config file {file} is its own base: {' -> '.join(map(str, (*children, file)))}")
    origin = f" (the base of {children[-1]})" if children else ""
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        _stop(f"cannot read config file {file}{origin}: {error}")
    if not isinstance(content, dict):
        _stop(f"config file {file}{origin} must hold sections of settings, found {type(content).__name__}")
    inherited: dict[str, Any] = {}
    if "base" in content:
        base = content.pop("base")
        if not isinstance(base, str) or not base:
            _stop(f"config file {file}: base is {base!r}; must be the path of a YAML file, relative to this one")
        inherited = _read_yaml(file.parent / base, known, translations, (*children, file))
    values = _flat(fix_dict(expand_keys(content)))
    for key in values:
        _check_known(key, known, str(file))
    return inherited | _translated(values, translations)


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, branch in tree.items():
        leaves |= _flat(branch, f"{prefix}{key}.") if isinstance(branch, dict) else {f"{prefix}{key}": branch}
    return leaves


def _read_command_line(words: list[str], known: set[str]) -> dict[str, str]:
    values, words = {}, list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            _stop(f"did not expect {word!r} on the command line; settings are --name=value")
        key, equals, value = word[2:].partition("=")
        _check_known(key, known, "the command line")
        if not equals:
            if not words or words[0].startswith("--"):
                _stop(f"--{key} needs a value: --{key}=VALUE")
            value = words.pop(0)
        values[key] = value
    return values


def _table(config: Config, translations: Translations) -> str:
    lines = ["settings (--name=value, or in a YAML file):"]
    for section, paths in config.sections_to_entries.items():
        lines.append(f"\n{'.'.join(section)}: {config.sections[section].desc}")
        for path in paths:
            entry = config.entries[path]
            default = "required" if entry.required else f"default {entry.default!r}"
            lines.append(f"  --{'.'.join(path):32s} {entry.desc} [{entry.checker.help()}; {default}]")
    if translations:
        lines.append("\nother names that are understood, the official project's among them:")
    for name, (ours, words) in translations.items():
        values = f" [{', '.join(words)}]" if words else ""
        lines.append(f"  --{name:32s} {f'--{ours}' if ours else 'accepted; changes nothing'}{values}")
    return "\n".join(lines)
