"""Whether the points of a grid can be run, before any of them is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsys.config import configure
from fedsys.errors import ConfigError
from fedsys.sweeps.grid import SEED, Grid, Point
from fedsys.sweeps.processes import difference

_NAMED = 3  # points that have a problem; of more, the number is told


@dataclass(frozen=True)
class Checked:
    """The points that can be run, and why the others cannot."""

    accepted: list[Point]
    refused: dict[str, list[str]]  # by the point's name


def check(grid: Grid, skip_refused: bool = False) -> Checked:
    """Return what can be run; raises ``ConfigError`` with all problems and who has them.

    With ``skip_refused`` a point with problems is left out, if others remain. A folder that holds
    another run than the one wanted is a problem in any case.
    """
    _check_folder(grid)
    resolved, refused = _judge(grid.points)
    if refused and not (skip_refused and resolved):
        raise ConfigError(_told(refused, grid))
    strangers = [
        reason
        for point in grid.points
        if point.name in resolved and (reason := _stranger(point, resolved[point.name]))
    ]
    if strangers:
        raise ConfigError([f"{reason}; choose another folder with out=" for reason in strangers])
    return Checked([point for point in grid.points if point.name in resolved], refused)


def _check_folder(grid: Grid) -> None:
    folder = grid.folder
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "sweep.json").is_file():
        raise ConfigError([f"out={folder}: must be a new or empty folder, or that of a sweep"])


def _judge(points: Sequence[Point]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Return by name the resolved configurations of the points, and the problems of the others.

    To compose one takes a quarter of a second. A point is as good as its repetition with another
    seed if its own seed was accepted elsewhere.
    """
    resolved: dict[str, dict[str, Any]] = {}
    refused: dict[str, list[str]] = {}
    twins: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    seeds: dict[str | None, Any] = {}
    for point in points:
        seed = point.swept.get(SEED)
        if point.others in twins and seed in seeds:
            resolved[point.name] = {**twins[point.others], SEED: seeds[seed]}
            continue
        try:
            found = configure(point.overrides).resolved
        except ConfigError as error:
            refused[point.name] = error.problems
            continue
        resolved[point.name] = twins[point.others] = found
        seeds[seed] = found[SEED]
    return resolved, refused


def _stranger(point: Point, resolved: dict[str, Any]) -> str | None:
    """Return how the run that is in the point's folder differs from the one wanted."""
    if difference(point.folder, resolved) is None:
        return None
    # Something may follow the seed, which the configuration of a twin would not show.
    return difference(point.folder, configure(point.overrides).resolved)


def _told(refused: Mapping[str, list[str]], grid: Grid) -> list[str]:
    """Return each problem once, with the points that have it."""
    holders: dict[str, list[Point]] = {}
    for point in grid.points:
        for problem in refused.get(point.name, ()):
            holders.setdefault(problem, []).append(point)
    return [problem + _where(points, grid) for problem, points in holders.items()]


def _where(points: Sequence[Point], grid: Grid) -> str:
    """Return which points these are, by the values that set them apart if there are such."""
    if len(points) == len(grid.points):
        return ""
    ours, all_ = _values(points, grid.keys), _values(grid.points, grid.keys)
    product = 1
    for values in ours.values():
        product *= len(values)
    if product == len(points):  # a grid of its own
        apart = (f"{k}={','.join(ours[k])}" for k in grid.keys if len(ours[k]) < len(all_[k]))
        return f" (where {' '.join(apart)})"
    names = [point.name for point in points[:_NAMED]]
    more = f" and {len(points) - _NAMED} more" if len(points) > _NAMED else ""
    return f" (at {'; '.join(names)}{more})"


def _values(points: Sequence[Point], keys: Sequence[str]) -> dict[str, list[str]]:
    return {key: list(dict.fromkeys(point.swept[key] for point in points)) for key in keys}
