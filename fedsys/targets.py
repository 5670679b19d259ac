"""From a group of a configuration to the object that its ``_target_`` names."""

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from fedsys.compose import TARGET, defaults
from fedsys.known import listed, suggestion
from fedsys.schema import annotations, coerce, show
from fedsys.settings import Problems

OURS = ("fedsys", "strategies", "clients")
_METHODS = {
    "data": ("load",),
    "partition": ("split", "keep"),
    "model": ("build", "tokenizer"),
    "adapter": ("attach",),
    "strategy": ("configure_train",),
    "participation": ("init", "draw"),
    "compression": ("compress", "decompress"),
    "attack": ("accepts", "extra", "forge"),
    "defence": ("defend",),
    "fault": ("draw",),
}
# Of the base of strategies; its other fields belong to the run, not to the configuration.
_HYPERPARAMETERS = ("server_lr", "weighting")


def component(group: str, node: Mapping[str, Any], allow: Sequence[str], problems: Problems) -> Any:
    """Return what the group stands for; None when it is switched off or has a problem."""
    target = node.get(TARGET)
    if target is None:
        return None
    try:
        cls = _find(group, target, allow)
    except ValueError as reason:
        problems.setdefault(f"{group}.{TARGET}", f"{group}.{TARGET}={show(target)}: {reason}")
        return None
    values = _values(group, cls, node, problems)
    made = _make(group, target, cls, values, problems)
    if made is not None and hasattr(made, "check"):
        for number, problem in enumerate(made.check()):
            problems[f"{group} {number}"] = _named(group, cls, problem)
    return None if any(key.startswith(f"{group}.") for key in problems) else made


def _find(group: str, target: Any, allow: Sequence[str]) -> type:
    """Import the class that ``target`` names; raises ValueError with the reason why not."""
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        raise ValueError("must name a class, as module.Class")
    if not _allowed(target, allow):
        raise ValueError(
            f"only classes of {listed([*OURS, *allow], 'and')} may be named;"
            f" allow your own with allow=[{target.rpartition('.')[0]}]"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    module, _, name = target.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError as reason:
        raise ValueError(
            f"{reason}; modules are looked for where fedsys is installed and in {here}"
        ) from None
    except Exception as reason:  # whatever a module of the user's raises
        raise ValueError(f"importing {module}: {type(reason).__name__}: {reason}") from reason
    cls = getattr(owner, name, None)
    if not isinstance(cls, type) or not _allowed(f"{cls.__module__}.", allow):
        classes = [n for n, c in vars(owner).items() if isinstance(c, type) and is_dataclass(c)]
        raise ValueError(f"{module} has no such class{suggestion(name, sorted(classes))}")
    if not is_dataclass(cls):
        raise ValueError("must be a dataclass: its fields are the keys, with their types")
    missing = [name for name in _METHODS.get(group, ()) if not hasattr(cls, name)]
    if missing:
        raise ValueError(f"cannot be used as {group}: it has no {listed(missing)}")
    return cls


def _make(group: str, target: str, cls: type, values: dict[str, Any], problems: Problems) -> Any:
    """Call the class; a value it refuses gives way to a good one, so that all are heard of."""
    known = _fields(cls)
    good = defaults(group, target)
    good |= {name: field.default for name, field in known.items() if field.default is not MISSING}
    values = {**{name: good[name] for name in known if name in good}, **values}
    if any(name not in values and not _optional(field) for name, field in known.items()):
        return None
    while True:
        try:
            return cls(**values)
        except (ValueError, TypeError) as reason:
            message = _named(group, cls, str(reason))
            name = message.partition(".")[2].split(" ")[0]
            problems.setdefault(f"{group}.{name if name in values else ''}", message)
            if name not in good or values.get(name) == good[name]:
                return None
            values[name] = good[name]


def _optional(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _allowed(target: str, allow: Sequence[str]) -> bool:
    return any(target.startswith(f"{module}.") for module in (*OURS, *allow))


def _values(group: str, cls: type, node: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Return the fields of ``cls`` that the group sets, of their types."""
    known = _fields(cls)
    kinds = annotations(cls)
    values = {}
    for name, value in node.items():
        key = f"{group}.{name}"
        if name == TARGET:
            continue
        if name not in known:
            hint = suggestion(name, list(known))
            problems.setdefault(key, f"{key}={show(value)}: {cls.__name__} has no such field{hint}")
            continue
        try:
            values[name] = coerce(value, kinds[name])
        except TypeError as reason:
            problems.setdefault(key, f"{key}={show(value)}: must be {reason}")
    for name, field in known.items():
        if name not in node and not _optional(field):
            problems.setdefault(f"{group}.{name}", f"{group}.{name}: must be given")
    return values


def _fields(cls: type) -> dict[str, Field[Any]]:
    """Return the fields that may be keys of a configuration."""
    of_the_run: set[str] = set()
    for base in cls.__mro__:
        if f"{base.__module__}.{base.__qualname__}" == "fedsys.strategy.Strategy":
            of_the_run = {field.name for field in fields(base)} - set(_HYPERPARAMETERS)
    return {f.name: f for f in fields(cls) if f.init and f.name not in of_the_run}


def _named(group: str, cls: type, message: str) -> str:
    """Return a message of a component, its key spelt as the user types it."""
    line = " ".join(message.split())
    if re.match(rf"{group}[.=]", line):
        return line
    first = re.match(r"\w*", line)
    return f"{group}.{line}" if first and first[0] in _fields(cls) else f"{group}: {line}"
