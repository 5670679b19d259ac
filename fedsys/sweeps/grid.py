"""A grid: the points that overrides with several values of a key stand for.

Hydra's parser reads them: ``key=a,b``, ``key=choice(a,b)``, ``key=range(0,1,0.1)``,
``group=glob(fed*)``. As in Hydra's multirun a point is an element of their product, the last key
varying fastest, and of a key that is given twice the last one counts.
"""

import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, Transformer
from hydra.errors import HydraException

from fedsys.compose import groups
from fedsys.errors import ConfigError

SEED = "seed"
_LONGEST = 150  # characters of a folder's name; file systems end at 255 bytes


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    swept: dict[str, str]  # key -> its value here, as it is shown
    overrides: list[str]  # what is typed after ``fedsys run``, but for ``out``
    folder: Path

    @property
    def name(self) -> str:
        """What the run is called: the keys that are swept, with their values."""
        return self.folder.name

    @property
    def others(self) -> tuple[tuple[str, str], ...]:
        """The keys and values without the seed: points that share them are repetitions."""
        return tuple((key, value) for key, value in self.swept.items() if key != SEED)


@dataclass(frozen=True)
class Grid:
    """All points of a sweep, none of which has begun anything yet."""

    folder: Path
    overrides: list[str]  # as typed, but for ``out``
    keys: list[str]  # that are swept
    points: list[Point]


@dataclass(frozen=True)
class _Axis:
    """An override: one value, or the values that are swept."""

    key: str
    swept: bool
    values: list[tuple[str, str]]  # as it is shown, and as it is typed after ``fedsys run``


def expand(overrides: Sequence[str]) -> Grid:
    """Return the grid of ``overrides``; raises ``ConfigError`` for values nobody can list.

    Of the values themselves nothing is checked. ``out`` alone means the sweep that is there.
    """
    problems: list[str] = []
    texts, folder = _folder(overrides, problems)
    if not texts and (folder / "sweep.json").is_file():
        texts = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["overrides"]
    axes: dict[str, _Axis] = {}
    for text in texts:
        try:
            axis = _axis(text)
            axes[axis.key] = axis
        except (ValueError, HydraException) as reason:
            problems.append(f"{text}: {reason}")
    if problems:
        raise ConfigError(problems)
    keys = [key for key, axis in axes.items() if axis.swept]
    chosen = itertools.product(*(axis.values for axis in axes.values()))
    points = [_point(folder, list(axes.values()), values) for values in chosen]
    return Grid(folder, texts, keys, points)


def _point(folder: Path, axes: Sequence[_Axis], values: Sequence[tuple[str, str]]) -> Point:
    swept = {axis.key: shown for axis, (shown, _) in zip(axes, values, strict=True) if axis.swept}
    return Point(swept, [typed for _, typed in values], folder / "points" / _name(swept))


def _folder(overrides: Sequence[str], problems: list[str]) -> tuple[list[str], Path]:
    """Return the overrides without ``out``, and the folder of the sweep."""
    texts, out = [], None
    for text in overrides:
        override = _parse(text)
        if override is None or override.key_or_group != "out":
            texts.append(text)
        elif override.is_sweep_override():
            problems.append(f"{text}: the points share one folder, each with its own below it")
        else:
            out = override.value()
    return texts, _new_folder() if out is None else Path(str(out))


def _new_folder() -> Path:
    """Return a folder below runs/sweeps/ that does not exist yet."""
    stem = Path("runs") / "sweeps" / time.strftime("%Y%m%d-%H%M%S")
    numbered = (stem.with_name(f"{stem.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([stem], numbered) if not folder.exists())


def _parse(text: str) -> Override | None:
    """Return an override, or None for one that ``fedsys.compose`` will refuse with a reason."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def _axis(text: str) -> _Axis:
    override = _parse(text)
    if override is None or not override.is_sweep_override():
        # Not by its key: that of a text nobody can read is unknown.
        key = text if override is None else override.key_or_group
        return _Axis(key, False, [("", text)])
    key = override.key_or_group
    values = [
        (_shown(value), f"{override.get_key_element()}={Transformer.str(value)}")
        for value in _values(override)
    ]
    if not values:
        raise ValueError("stands for no value at all")
    shown, times = Counter(shown for shown, _ in values).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{shown} is there {times} times")
    return _Axis(key, True, values)


def _values(override: Override) -> list[Any]:
    """Return the parsed values of a sweep; raises ValueError where they cannot be listed."""
    if not override.is_discrete_sweep():
        raise ValueError("an interval has no list of values; write range(start,stop,step)")
    pattern = override.value()
    if isinstance(pattern, Glob):
        options = groups()
        if override.key_or_group not in options:
            raise ValueError("glob() chooses among the options of a group, and this is none")
        return pattern.filter(options[override.key_or_group])
    return list(override.sweep_iterator())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value.text if isinstance(value, QuotedString) else str(Transformer.str(value))


def _name(swept: dict[str, str]) -> str:
    """Return a folder's name, readable and different for different points."""
    full = ",".join(f"{key}={value}" for key, value in swept.items())
    name = re.sub(r"[^\w.,=+-]", "_", full)[:_LONGEST]
    if name != full:
        name = f"{name}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    return name or "run"
