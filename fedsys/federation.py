"""The composition root: from an experiment's parts to a federation that can run.

What fedsys, strategies and clients keep apart is put together here and nowhere else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import nn

from clients import Site
from clients.store import DiskStore, MemoryStore
from fedsys import messages
from fedsys.adapters import LoRASB
from fedsys.adapters.lora_sb import (
    layer_shapes,
    shared_factors,
    summed_gradients,
)
from fedsys.adapters.lowrank import low_rank_layers
from fedsys.allocator import keep_freed_memory
from fedsys.cohort import CohortModel
from fedsys.config import Experiment
from fedsys.data import Dataset, Shards
from fedsys.errors import ConfigError, DataError
from fedsys.evaluate import evaluate
from fedsys.models import choose_attention
from fedsys.params import Params
from fedsys.participation import SupportsFit, SupportsMarginals
from fedsys.population import Population
from fedsys.privacy.canaries import Canaries, Planted
from fedsys.privacy.release import Spent
from fedsys.privacy.sample_level import SamplePrivacy
from fedsys.protection import account_of, data_name
from fedsys.snapshot import Snapshot
from fedsys.strategy import Strategy
from strategies import FedSB
from strategies.feedback import codec


@dataclass
class Federation:
    """Data, model, strategy and settings of one experiment, put together."""

    experiment: Experiment
    dataset: Dataset
    shards: Shards
    model: CohortModel
    strategy: Strategy
    site: Site
    device: torch.device
    planted: Planted | None = None  # canaries among the rows, for an audit

    @property
    def initial(self) -> ArrayRecord:
        """The arrays before round 1."""
        return messages.encode_flat(self.model.initial)

    def first_snapshot(self) -> Snapshot:
        """Return round 0, whose structure every checkpoint of the run has."""
        params = self.model.layout.unpack(self.model.initial)
        return Snapshot(
            round=0,
            params=params,
            state=self.strategy.init(params, len(self.shards)),
            participation=self.strategy.participation.init(len(self.shards)),
        )

    def evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Return loss and accuracy of x_t on the held-out rows."""
        held_out = self.dataset.evaluation
        rows = torch.arange(len(held_out))
        batch = self.experiment.evaluate.batch_size
        start = self.site.start(arrays)
        metrics = evaluate(self.model, start, held_out, rows, batch, self.device)
        return metrics | {"norm": start.double().norm().item()}

    def facts(self) -> dict[str, Any]:
        """Return what ``summary.json`` says of the experiment."""
        return {
            "seed": self.experiment.seed,
            "strategy": type(self.experiment.strategy).__name__,
            "num_clients": len(self.shards),
            "trainable_parameters": self.model.layout.size,
        }

    def spending(self, spent: Mapping[int, Spent]) -> dict[str, Any]:
        """Return what ``summary.json`` says of the privacy that is spent; {} without any."""
        account = self.strategy.account
        if account is None:
            return {}
        return {
            "epsilon": account.epsilon(spent),
            "delta": account.delta,
            "privacy": account.facts(),
        }

    def accountants(self, spent: Mapping[int, Spent]) -> dict[str, Any]:
        """Return epsilon by three accountants, for the client that has spent most.

        Raises ``AccountingError`` when they disagree by more than they can.
        """
        account = self.strategy.account
        figures = account.figures(spent) if account is not None else None
        return {} if figures is None else {"accountants": figures.as_dict()}


def assemble(experiment: Experiment, phase: Callable[[str], None] = lambda _: None) -> Federation:
    """Load the data and the model and attach the adapter; ``phase`` is told what goes on.

    Raises ``DataError`` for malformed data and ``ConfigError`` for settings that only the loaded
    data and model can refute.
    """
    try:
        return _assemble(experiment, phase)
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def _assemble(experiment: Experiment, phase: Callable[[str], None]) -> Federation:
    keep_freed_memory()
    if experiment.engine.threads:
        torch.set_num_threads(experiment.engine.threads)
    device = _device(experiment.device)
    phase("loading data")
    tokenizer = experiment.model.tokenizer()
    dataset = experiment.data.load(tokenizer, experiment.seed, experiment.partition.keep)
    if experiment.dtype == "float64":
        dataset = dataset.double()
    shards = experiment.partition.split(dataset, experiment.num_clients, experiment.seed)
    if (planted := _planted(experiment, dataset, shards)) is not None:
        dataset, shards = planted.dataset, planted.shards
    phase("loading the model")
    model = CohortModel(build_model(experiment, dataset, device)).to(device)
    strategy = _strategy(experiment, model, dataset, shards, device)
    initial = model.layout.unpack(model.initial)
    attack = experiment.attack
    flips = attack is not None and attack.flips_labels
    if flips and dataset.num_classes is None:
        raise ConfigError(["attack: the data have no classes, and so no labels to flip"])
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
        codec=strategy.codec(initial),
        # Without checkpoints nobody comes back for what the clients remember.
        store=DiskStore(experiment.out / "clients")
        if experiment.checkpoint.every
        else MemoryStore(),
        flips_below=attack.malicious(len(shards)) if flips else 0,
        num_classes=dataset.num_classes or 0,
        data=data_name(experiment),
        protects=getattr(experiment.privacy, "unit", "") == "record",
        secagg=experiment.secagg,
        hides_failures=getattr(experiment.privacy, "unit", "") == "client",
    )
    return Federation(experiment, dataset, shards, model, strategy, site, device, planted)


def _planted(experiment: Experiment, dataset: Dataset, shards: Shards) -> Planted | None:
    privacy = experiment.privacy
    if not isinstance(privacy, SamplePrivacy) or privacy.canaries is None:
        return None
    return Canaries(count=privacy.canaries).plant(dataset, shards, experiment.seed)


def build_model(experiment: Experiment, dataset: Dataset, device: torch.device) -> nn.Module:
    """Return the plain model with the adapter attached, and its parameters in their dtypes.

    ``dtype`` is that of the frozen base; what is trained, and the factors beside it, is in float32
    or, when all is to be exact, in float64.
    """
    model: nn.Module = experiment.model.build(dataset, experiment.seed)
    dtype = getattr(torch, experiment.dtype)
    for param in model.parameters():  # before there are factors, which are drawn in this precision
        param.data = param.data.to(torch.float64 if dtype == torch.float64 else torch.float32)
    experiment.adapter.attach(model, experiment.seed)
    layers = [layer for _, layer in low_rank_layers(model)]
    factors = {id(layer.A.weight) for layer in layers} | {id(layer.B.weight) for layer in layers}
    for param in model.parameters():
        # Buffers stay: rotary frequencies, for one, need their precision.
        if not param.requires_grad and id(param) not in factors:
            param.data = param.data.to(dtype)
    choose_attention(model, dtype, device)
    return model


def _strategy(
    experiment: Experiment,
    model: CohortModel,
    dataset: Dataset,
    shards: Shards,
    device: torch.device,
) -> Strategy:
    participation = experiment.participation
    if isinstance(participation, SupportsFit):
        participation = participation.fit(Population(dataset, shards, experiment.seed))
    rates = None
    if isinstance(participation, SupportsMarginals):
        rates = participation.marginals(len(shards))
    settings: dict[str, Any] = {
        "participation": participation,
        "rates": rates,
        "attack": experiment.attack,
        "defence": experiment.defence,
        "seed": experiment.seed,
        "fraction_evaluate": 1.0 if experiment.evaluate.clients else 0.0,
        "on_client_error": experiment.on_client_error,
        "min_clients": len(shards),
        "layout": model.layout,
        "account": account_of(experiment, shards, participation),
        "secagg": experiment.secagg,
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
    if experiment.compression is not None:
        settings["compression"] = codec(experiment.compression, model.layout)
    return replace(experiment.strategy, **settings).bind(model.model)


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
