"""Checks of a configuration and of this machine that need no training and load no data."""

import importlib.util
import math
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from fedsys.compose import option
from fedsys.config import Experiment, configure
from fedsys.console import show_table, size
from fedsys.errors import ConfigError

Status = Literal["ok", "warn", "fail"]

_LITTLE = 2e9  # bytes of memory or disk below which we warn


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    status: Status
    detail: str


def examine(overrides: Sequence[str]) -> list[Check]:
    """Check the configuration of ``overrides``, and this machine for it."""
    experiment = None
    checks: list[Check] = []
    try:
        experiment = configure(overrides)
        checks.append(Check("configuration", "ok", "can be run"))
    except ConfigError as reason:
        checks += [Check("configuration", "fail", problem) for problem in reason.problems]
    checks += [Check("python", "ok", platform.python_version()), *_packages()]
    checks += [_processors(), _memory(), _accelerator(experiment.device if experiment else "auto")]
    if experiment is not None:
        checks += [_folder(experiment.out), *_work(experiment)]
    return [*checks, *_extras(experiment)]


def report(checks: Sequence[Check]) -> None:
    """Write the table to stdout."""
    show_table([[check.status, check.name, check.detail] for check in checks])


def _packages() -> Iterator[Check]:
    """Yield the core packages, each held against the range that fedsys was made for."""
    for line in _requirements():
        requirement = Requirement(line)
        if requirement.marker is not None:
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Check(requirement.name, "fail", f"not installed; needs {requirement.specifier}")
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        needs = "" if fits else f"; needs {requirement.specifier}"
        yield Check(requirement.name, "ok" if fits else "fail", f"{found}{needs}")


def _requirements() -> list[str]:
    try:
        return requires("fedsys") or []
    except PackageNotFoundError:
        return ["torch", "flwr", "opacus"]


def _processors() -> Check:
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Check("processors", "ok", f"{count} usable, {platform.machine()}")


def _memory() -> Check:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return Check("memory", "ok", "unknown on this system")
    numbers = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
    free, total = (int(numbers[k].split()[0]) * 1024 for k in ("MemAvailable", "MemTotal"))
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than its machine
    if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()).isdigit():
        free, total = min(free, int(most)), min(total, int(most))
    status: Status = "warn" if free < _LITTLE else "ok"
    return Check("memory", status, f"{size(free)} available of {size(total)}")


def _accelerator(device: str) -> Check:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    found = ", ".join(names) or ("mps" if torch.backends.mps.is_available() else "none")
    kind, _, index = device.partition(":")
    missing = (kind == "cuda" and int(index or 0) >= count) or (kind == "mps" and found != "mps")
    if missing:
        return Check("accelerator", "fail", f"device={device} is not here; found: {found}")
    return Check("accelerator", "ok", f"{found}; device={device}")


def _folder(out: Path) -> Check:
    """Check that the run folder can be made, without making it."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check("run folder", "fail", f"{out}: {place} cannot be written to")
    free = shutil.disk_usage(place).free
    status: Status = "warn" if free < _LITTLE else "ok"
    return Check("run folder", status, f"{out}, {size(free)} free")


def _work(experiment: Experiment) -> Iterator[Check]:
    clients = experiment.num_clients
    rate = getattr(experiment.participation, "rate", None)
    cohort = getattr(experiment.participation, "cohort", None) or clients
    a_round = f"{cohort}" if rate is None else f"about {rate * clients:.4g}"
    yield Check(
        "cohort", "ok", f"{a_round} of {clients} clients a round, {experiment.rounds} rounds"
    )
    chunk = getattr(experiment.engine, "chunk", None)
    if chunk is None:
        detail = "clients trained in one pass: chosen by the work and the memory"
    else:
        passes = math.ceil((cohort if rate is None else rate * clients) / chunk)
        detail = f"{chunk} clients trained in one pass, so {passes} passes a round"
    yield Check("chunk", "ok", detail)
    for group in ("data", "model"):
        yield Check(group, "ok", f"{getattr(experiment, group)}")


def _extras(experiment: Experiment | None) -> Iterator[Check]:
    """Yield the optional parts; one that this configuration needs must be there."""
    needed = _needed(experiment) if experiment is not None else set()
    for extra, modules in _MODULES.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        hint = f"no {', '.join(absent)}; pip install 'fedsys[{extra}]'"
        if not absent:
            yield Check(f"extra {extra}", "ok", "installed")
        elif extra in needed:
            yield Check(f"extra {extra}", "fail", f"this configuration needs it: {hint}")
        else:
            yield Check(f"extra {extra}", "ok", f"not needed here: {hint}")


_MODULES = {
    "text": ["transformers", "peft", "datasets", "pyarrow"],
    "image": ["PIL", "pyarrow"],
    "ray": ["ray"],
    "report": ["matplotlib"],
    "mlflow": ["mlflow"],
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
}


def _needed(experiment: Experiment) -> set[str]:
    """Return the extras that the chosen options need."""
    chosen = {
        option(group, experiment.resolved[group].get("_target_") or "")
        for group in ("data", "model", "engine", "tracker")
    }
    of_option = {"hf_classifier": "text", "hf_causal": "text", "hf": "text"}
    extras = {of_option.get(name or "", name or "") for name in chosen}
    return extras & set(_MODULES)
