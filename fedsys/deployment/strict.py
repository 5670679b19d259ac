"""YAML files of a device's operator, read strictly: what is not understood is refused.

The dataclass is the schema, and every field must be given; so a file that was cut short, or has a
line for another version, is no file with fewer limits.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from fedsys.errors import ConfigError
from fedsys.known import suggestion
from fedsys.schema import annotations, coerce, show

T = TypeVar("T")

Ranges = Mapping[str, tuple[Callable[[Any], bool], str]]  # what holds of a field, and in words

_LARGEST = 65536  # bytes of a file that people write


def load(path: Path, cls: type[T], ranges: Ranges, error: type[ConfigError]) -> T:
    """Return what ``path`` says as a ``cls``; raises ``error`` with everything that is wrong."""
    problems: list[str] = []
    values = _typed(_tree(path, error), cls, problems)
    problems += out_of_range(values, ranges)
    if problems:
        raise error([f"{path}: {problem}" for problem in problems])
    try:
        return cls(**values)
    except error as reason:  # of several fields together
        raise error([f"{path}: {problem}" for problem in reason.problems]) from None


def out_of_range(values: Mapping[str, Any], ranges: Ranges) -> list[str]:
    """Return what is wrong with each of ``values`` by itself."""
    return [
        f"{name} {words}, got {show(values[name])}"
        for name, (holds, words) in ranges.items()
        if name in values and not holds(values[name])
    ]


def _tree(path: Path, error: type[ConfigError]) -> dict[str, Any]:
    """Return the keys of a file with their values, which may be of any type."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise error([f"{path}: cannot be read: {reason}"]) from reason
    if len(text) > _LARGEST:
        raise error([f"{path}: is longer than {_LARGEST} bytes"])
    if not text.endswith("\n"):
        # A limit without its last digit is a limit, too.
        raise error([f"{path}: the last line has no end, as if the file had been cut off there"])
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as reason:  # of the many that a YAML file can cause
        line = " ".join(str(reason).split())
        raise error([f"{path}: is not YAML as it should be: {line:.300}"]) from reason
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise error([f"{path}: must hold keys with values, one a line"])
    named = {str(name): value for name, value in tree.items()}
    if bare := [n for n, value in named.items() if value is None and not _is_null(n, text)]:
        raise error([f"{path}: {n}: has no value; write null where there is none" for n in bare])
    return named


def _is_null(name: str, text: str) -> bool:
    """Return whether the file says null, and not nothing, which a line cut short says too."""
    line = rf"^{re.escape(name)}[ \t]*:[ \t]+(null|~)[ \t]*(#.*)?$"
    return re.search(line, text, re.MULTILINE) is not None


def _typed(tree: Mapping[str, Any], cls: type, problems: list[str]) -> dict[str, Any]:
    kinds, known = annotations(cls), [field.name for field in fields(cls)]
    problems += [f"{n}: no such key{suggestion(n, known)}" for n in tree if n not in known]
    problems += [f"{name}: must be given" for name in known if name not in tree]
    values = {}
    for name in known:
        if name not in tree:
            continue
        try:
            values[name] = coerce(tree[name], kinds[name])
        except (TypeError, ValueError, OverflowError) as reason:
            problems.append(f"{name}={show(tree[name])[:80]}: must be {reason}")
    return values
