"""The composition root: from an experiment's parts to a run.

Everything that fedsys, strategies and clients keep apart is put together here and nowhere else.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from omegaconf import OmegaConf
from torch import nn

from clients import CohortApp, Site
from fedsys import messages
from fedsys.adapters import LoRASB
from fedsys.adapters.lora_sb import (
    layer_shapes,
    load_factors,
    shared_factors,
    summed_gradients,
)
from fedsys.adapters.lowrank import low_rank_layers
from fedsys.cohort import CohortModel
from fedsys.config import Experiment, build, configure
from fedsys.console import Observer
from fedsys.data import Dataset, Shards, plot_partition, write_manifest
from fedsys.engines.local import LocalGrid
from fedsys.errors import ConfigError, RunError
from fedsys.evaluate import evaluate
from fedsys.export import check_export, write_adapter, write_merged
from fedsys.models import choose_attention
from fedsys.params import Params
from fedsys.records import RoundRecord
from fedsys.run_folder import Metrics, RunFolder
from fedsys.snapshot import Snapshot
from fedsys.strategy import Strategy
from strategies import FedSB

log = logging.getLogger(__name__)

POSITIONS = 4096  # positions of work in one pass that keep a core busy: rows times tokens
LARGEST_CHUNK = 100  # clients
LARGEST_MATRIX = 64_000_000  # numbers in the cohort's copies of the trainable tensors


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    folder: Path
    summary: Metrics  # summary.json
    metrics: list[Metrics]  # metrics.jsonl
    params: Params  # the global model's trainable tensors
    experiment: Experiment


class Silent:
    """The observer of a run that nobody watches."""

    def started(self, experiment: Experiment) -> None:
        pass

    def phase(self, text: str) -> None:
        pass

    def round(self, record: Mapping[str, Any], total: int) -> None:
        pass

    def failure(self, client: int, reason: str) -> None:
        pass

    def finished(self, result: RunResult) -> None:
        pass


@dataclass
class Federation:
    """Data, model and settings, put together for the embedded engine."""

    experiment: Experiment
    dataset: Dataset
    shards: Shards
    model: CohortModel
    strategy: Strategy
    site: Site
    device: torch.device

    @property
    def initial(self) -> ArrayRecord:
        """The arrays before round 1."""
        return messages.encode_flat(self.model.initial)


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
    experiment = build(OmegaConf.create(OmegaConf.load(path)))
    overrides = folder / "overrides.yaml"
    typed = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.is_file() else []
    return replace(experiment, out=folder, overrides=[str(text) for text in typed or []])


def run_experiment(experiment: Experiment, observer: Observer | None = None) -> RunResult:
    """Run ``experiment``, or go on with it where its folder has a checkpoint."""
    observer = observer or Silent()
    observer.started(experiment)
    federation = assemble(experiment, observer)
    grid = LocalGrid(
        CohortApp(lambda _: federation.site),
        len(federation.shards),
        chunk=chunk_size(federation),
    )
    folder = RunFolder(
        experiment.out,
        experiment.rounds,
        experiment.checkpoint.every,
        experiment.checkpoint.keep,
        grid.states,
    )
    folder.listener = observer
    folder.on_factors = partial(_take_factors, federation.site)
    with folder.locked():
        if not (experiment.out / "config.yaml").exists():
            folder.create(experiment.resolved, experiment.overrides)
            _describe_partition(experiment, federation)
        facts = _facts(federation)
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
            observer.phase("writing the adapter")
            params = folder.last.params if folder.last else {}
            _export(federation, params, experiment.out / "adapter")
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            folder.summarise(status, **facts, reason=f"{type(error).__name__}: {error}")
            raise
        result = RunResult(
            experiment.out,
            folder.summarise("completed", **facts),
            folder.lines(),
            params,
            experiment,
        )
    observer.finished(result)
    return result


def export(folder: Path | str, directory: Path | str, merged: bool = False) -> Path:
    """Write the result of the run in ``folder`` to ``directory``; return the directory."""
    experiment = saved_experiment(Path(folder))
    federation = assemble(experiment, Silent())
    memory = RunFolder(experiment.out, experiment.rounds, 0, experiment.checkpoint.keep, {})
    memory.on_factors = partial(_take_factors, federation.site)
    restored = memory.checkpoints.load(_first_snapshot(federation))
    if restored is None:
        raise RunError(f"{folder} has no checkpoint to export; run it with checkpoint.every=1")
    snapshot, _ = restored
    memory.prepared(snapshot, 0)
    out = Path(directory)
    if merged:
        tokenizer = experiment.model.tokenizer()
        write_merged(federation.model.model, snapshot.params, out, tokenizer)
    else:
        _export(federation, snapshot.params, out)
    return out


# ---- putting a federation together


def assemble(experiment: Experiment, observer: Observer) -> Federation:
    """Load the data and the model and attach the adapter."""
    if experiment.engine.threads:
        torch.set_num_threads(experiment.engine.threads)
    device = _device(experiment.device)
    observer.phase("loading data")
    tokenizer = experiment.model.tokenizer()
    dataset = experiment.data.load(tokenizer, experiment.seed, experiment.partition.keep)
    shards = experiment.partition.split(dataset, experiment.num_clients, experiment.seed)
    observer.phase("loading the model")
    model = CohortModel(build_model(experiment, dataset, device)).to(device)
    strategy = _strategy(experiment, model, dataset, device)
    site = Site(
        model=model,
        examples=dataset.train,
        shards=shards,
        training=experiment.client,
        local_gradient=strategy.local_gradient,
        rounds=experiment.rounds,
        seed=experiment.seed,
        device=device,
        evaluate_batch=experiment.evaluate.batch_size,
        init_examples=getattr(experiment.adapter, "init_examples", None),
    )
    return Federation(experiment, dataset, shards, model, strategy, site, device)


def build_model(experiment: Experiment, dataset: Dataset, device: torch.device) -> nn.Module:
    """Return the plain model with the adapter attached and the frozen base in its dtype."""
    model: nn.Module = experiment.model.build(dataset, experiment.seed)
    experiment.adapter.attach(model, experiment.seed)
    dtype = getattr(torch, experiment.dtype)
    factors = {id(p) for _, layer in low_rank_layers(model) for p in (layer.A.weight, layer.B.weight)}
    for tensor in (*model.parameters(), *model.buffers()):
        frozen = not tensor.requires_grad and id(tensor) not in factors
        if frozen and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    choose_attention(model, dtype, device)
    return model


def chunk_size(federation: Federation) -> int:
    """Return how many clients train in one pass: ``engine.chunk``, or by the size of the work."""
    chosen = federation.experiment.engine.chunk
    if chosen is not None:
        return int(chosen)
    rows = federation.site.training.batch_size * federation.dataset.train.positions
    by_memory = LARGEST_MATRIX // max(federation.model.layout.size, 1)
    return max(1, min(POSITIONS // rows, by_memory, LARGEST_CHUNK))


def _strategy(
    experiment: Experiment, model: CohortModel, dataset: Dataset, device: torch.device
) -> Strategy:
    settings: dict[str, Any] = {
        "participation": experiment.participation,
        "seed": experiment.seed,
        "fraction_evaluate": 1.0 if experiment.evaluate.clients else 0.0,
        "on_client_error": experiment.on_client_error,
        "layout": model.layout,
    }
    adapter = experiment.adapter
    if isinstance(experiment.strategy, FedSB) and isinstance(adapter, LoRASB):
        settings |= {"adapter": adapter, "layers": layer_shapes(model.model)}
        if adapter.init == "seeded_random":
            settings["seeded_factors"] = shared_factors(model.model)
        elif adapter.init == "public":
            settings["public_gradients"] = partial(
                _public_gradients, model, dataset, adapter.init_examples, device
            )
    return replace(experiment.strategy, **settings)


def _public_gradients(
    model: CohortModel, dataset: Dataset, limit: int | None, device: torch.device
) -> Params:
    public = dataset.public
    if public is None:
        raise ConfigError(["adapter.init=public: needs data.public_fraction above 0"])
    model.bind(model.layout.unpack(model.initial[None].to(device)))
    rows = torch.arange(len(public))[:limit]
    batches = (
        {name: value.to(device) for name, value in public.batch(part).items()}
        for part in rows.split(32)
    )
    return summed_gradients(model, batches)


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# ---- during and after the run


def _take_factors(site: Site, factors: Params) -> None:
    load_factors(site.model.model, factors)
    site.__dict__.pop("basis", None)


def _evaluate(
    federation: Federation, folder: RunFolder, round: int, arrays: ArrayRecord
) -> MetricRecord | None:
    experiment = federation.experiment
    every = experiment.evaluate.every
    due = round in (0, experiment.rounds) or (every and round % every == 0)
    if not due:
        return None
    held_out = federation.dataset.evaluation
    start = federation.site.start(arrays)
    metrics = evaluate(
        federation.model,
        start,
        held_out,
        torch.arange(len(held_out)),
        experiment.evaluate.batch_size,
        federation.device,
    )
    if round == 0:
        folder.write(RoundRecord(round=0, **metrics))
    return MetricRecord(dict(metrics))


def _describe_partition(experiment: Experiment, federation: Federation) -> None:
    out, dataset, shards = experiment.out, federation.dataset, federation.shards
    write_manifest(out / "partition.json", shards, dataset, experiment.seed)
    try:
        plot_partition(out / "partition.png", shards, dataset)
    except ModuleNotFoundError as error:
        log.warning("no partition.png: %s; pip install 'fedsys[report]'", error)


def _facts(federation: Federation) -> dict[str, Any]:
    experiment = federation.experiment
    return {
        "seed": experiment.seed,
        "engine": "local",
        "strategy": type(experiment.strategy).__name__,
        "num_clients": len(federation.shards),
        "trainable_parameters": federation.model.layout.size,
    }


def _first_snapshot(federation: Federation) -> Snapshot:
    """Return round 0, whose structure every checkpoint of the run has."""
    params, clients = federation.model.layout.unpack(federation.model.initial), len(federation.shards)
    return Snapshot(
        round=0,
        params=params,
        state=federation.strategy.init(params, clients),
        participation=federation.experiment.participation.init(clients),
    )


def _export(federation: Federation, params: Params, folder: Path) -> None:
    """Write the adapter, read it back into a fresh base, and compare the logits of some rows."""
    experiment, model = federation.experiment, federation.model
    write_adapter(model.model, params, folder, getattr(experiment.model, "name", None))
    rows = torch.arange(min(8, len(federation.dataset.evaluation)))
    batch = federation.dataset.evaluation.batch(rows)
    batch.pop("labels")
    inputs = {name: value.to(federation.device) for name, value in batch.items()}
    model.bind({name: value[None].to(federation.device) for name, value in params.items()})
    with torch.no_grad():
        logits = model(**inputs).cpu()
    fresh = experiment.model.build(federation.dataset, experiment.seed)
    check_export(fresh, folder, logits, batch)
