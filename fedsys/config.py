"""From a composed configuration to the objects that do the work, or to every reason why not.

The dataclass a group names in ``_target_`` is its own schema: its annotations are the types of its
keys, and its ``__post_init__`` checks their ranges. After ``build`` nobody sees a configuration.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsys.compose import compose, examine, groups
from fedsys.conflicts import conflicts
from fedsys.errors import ConfigError
from fedsys.settings import Checkpoints, Evaluation, Problems, Settings, settings
from fedsys.targets import component

if TYPE_CHECKING:
    from fedsys.adapters import Adapter
    from fedsys.data import Partition
    from fedsys.participation import Participation
    from fedsys.strategy import Strategy

__all__ = ["Checkpoints", "Evaluation", "Experiment", "Settings", "build", "compose", "configure"]

PUBLIC_FRACTION = 0.2  # of embedded data, where privacy needs rows that are nobody's
_NEEDED = ("data", "partition", "model", "adapter", "client", "strategy", "participation", "engine")


@dataclass(frozen=True, kw_only=True)
class Experiment(Settings):
    """What one run is made of; a group that is switched off is None."""

    out: Path
    data: Any
    partition: "Partition"
    model: Any
    adapter: "Adapter"
    client: Any
    strategy: "Strategy"
    participation: "Participation"
    compression: Any
    privacy: Any
    secagg: Any
    attack: Any
    defence: Any
    fault: Any
    engine: Any
    tracker: Any
    resolved: dict[str, Any]  # builds the same experiment again
    overrides: list[str]  # as typed


def configure(overrides: Sequence[str]) -> Experiment:
    """Compose and build a new experiment; raises ``ConfigError`` with all that is wrong."""
    composition = examine(overrides)
    # Importing classes takes seconds, which a misspelt key alone should not cost.
    imports = not composition.problems or composition.touched & {*groups(), "allow", "dtype"}
    problems: Problems = {}
    experiment = _build(composition.config, overrides, problems, bool(imports))
    found = [*composition.problems, *problems.values()]
    if experiment.out.is_dir() and any(p.name[0] != "." for p in experiment.out.iterdir()):
        found.append(
            f"out={experiment.out}: must be a new or empty folder; to go on with the run in it,"
            f" `fedsys resume {experiment.out}`"
        )
    if found:
        raise ConfigError(found)
    return experiment


def build(config: DictConfig | Mapping[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """Build the experiment of a composed configuration, or of one that a run has saved.

    Only classes are loaded. Raises ``ConfigError`` with all that is wrong.
    """
    problems: Problems = {}
    tree = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    experiment = _build(tree, overrides, problems, imports=True)
    if problems:
        raise ConfigError(list(problems.values()))
    return experiment


def _build(
    config: DictConfig, overrides: Sequence[str], problems: Problems, imports: bool
) -> Experiment:
    """Return the experiment; in it, None stands for whatever has a problem."""
    tree = _plain(config, "", problems)
    names = [group for group in groups() if group != "experiment"]
    values = settings({key: value for key, value in tree.items() if key not in names}, problems)
    values["out"] = values["out"] or _new_folder()
    tree["out"] = str(values["out"])
    _settle(tree)
    built: dict[str, Any] = dict.fromkeys(names)
    for group in names if imports else ():
        node = tree.get(group, {})
        built[group] = component(group, node, values["allow"] or [], problems)
        if group in _NEEDED and node.get("_target_") is None:
            problems.setdefault(f"{group}._target_", f"{group}: must name a class")
    experiment = Experiment(**values, **built, resolved=tree, overrides=list(overrides))
    for reason in conflicts(experiment) if imports else ():
        problems[reason] = reason
    return experiment


def _settle(tree: dict[str, Any]) -> None:
    """Set what is left open (null) to the best that privacy allows."""
    privacy = str(tree.get("privacy", {}).get("_target_")).rpartition(".")[2]
    private = privacy in ("SamplePrivacy", "ClientPrivacy")
    data, adapter = tree.get("data", {}), tree.get("adapter", {})
    if data.get("public_fraction", 0) is None:
        data["public_fraction"] = PUBLIC_FRACTION if private else 0.0
    if adapter.get("init", "") is None:
        if private and data.get("public_fraction"):
            adapter["init"] = "public"
        elif privacy == "SamplePrivacy":
            adapter["init"] = "private"
        elif private or tree.get("secagg", {}).get("_target_") is not None:
            adapter["init"] = "seeded_random"
        else:
            adapter["init"] = "client_sum"
    if isinstance(home := tree.get("engine", {}).get("home"), str | Path):
        tree["engine"]["home"] = str(Path(home).absolute())
    if isinstance(ledger := tree.get("privacy", {}).get("ledger"), str):
        # A run is resumed from anywhere, and must find what its clients have spent.
        tree["privacy"]["ledger"] = str(Path(ledger).absolute())


def _plain(config: DictConfig, prefix: str, problems: Problems) -> dict[str, Any]:
    """Return a section without interpolations and without the keys that have no value."""
    plain: dict[str, Any] = {}
    for name in map(str, config):
        key = f"{prefix}{name}"
        try:
            if OmegaConf.is_missing(config, name):
                problems[key] = f"{key}: must be given"
            elif OmegaConf.is_dict(config[name]):
                plain[name] = _plain(config[name], f"{key}.", problems)
            elif OmegaConf.is_list(config[name]):
                plain[name] = OmegaConf.to_container(config[name], resolve=True)
            else:
                plain[name] = config[name]
        except OmegaConfBaseException as reason:
            problems[key] = f"{key}: {str(reason).splitlines()[0]}"
    return plain


def _new_folder() -> Path:
    """Return a folder below runs/ that does not exist yet."""
    stem = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    folder, number = stem, 2
    while folder.exists():
        folder, number = stem.with_name(f"{stem.name}-{number}"), number + 1
    return folder
