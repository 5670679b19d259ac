"""The keys that a configuration has, and the nearest of them to one it has not."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def listed(words: Sequence[str], last: str = "and") -> str:
    """Return words as in a sentence: a, b and c."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def suggestion(word: str, words: Sequence[str]) -> str:
    """Return the end of a sentence: the nearest of ``words``, or all of them if none is near."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there is {listed(words)}" if words else "; it has no keys"


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that hold a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@dataclass(frozen=True)
class KnownKeys:
    """Judges keys by a configuration that was composed from the chosen options."""

    tree: Any
    choices: Mapping[str, str]  # group -> option
    options: Mapping[str, list[str]]  # of every group
    folder: Path

    def problem(self, key: str, value: object) -> str | None:
        """Return what is wrong with setting ``key`` to ``value``, if anything."""
        node = self.tree
        for name in key.split("."):
            if not isinstance(node, dict) or name not in node:
                return self._unknown(key)
            node = node[name]
        if isinstance(node, dict) and (node or not isinstance(value, Mapping)):
            return f"has keys of its own; set {listed([f'{key}.{name}' for name in node])}"
        return None

    def _unknown(self, key: str) -> str:
        group, _, name = key.partition(".")
        if group in self.options and group in self.tree and name:
            where = f"no such key in {group}={self.choices[group]}"
            return where + self._within(group, name)
        known = [k for k in leaves(self.tree) if "._" not in k]
        last = key.rpartition(".")[2]
        same = [k for k in known if k.rpartition(".")[2] == last]
        if same:
            return f"no such key; did you mean {listed(same, 'or')}?"
        near = difflib.get_close_matches(key, [*known, *self.options], n=1, cutoff=0.6)
        if not near:
            tails = {k.rpartition(".")[2]: k for k in reversed(known)}
            near = [tails[tail] for tail in difflib.get_close_matches(last, tails, 1, cutoff=0.7)]
        hint = f"did you mean {near[0]}?" if near else "`fedsys run --help` lists them"
        return f"no such key; {hint}"

    def _within(self, group: str, name: str) -> str:
        """Return a hint at another option that has the key, or at the nearest key of the group."""
        holders = [
            f"{group}={option}"
            for option in self.options[group]
            if name in OmegaConf.load(self.folder / group / f"{option}.yaml")
        ]
        if holders:
            return (
                f"; {listed(holders)} has it"
                if len(holders) == 1
                else f"; {listed(holders)} have it"
            )
        return suggestion(name, [k for k in self.tree[group] if not k.startswith("_")]).replace(
            "did you mean ", f"did you mean {group}."
        )
