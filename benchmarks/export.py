"""From an experiment to work that any engine can do."""

from collections.abc import Iterator
from itertools import count, islice

import torch
from torch import nn

from benchmarks.plain import Adapted, Encoder, perceptron
from benchmarks.work import Noise, Work
from fedsys.adapters.lowrank import low_rank_layers
from fedsys.config import Experiment
from fedsys.federation import build_model
from fedsys.models.attention import ATTENTION
from fedsys.privacy.sample_level import SamplePrivacy
from fedsys.seeds import numpy_generator


def export(experiment: Experiment, rounds: int) -> Work:
    """Return the first ``rounds`` rounds; raises ``ValueError`` where batches differ in size."""
    tokenizer = experiment.model.tokenizer()
    dataset = experiment.data.load(tokenizer, experiment.seed, experiment.partition.keep)
    built = build_model(experiment, dataset, torch.device("cpu"))
    rows = dataset.train.batch(torch.arange(len(dataset.train)))
    training, seed = experiment.client, experiment.seed
    shards = experiment.partition.split(dataset, experiment.num_clients, seed)
    plan = torch.stack(
        [
            torch.stack([training.batches(shards.rows(c), seed, index, c) for c in cohort])
            for index, cohort in enumerate(islice(cohorts(experiment), rounds), start=1)
        ]
    )
    if (plan < 0).any():
        raise ValueError("the rows of a client are no whole number of batches")
    return Work(
        model=perceptron(built.get_submodule("fc1"), built.get_submodule("head"))
        if tokenizer is None
        else encoder(built, None if rows["attention_mask"].all() else tokenizer.pad_token_id),
        inputs=rows["x"].flatten(1) if tokenizer is None else rows["input_ids"],
        labels=rows["labels"],
        plan=plan,
        lr=training.lr,
        num_clients=experiment.num_clients,
        noise=_noise(experiment),
    )


def encoder(model: nn.Module, padding: int | None) -> nn.Module:
    """Return the plain form of an adapted encoder of rows filled up with ``padding``, if any."""
    for name, layer in list(low_rank_layers(model)):
        parent, _, leaf = name.rpartition(".")
        plain = Adapted(layer.base, layer.A.weight, layer.R, layer.B.weight)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, plain)
    backbone = model.get_submodule("backbone")
    if backbone.config._attn_implementation == ATTENTION:  # type: ignore[union-attr]
        # The same two products by their name in transformers, which every environment has.
        backbone.set_attn_implementation("eager")  # type: ignore[operator]
    return Encoder(backbone, model.get_submodule("classifier"), padding)  # type: ignore[arg-type]


def cohorts(experiment: Experiment) -> Iterator[list[int]]:
    """Yield the clients of each round, the same as in fedsys."""
    participation, number = experiment.participation, experiment.num_clients
    state = participation.init(number)
    for index in count(1):
        draw = numpy_generator(experiment.seed, "participation", index)
        cohort, state = participation.draw(index, number, state, draw)
        yield cohort


def _noise(experiment: Experiment) -> Noise | None:
    privacy = experiment.privacy
    if not isinstance(privacy, SamplePrivacy):
        return None
    if privacy.noise_multiplier is None:
        raise ValueError("the benchmarks need privacy.noise_multiplier")
    return Noise(privacy.clipping_norm, privacy.noise_multiplier)
