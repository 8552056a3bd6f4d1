"""Settings as another project writes them: its names, its words, and the file that it has under all others."""

import dataclasses
from typing import Any

from .errors import BadInput


@dataclasses.dataclass(frozen=True)
class OtherName:
    """What a setting is called elsewhere.

    Args:
        ours: its name here; None: accepted, and changes nothing.
        words: what its values are called there, in any case -> here; None: the same.
        why: why other values are refused.
    """

    ours: str | None
    words: dict[str, str] | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How another project writes settings that mean the same.

    Args:
        names: its names for ours; an own name takes precedence over it.
        base: values, by its names, that lie under every file of that project.
        more: the other names that its files hold.
        superseded: name in `base` -> settings of ours that stand for it: where one is given, that value is left out.
    """

    names: dict[str, OtherName]
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    more: frozenset[str] = frozenset()
    superseded: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def base_under(self, given: dict[str, Any]) -> dict[str, Any]:
        """`base`, under our names, as it lies under the values `given`."""
        left_out = {name for name, ours in self.superseded.items() if given.keys() & set(ours)}
        base = {name: value for name, value in self.base.items() if name not in left_out}
        return {name: value for name, value in self.translated(base).items() if name not in given}

    def translated(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` under our names; a setting's own name takes precedence over another's.

        Raises:
            BadInput: a value is none of its setting's.
        """
        result = {}
        for key, value in values.items():
            name = self.names.get(key, OtherName(key))
            if name.words is not None:
                words = {word.lower(): ours for word, ours in name.words.items()}
                if str(value).lower() not in words:
                    raise BadInput(
                        f"--{key} is {value!r}; must be {' or '.join(name.words)}{name.why and f': {name.why}'}"
                    )
                value = words[str(value).lower()]
            if name.ours is not None and (key not in self.names or name.ours not in values):
                result[name.ours] = value
        return result
