"""Values from YAML against the annotations of the dataclass that will hold them."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from fedsys.known import listed

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def annotations(cls: type) -> dict[str, Any]:
    """Return the annotation of every field; ``Any`` where it cannot be read while running."""
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a name that is imported for type checkers only
        hints = {k: v for base in reversed(cls.__mro__) for k, v in _own(base).items()}
        return {name: Any if isinstance(hint, str) else hint for name, hint in hints.items()}


def coerce(value: Any, kind: Any) -> Any:
    """Return ``value`` as ``kind`` asks; raises TypeError with the kind in words."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _any_of(value, get_args(kind), kind)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise TypeError(describe(kind))
    if origin is not None and issubclass(origin, Sequence):
        return _sequence(value, kind, origin)
    if (origin or kind) in (dict, Mapping) and not isinstance(value, Mapping):
        raise TypeError(describe(kind))
    if kind in _WORDS:
        return _scalar(value, kind)
    return value


def describe(kind: Any) -> str:
    """Return a kind in words, such as "a whole number or null"."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return listed([describe(part) for part in get_args(kind)], "or")
    if origin is Literal:
        return listed([show(choice) for choice in get_args(kind)], "or")
    if origin is not None and issubclass(origin, Sequence):
        items = [part for part in get_args(kind) if part is not ...]
        return f"a list, each {describe(items[0])}" if items else "a list"
    if (origin or kind) in (dict, Mapping):
        return "keys with values"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def show(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    return str(value) if value != "" else "''"


def _own(base: type) -> Mapping[str, Any]:
    return typing.cast(Mapping[str, Any], vars(base).get("__annotations__", {}))


def _any_of(value: Any, kinds: Sequence[Any], union: Any) -> Any:
    if value is None and type(None) in kinds:
        return None
    # An exact fit first: 1 stays a whole number where a text is allowed as well.
    for kind in sorted(kinds, key=lambda kind: type(value) is not kind):
        try:
            return coerce(value, kind)
        except TypeError:
            continue
    raise TypeError(describe(union))


def _sequence(value: Any, kind: Any, origin: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(describe(kind))
    parts = get_args(kind) or (Any,)
    fixed = origin is tuple and ... not in parts
    if fixed and len(parts) != len(value):
        raise TypeError(f"a list of {len(parts)}")
    kinds = parts if fixed else [parts[0]] * len(value)
    try:
        items = [coerce(item, part) for item, part in zip(value, kinds, strict=True)]
    except TypeError:
        raise TypeError(describe(kind)) from None
    return items if origin is list else tuple(items)


def _scalar(value: Any, kind: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and not math.isnan(value):
        return float(value)
    if kind is int and number and float(value).is_integer():
        return int(value)
    if kind is str and (isinstance(value, str) or (isinstance(value, int) and number)):
        return str(value)  # a column may be called 1
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (bool, type(None)) and isinstance(value, kind):
        return value
    raise TypeError(describe(kind))
