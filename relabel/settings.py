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
import os
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

from .dialects import Dialect
from .errors import BadInput

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

    WORDS: ClassVar = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(
        ("false", "f", "no", "n", "0"), False
    )

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


class Files(Checker):
    """A file, a pattern as `train-*.beton`, or several with commas between; in YAML also as a list."""

    def check(self, value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    def help(self) -> str:
        return "a file, a pattern, or several with commas between"


class Shard(Checker):
    """`K/N`, the K-th of N parts; empty: all."""

    def check(self, value: str) -> str:
        if not value:
            return ""
        number, count = map(int, str(value).split("/"))
        if not 1 <= number <= count:
            raise ValueError(value)
        return f"{number}/{count}"

    def help(self) -> str:
        return "K/N, from 1/N to N/N"


class Choice(Checker):
    """One of some words, in any case."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def check(self, value: Any) -> str:
        return {word.lower(): word for word in self.words}[str(value).lower()]

    def help(self) -> str:
        return " | ".join(self.words)


def load_settings(kind: type[S], description: str, dialect: Dialect | None = None) -> S:
    """Read `--config-file` YAMLs, in order, then the command line, into a command's settings.

    Args:
        kind: a dataclass of `group`s, one a section; a section's docstring describes it.
        description: the head of `--help`; the table of all settings follows it.
        dialect: how another project writes them, which is understood too. A file given by its own option,
            `--config-file-path`, that holds no other names is that project's, and has its `base` under it.

    Raises:
        SystemExit: code 2 with one message that names an unknown key (and the nearest known one), an unreadable
            file, a missing or bad value.
    """
    for stream in (sys.stdout, sys.stderr):  # file names that are not UTF-8 are shown, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    dialect = dialect or Dialect({})
    config = _config_of(kind)
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_table(config, dialect),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-C",
        "--config-file",
        action="append",
        default=[],
        type=lambda file: (file, False),
        help="YAML file of settings, one of yours or of rn50_configs/; repeatable, later ones override earlier ones; "
        "a file's key `base: FILE.yaml`, relative to itself, names another whose settings it overrides",
    )
    parser.add_argument(
        "--config-file-path",
        "--config_file_path",
        action="append",
        dest="config_file",
        type=lambda file: (file, True),
        help="the same"
        + "; a file of the official project, which has the values of its base.yaml under it" * bool(dialect.base),
    )
    arguments, rest = parser.parse_known_args()
    try:
        config.collect(_given(arguments.config_file, rest, config, dialect))
    except BadInput as error:
        _stop(str(error))
    for path, entry in config.entries.items():
        name = ".".join(path)
        try:
            config[path]
        except MissingValueError:
            _stop(f"--{name} is missing: {entry.desc}")
        except ValidationError:
            _stop(f"--{name} is {config.content.get(path)!r}; must be {entry.checker.help()} ({entry.desc})")
    return _resolve(kind, config)


def _given(files: list[tuple[str, bool]], words: list[str], config: Config, dialect: Dialect) -> dict[str, Any]:
    """The values of the files, (path, whether by the dialect's option), and of the command line, under our names."""
    known = {".".join(path) for path in config.entries} | set(dialect.names)
    given: dict[str, Any] = {}
    official = []
    for file, by_its_option in files:
        own = ROOT / file  # e.g. rn50_configs/relabel_rn50.yaml, from wherever the command is called
        path = own if own.exists() and not Path(file).exists() else Path(file)
        values, keys = _read_yaml(path, known, dialect)
        given |= values
        foreign = sorted(keys - dialect.base.keys() - dialect.more)
        if by_its_option and dialect.base and not foreign:
            official.append(str(path))
        elif by_its_option and dialect.base:
            _say(f"{path}: read as this project's own, not the official one's, which has no {foreign[0]}")
    flags = {".".join(path) for path, entry in config.entries.items() if isinstance(entry.checker, Flag)}
    given |= dialect.translated(_read_command_line(words, known, flags))
    if official:
        base = dialect.base_under(given)
        _say(f"{', '.join(official)}: of the official project; from its base.yaml come {_new(base, config)}")
        given = base | given
    return given


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


def _say(line: str) -> None:
    """Print a line, once where several processes were started."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _new(values: dict[str, Any], config: Config) -> str:
    """Those of `values` that are not the defaults here, in words."""
    entries = {".".join(path): entry for path, entry in config.entries.items()}
    return ", ".join(f"{n}={v}" for n, v in values.items() if entries[n].default != v) or "no other values"


def _stop(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def _check_known(key: str, known: set[str], where: str) -> None:
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; --help lists the settings"
    _stop(f"unknown setting {key} in {where}{hint}")


def _read_yaml(
    file: Path, known: set[str], dialect: Dialect, children: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], set[str]]:
    """A YAML file's settings, under our names, over those of its `base`; and the keys that stand in it.

    `children` are the files it is a base of.
    """
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
    own = {"base"} & content.keys()
    if own:
        base = content.pop("base")
        if not isinstance(base, str) or not base:
            _stop(f"config file {file}: base is {base!r}; must be the path of a YAML file, relative to this one")
        inherited, _ = _read_yaml(file.parent / base, known, dialect, (*children, file))
    values = _flat(fix_dict(expand_keys(content)))
    for key in values:
        _check_known(key, known, str(file))
    return inherited | dialect.translated(values), own | values.keys()


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, branch in tree.items():
        leaves |= _flat(branch, f"{prefix}{key}.") if isinstance(branch, dict) else {f"{prefix}{key}": branch}
    return leaves


def _read_command_line(words: list[str], known: set[str], flags: set[str]) -> dict[str, str]:
    """`--name=value` and `--name value`; one of `flags` alone is true."""
    values, words = {}, list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            _stop(f"did not expect {word!r} on the command line; settings are --name=value")
        key, equals, value = word[2:].partition("=")
        _check_known(key, known, "the command line")
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif key in flags:
                value = "true"
            else:
                _stop(f"--{key} needs a value: --{key}=VALUE")
        values[key] = value
    return values


def _table(config: Config, dialect: Dialect) -> str:
    lines = ["settings (--name=value, or in a YAML file):"]
    for section, paths in config.sections_to_entries.items():
        lines.append(f"\n{'.'.join(section)}: {config.sections[section].desc}")
        for path in paths:
            entry = config.entries[path]
            default = "required" if entry.required else f"default {entry.default!r}"
            lines.append(f"  --{'.'.join(path):32s} {entry.desc} [{entry.checker.help()}; {default}]")
    if dialect.names:
        lines.append("\nother names that are understood, the official project's among them:")
    for name, other in dialect.names.items():
        values = f" [{', '.join(other.words)}]" if other.words else ""
        ours = f"--{other.ours}" if other.ours else "accepted; changes nothing"
        lines.append(f"  --{name:32s} {ours}{values}")
    return "\n".join(lines)
