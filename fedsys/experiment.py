"""A run from beginning to end: assemble, train, write the result; and how to go on with one."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from omegaconf import DictConfig, OmegaConf

from clients import CohortApp
from fedsys.checkpoint import Checkpoints, ClientStates
from fedsys.chunks import chunk_size
from fedsys.config import Experiment, build, configure
from fedsys.console import Observer, Silent
from fedsys.data import plot_partition, write_manifest
from fedsys.engines.faulty import FaultGrid
from fedsys.engines.local import Local, LocalGrid
from fedsys.errors import ConfigError, RunError
from fedsys.exports import check_export, write_adapter, write_merged
from fedsys.federation import Federation, assemble
from fedsys.models.hub import PACKAGED
from fedsys.params import Params
from fedsys.participation_picture import plot_participation
from fedsys.privacy.observed import Observed
from fedsys.protection import protected
from fedsys.records import RoundRecord
from fedsys.run_folder import Metrics, RunFolder, chunk_of, new_run_id
from fedsys.snapshot import Snapshot
from fedsys.strategy import Strategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    folder: Path
    summary: Metrics  # summary.json
    metrics: list[Metrics]  # metrics.jsonl
    params: Params  # the global model's trainable tensors
    experiment: Experiment


def run(overrides: Sequence[str] = (), observer: Observer | None = None) -> RunResult:
    """Run the experiment that ``overrides`` describe, as typed after ``fedsys run``.

    Raises ``ConfigError`` before anything loads, ``DataError`` for malformed data, ``RunError``
    and ``ClientFailure`` when the run cannot go on.
    """
    return run_experiment(configure(list(overrides)), observer)


def resume(folder: Path | str, observer: Observer | None = None) -> RunResult:
    """Continue the run in ``folder`` from its last checkpoint, to the same bits."""
    experiment = saved_experiment(Path(folder))
    return run_experiment(experiment, observer)


def saved_experiment(folder: Path) -> Experiment:
    """Return the experiment of a run folder; raises ``ConfigError`` when there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError([f"{folder}: is no run folder, it has no config.yaml"])
    experiment = build(cast(DictConfig, OmegaConf.load(path)))
    overrides = folder / "overrides.yaml"
    typed = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.is_file() else []
    return replace(experiment, out=folder, overrides=[str(text) for text in typed or []])


def run_experiment(experiment: Experiment, observer: Observer | None = None) -> RunResult:
    """Run ``experiment`` on its engine, or go on with it where its folder has a checkpoint."""
    told: Observer = observer or Silent()
    told.started(experiment)
    if isinstance(experiment.engine, Local):
        return _run_here(experiment, told)
    result: RunResult = experiment.engine.run(experiment, told)
    return result


def _run_here(experiment: Experiment, told: Observer) -> RunResult:
    """Run ``experiment`` with its clients in this process."""
    federation = assemble(experiment, told.phase)
    # The bits of a run depend on the chunk, and the chunk may on what memory was free.
    chunk = chunk_of(experiment.out) or chunk_size(federation)
    app = CohortApp(lambda _: federation.site)
    grid = LocalGrid(app, len(federation.shards), chunk=chunk)
    return run_federation(federation, grid, grid.states, told, chunk=chunk)


def run_federation(
    federation: Federation,
    grid: Grid,
    clients: ClientStates,
    observer: Observer,
    engine: str = "local",
    run: str = "",
    chunk: int | None = None,
) -> RunResult:
    """Train over ``grid``; ``clients`` are the memories that its simulated clients keep, if any.

    ``run`` is the id of a run that clients elsewhere know already; "" for a new one. ``chunk`` is
    how many clients train in one pass, where they do.
    """
    experiment = federation.experiment
    if experiment.fault is not None:
        grid = FaultGrid(grid, experiment.fault, experiment.seed)
    if engine != "local":
        federation.strategy = _among_others(federation)
    folder = RunFolder(experiment.out, experiment.rounds, experiment.checkpoint, clients, observer)
    folder.on_factors = federation.site.take
    folder.on_base = lambda snapshot: federation.site.rebase(snapshot.base, snapshot.basis)
    if federation.planted is not None:
        folder.observed = Observed(experiment.out / "audit", federation.model.layout)
    with folder.locked():
        if not folder.exists():
            _describe_partition(federation)
            folder.create(experiment.resolved, experiment.overrides, run or new_run_id(), chunk)
        with protected(federation, clients_here=engine == "local") as folder.ledger:
            summary = _train(federation, grid, folder, observer, engine)
    _report(experiment.out)
    result = RunResult(experiment.out, summary, folder.lines(), folder.params, experiment)
    observer.finished(result)
    return result


def _among_others(federation: Federation) -> Strategy:
    """Return the strategy for clients in other processes, who say which of them they are."""
    engine, clients = federation.experiment.engine, len(federation.shards)
    settings: dict[str, Any] = {"seats": clients}
    settings["min_clients"] = min(getattr(engine, "min_clients", None) or clients, clients)
    if (patience := getattr(engine, "patience", None)) is not None:
        settings["patience"] = patience
    return replace(federation.strategy, **settings)


def _train(
    federation: Federation, grid: Grid, folder: RunFolder, observer: Observer, engine: str
) -> Metrics:
    """Run all rounds, write the result, and return the summary, which is written in any case."""
    experiment = federation.experiment
    try:
        observer.phase("training")
        federation.strategy.start(
            grid,
            federation.initial,
            experiment.rounds,
            experiment.timeout,
            evaluate_fn=partial(_evaluate, federation, folder),
            recorder=folder,
        )
        _describe_participation(federation, folder)
        observer.phase("writing the adapter")
        _export(federation, folder.params, experiment.out / "adapter")
        accountants = federation.accountants(folder.spent)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        reason = f"{type(error).__name__}: {error}"
        facts = federation.facts() | federation.spending(folder.spent)
        folder.summarise(status, **facts, engine=engine, reason=reason)
        raise
    facts = federation.facts() | federation.spending(folder.spent) | accountants
    return folder.summarise("completed", **facts, engine=engine)


def export(folder: Path | str, directory: Path | str, merged: bool = False) -> Path:
    """Write the result of the run in ``folder`` to ``directory``; return the directory."""
    federation, snapshot = restored(saved_experiment(Path(folder)))
    out = Path(directory)
    if merged:
        tokenizer = federation.experiment.model.tokenizer()
        write_merged(federation.model.model, snapshot.params, out, tokenizer)
    else:
        _export(federation, snapshot.params, out)
    return out


def restored(
    experiment: Experiment, phase: Callable[[str], None] = lambda _: None
) -> tuple[Federation, Snapshot]:
    """Return the federation of a run that was saved, and where its last checkpoint left it.

    Raises ``RunError`` where there is no checkpoint.
    """
    federation = assemble(experiment, phase)
    checkpoints = Checkpoints(experiment.out / "checkpoints")
    found = checkpoints.load(federation.first_snapshot())
    if found is None:
        raise RunError(f"{experiment.out} has no checkpoint; run it with checkpoint.every=1")
    snapshot, _ = found
    if snapshot.frozen:
        federation.site.take(snapshot.frozen)
    if snapshot.version:
        federation.site.rebase(snapshot.base, snapshot.basis)
    return federation, snapshot


def _report(folder: Path) -> None:
    try:
        from fedsys.report import write_report

        write_report(folder)
    except ModuleNotFoundError as error:
        log.warning("no report.html: %s; pip install 'fedsys[report]'", error)


def _evaluate(
    federation: Federation, folder: RunFolder, round: int, arrays: ArrayRecord
) -> MetricRecord | None:
    every, last = federation.experiment.evaluate.every, federation.experiment.rounds
    if round not in (0, last) and (not every or round % every):
        return None
    metrics = federation.evaluate(arrays)
    if round == 0:
        loss, accuracy = metrics["eval_loss"], metrics.get("eval_accuracy")
        folder.write(
            RoundRecord(round=0, eval_loss=loss, eval_accuracy=accuracy, norm=metrics["norm"])
        )
    return MetricRecord({**metrics})


def _describe_partition(federation: Federation) -> None:
    experiment, dataset, shards = federation.experiment, federation.dataset, federation.shards
    write_manifest(experiment.out / "partition.json", shards, dataset, experiment.seed)
    try:
        plot_partition(experiment.out / "partition.png", shards, dataset)
    except ModuleNotFoundError as error:
        log.warning("no partition.png: %s; pip install 'fedsys[report]'", error)


def _describe_participation(federation: Federation, folder: RunFolder) -> None:
    path, clients = folder.folder / "participation.png", len(federation.shards)
    try:
        plot_participation(path, folder.participants(), clients, federation.strategy.rates)
    except ModuleNotFoundError as error:
        log.warning("no participation.png: %s; pip install 'fedsys[report]'", error)


def _export(federation: Federation, params: Params, folder: Path) -> None:
    """Write the adapter, read it back into a fresh base, and compare the logits of some rows."""
    experiment, model = federation.experiment, federation.model
    if federation.strategy.base():  # the adapter alone would lack what went into the base
        write_merged(model.model, params, folder, experiment.model.tokenizer())
    else:
        name = getattr(experiment.model, "name", None)
        write_adapter(model.model, params, folder, PACKAGED.get(str(name), name))
    rows = torch.arange(min(8, len(federation.dataset.evaluation)))
    batch = federation.dataset.evaluation.batch(rows)
    batch.pop("labels")
    inputs = {name: value.to(federation.device) for name, value in batch.items()}
    model.bind({name: value[None].to(federation.device) for name, value in params.items()})
    with torch.no_grad():
        logits = model(**inputs).cpu()
    fresh = experiment.model.build(federation.dataset, experiment.seed)
    if experiment.dtype == "float64":
        fresh.double()
    check_export(fresh, folder, logits, batch)
