"""From overrides, ``key=value`` as typed, to one composed configuration.

Hydra stops at the first mistake; here every override is judged by itself, so that all mistakes are
told at once. Nothing heavy is imported, and Hydra only to compose: a client that is sent a composed
configuration does without.
"""

import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsys.errors import ConfigError
from fedsys.known import KnownKeys, listed
from fedsys.schema import show

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FOLDER = Path(__file__).resolve().parents[1] / "configs"
TARGET = "_target_"

Options = Mapping[str, list[str]]  # of every group


@dataclass(frozen=True)
class Composition:
    """A configuration of the overrides that could be used, and what is wrong with the others."""

    config: DictConfig
    problems: list[str]  # in the order typed
    touched: set[str]  # groups and root keys that the overrides name


def groups() -> dict[str, list[str]]:
    """Return the options of every group, as the folder of the configuration has them."""
    folders = sorted(
        path for path in FOLDER.iterdir() if path.is_dir() and path.name[0] not in "._"
    )
    return {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in folders}


def chosen_by_default() -> dict[str, str | None]:
    """Return the option that every group has when nothing is chosen."""
    entries = [entry for entry in _yaml(FOLDER / "config.yaml")["defaults"] if entry != "_self_"]
    chosen = {group: option for entry in entries for group, option in entry.items()}
    for choice, consequence in implied():
        group, _, name = choice.partition("=")
        if chosen[group] == name:
            other, _, implied_option = consequence.partition("=")
            chosen[other] = implied_option
    return chosen


def implied() -> list[tuple[str, str]]:
    """Return what options choose in other groups, as pairs such as ("a=b", "c=d")."""
    return [
        (f"{group}={name}", f"{key.partition('/')[2].partition('@')[0]}={other}")
        for group, options in groups().items()
        if group != "experiment"
        for name in options
        for entry in _load(group, name).get("defaults", ())
        for key, other in entry.items()
    ]


def option(group: str, target: str) -> str | None:
    """Return the option of ``group`` that stands for a class, if there is one."""
    return next(
        (name for name in groups()[group] if _load(group, name).get(TARGET) == target), None
    )


def defaults(group: str, target: str) -> dict[str, Any]:
    """Return the values that the option for a class sets; what another key decides is left out."""
    name = option(group, target)
    node = _load(group, name) if name else {}
    open_ends = ("???", "${")
    return {
        k: v
        for k, v in node.items()
        if k not in (TARGET, "defaults") and not str(v).startswith(open_ends)
    }


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the composed configuration; raises ``ConfigError`` with all that is wrong."""
    composition = examine(overrides)
    if composition.problems:
        raise ConfigError(composition.problems)
    return composition.config


def examine(overrides: Sequence[str]) -> Composition:
    """Compose what can be composed, and tell the problems of the rest."""
    options = groups()
    problems: dict[int, str] = {}
    parsed = _parse_all(overrides, options, problems)
    chosen, lost = _choose_all(parsed, options, problems)
    config, choices = deepcopy(_compose(tuple(chosen.values())))
    values = {
        place: override
        for place, override in parsed.items()
        if override.key_or_group not in options and _group(override) not in lost
    }
    given = {override.key_or_group for override in values.values()}
    retargeted = {group for group in options if f"{group}.{TARGET}" in given}
    known = KnownKeys(OmegaConf.to_container(config), choices, options, FOLDER)
    for place, override in values.items():
        key, free = override.key_or_group, _group(override) in retargeted
        problem = None if free else known.problem(key, override.value())
        try:
            if problem is None:
                OmegaConf.update(config, key, override.value(), force_add=True)
        except OmegaConfBaseException as reason:
            problem = _first_line(reason)
        if problem:
            problems[place] = f"{key}={_value(override)}: {problem}"
    for group in retargeted:
        _keep(config, group, given)
    touched = {_group(override) for override in parsed.values()}
    return Composition(config, [problems[place] for place in sorted(problems)], touched)


def _parse_all(
    overrides: Sequence[str], options: Options, problems: dict[int, str]
) -> dict[int, "Override"]:
    parsed = {}
    for place, text in enumerate(overrides):
        try:
            parsed[place] = _parse(text, options)
        except ValueError as reason:
            problems[place] = f"{text}: {reason}"
    return parsed


def _parse(text: str, options: Options) -> "Override":
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    if not text.lstrip("+~").partition("=")[0] or ("=" not in text and text[0] != "~"):
        raise ValueError("write key=value")
    try:
        override = OverridesParser.create().parse_override(text)
        override.value()
    except HydraException as reason:
        hint = "a value with special characters needs quotes within quotes: 'key=\"value\"'"
        raise ValueError(f"{_first_line(reason)}; {hint}") from None
    key = override.key_or_group
    if key.startswith("hydra."):
        raise ValueError("fedsys has no settings of Hydra's own")
    if override.package is not None:
        raise ValueError(f"a group has one place only; write {key}=... without @")
    if override.type is OverrideType.DEL:
        instead = f"{key}=none or {key}=null" if key in options else f"{key}=null"
        raise ValueError(f"keys cannot be removed; write {instead}, where that is allowed")
    if override.is_sweep_override():
        raise ValueError(f"a run takes one value; write a list as {key}=[a,b]")
    if override.type is OverrideType.ADD and key in options:
        raise ValueError(f"{key} is there already; write it without the +")
    return override


def _choose_all(
    parsed: Mapping[int, "Override"], options: Options, problems: dict[int, str]
) -> tuple[dict[str, str], set[str]]:
    """Return the choice of option for each group that has one, and the groups nobody can guess."""
    chosen: dict[str, str] = {}
    lost: set[str] = set()
    for place, override in parsed.items():
        group = override.key_or_group
        if group in options:
            option, problem = _choose(override, options[group])
            if problem:
                problems[place] = problem
            if option is None:
                lost.add(group)
            elif option == "null":  # only experiment may be, and is by default
                chosen.pop(group, None)
            else:
                chosen[group] = f"{group}='{option}'"  # in quotes, or true is no name to Hydra
    return chosen, lost


def _choose(override: "Override", options: list[str]) -> tuple[str | None, str | None]:
    """Return the option to go on with, the nearest if the one given is unknown, and the problem."""
    group, value = override.key_or_group, override.value()
    if isinstance(value, Mapping):
        return None, f"{group}: write {group}.key=value for each key, got {_value(override)}"
    name = show(value)
    if name in options or (group, name) == ("experiment", "null"):
        return name, None
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    problem = f"{group}={name}: no such option; {group} is {listed(options, 'or')}"
    if not near:
        return None, problem
    return near[0], f"{problem}; did you mean {group}={near[0]}?"


@cache  # the points of a sweep choose the same options again and again
def _compose(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    import hydra

    with hydra.initialize_config_dir(config_dir=str(FOLDER), version_base="1.3"):
        config = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    choices = {str(group): str(option) for group, option in config.hydra.runtime.choices.items()}
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config, choices


def _load(group: str, option: str) -> dict[str, Any]:
    return deepcopy(_yaml(FOLDER / group / f"{option}.yaml"))


@cache
def _yaml(file: Path) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))


def _keep(config: DictConfig, group: str, given: set[str]) -> None:
    """Keep of a group only what was given: the class named there has fields of its own."""
    for name in list(config[group]):
        if f"{group}.{name}" not in given:
            del config[group][name]


def _group(override: "Override") -> str:
    return override.key_or_group.partition(".")[0]


def _value(override: "Override") -> str:
    return override.get_value_string()


def _first_line(reason: Exception) -> str:
    return str(reason).strip().splitlines()[0].strip()
