"""The plain loop: one model, one client after the other, averaged in place.

It draws the same batches as fedsys, within the clock as fedsys does, and is otherwise as lean as a
loop can be: no messages or checks, all data in one tensor, sums in float32, and no attention mask,
for no row is padded.
"""

from collections.abc import Iterator, Mapping
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pace import Pace
from fedsys.adapters.lowrank import LowRank, low_rank_layers
from fedsys.config import Experiment
from fedsys.federation import build_model
from fedsys.params import Params
from fedsys.seeds import numpy_generator


class Adapted(nn.Module):
    """A linear layer with LoRA-SB: W x + b + B R A x, of which R is trained."""

    def __init__(self, layer: LowRank) -> None:
        """Take over the tensors of ``layer``."""
        super().__init__()
        self.base, self.R = layer.base, layer.R
        self.down, self.up = layer.A.weight, layer.B.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output."""
        y: Tensor = self.base(x)
        return y + F.linear(self.R(F.linear(x, self.down)), self.up)


class Encoder(nn.Module):
    """A transformer with a linear classifier on the mean of its hidden states."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        """Put both together."""
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of rows without padding."""
        logits: Tensor = self.classifier(self.backbone(input_ids=ids).last_hidden_state.mean(1))
        return logits


def encoder(model: nn.Module) -> nn.Module:
    """Return the plain form of an adapted encoder."""
    for name, layer in list(low_rank_layers(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Adapted(layer))
    return Encoder(model.get_submodule("backbone"), model.get_submodule("classifier"))


def perceptron(model: nn.Module) -> nn.Module:
    """Return the plain form of a perceptron with one hidden layer."""
    plain = nn.Sequential()
    plain.add_module("fc1", model.get_submodule("fc1"))
    plain.add_module("relu", nn.ReLU())
    plain.add_module("head", model.get_submodule("head"))
    return plain


def run(experiment: Experiment, pace: Pace) -> None:
    """Train until ``pace`` has had enough."""
    tokenizer = experiment.model.tokenizer()
    dataset = experiment.data.load(tokenizer, experiment.seed, experiment.partition.keep)
    built = build_model(experiment, dataset, torch.device("cpu"))
    model = perceptron(built) if tokenizer is None else encoder(built)
    rows = dataset.train.batch(torch.arange(len(dataset.train)))
    inputs = rows["x"].flatten(1) if tokenizer is None else rows["input_ids"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    training, seed = experiment.client, experiment.seed
    shards = experiment.partition.split(dataset, experiment.num_clients, seed)
    for index, cohort in enumerate(cohorts(experiment), start=1):
        pace.start()
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for client in cohort:
            copy_into(trained, start)
            optimizer = torch.optim.SGD(trained.values(), lr=training.lr)
            for batch in training.batches(shards.rows(client), seed, index, client):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[batch]), rows["labels"][batch]).backward()
                optimizer.step()
            for name, value in total.items():
                value += trained[name].detach()
        before, start = start, {name: value / len(cohort) for name, value in total.items()}
        pace.stop(before, start)


@torch.no_grad()
def copy_into(trained: Mapping[str, Tensor], values: Params) -> None:
    """Give ``trained`` the values of x_t."""
    for name, parameter in trained.items():
        parameter.copy_(values[name])


def cohorts(experiment: Experiment) -> Iterator[list[int]]:
    """Yield the clients of each round, the same as in fedsys."""
    participation, number = experiment.participation, experiment.num_clients
    state = participation.init(number)
    for index in count(1):
        draw = numpy_generator(experiment.seed, "participation", index)
        cohort, state = participation.draw(index, number, state, draw)
        yield cohort
