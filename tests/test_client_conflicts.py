"""Every refusal of privacy=client, by its reason, and what stays allowed."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from fedsys.adapters import LoRASB
from fedsys.attacks import SignFlip
from fedsys.collusion import ALIE
from fedsys.compression import TopK
from fedsys.defences import Krum, Median, NormClip
from fedsys.participation import Bernoulli, Cyclic, Markov, Uniform
from fedsys.privacy.client_conflicts import refusals
from fedsys.strategy import Strategy
from fedsys.trace import Trace
from strategies import (
    FRL,
    MIFA,
    AverageAll,
    EControl,
    FedAdam,
    FedAU,
    FedAvg,
    FedExLoRA,
    FedIT,
    FedProx,
    FedSB,
    FedVARP,
    FFALoRA,
    FLoRA,
    KnownProbability,
)
from tests.test_client_level import privacy

UNIFORM = {"weighting": "uniform"}


def reasons(**parts: object) -> list[str]:
    """Return why an experiment of ``parts`` is refused; without any it is not."""
    allowed = {
        "num_clients": 100,
        "privacy": privacy(),
        "strategy": FedAvg(**UNIFORM),
        "adapter": None,
        "participation": Bernoulli(rate=0.1),
        "compression": None,
        "attack": None,
        "defence": None,
        "secagg": None,
        "evaluate": SimpleNamespace(clients=False),
        "on_client_error": "skip",
    }
    experiment = SimpleNamespace(**{**allowed, **parts})
    return refusals(experiment, lambda group: f"{group}=typed")


@dataclass(kw_only=True)
class Signs(Strategy):
    """Somebody's own, that merges in a way of its own."""

    weighting: str = "uniform"

    def combine(self, updates, state):
        return {}, state


@dataclass(kw_only=True)
class ByClient(Strategy):
    weighting: str = "uniform"

    def weight(self, update):
        return float(update.client)


@dataclass(kw_only=True)
class Mine(FedAU):
    """Somebody's variant of FedAU."""


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"strategy": FedProx(**UNIFORM)},
        {"strategy": FedAdam(**UNIFORM)},
        {"strategy": FedSB(**UNIFORM), "adapter": LoRASB(rank=2, init="seeded_random")},
        {"strategy": FedSB(**UNIFORM), "adapter": LoRASB(rank=2, init="public")},
        {"strategy": FedIT(**UNIFORM)},
        {"strategy": FFALoRA(**UNIFORM)},
        {"compression": TopK()},
        {"compression": TopK(feedback="ec")},
        {"attack": SignFlip(fraction=0.2, factor=2.0)},
        {"attack": ALIE(fraction=0.2, accomplices=4)},
        {"participation": Uniform(10), "privacy": privacy(rounds=5)},
        {"participation": Markov(rate=0.1)},
        {"participation": Cyclic(rate=0.1)},
        {
            "participation": Uniform(10),
            "attack": SignFlip(fraction=0.2, factor=2.0, honest_majority=True),
        },
        {"participation": Bernoulli(rate=0.9), "privacy": privacy(quantile=0.5)},
        {"secagg": "on"},  # which has refusals of its own
        {"privacy": privacy(delta=0.0099)},
        {"strategy": None, "participation": None, "num_clients": None, "evaluate": None},
    ],
    ids=str,
)
def test_what_keeps_the_guarantee_is_allowed(parts):
    assert reasons(**parts) == []


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"strategy": FedAvg()}, ["strategy.weighting=examples", "strategy.weighting=uniform"]),
        ({"strategy": FedAU()}, ["its share has no bound", "strategy=fedavg"]),
        ({"strategy": Mine()}, ["its share has no bound", "strategy=fedavg"]),
        ({"strategy": AverageAll()}, ["a divisor of its own", "strategy=fedavg"]),
        ({"strategy": KnownProbability()}, ["its weights 1 / p_n", "strategy=fedavg"]),
        ({"strategy": MIFA()}, ["last update in every round", "strategy=fedavg"]),
        ({"strategy": FedVARP()}, ["last update in every round", "strategy=fedavg"]),
        ({"strategy": FedExLoRA()}, ["clipping factors does not bound products", "fed_sb"]),
        ({"strategy": FLoRA()}, ["clipping factors does not bound products", "fed_sb"]),
        ({"strategy": FRL()}, ["rankings, which have no norm", "adapter=full"]),
        ({"strategy": Signs()}, ["stand in for its combine", "strategy=fedavg"]),
        ({"strategy": ByClient()}, ["stand in for its weight", "strategy=fedavg"]),
        ({"strategy": EControl()}, ["the server's h", "compression.feedback=ec or none"]),
        ({"compression": TopK(feedback="ef21")}, ["compression.feedback=ef21 ", "the server's h"]),
        ({"compression": TopK(feedback="ef21m")}, ["compression.feedback=ef21m ", "h"]),
        ({"compression": TopK(feedback="econtrol")}, ["compression.feedback=econtrol ", "h"]),
        ({"defence": NormClip(clipping_norm=1.0)}, ["defence=typed", "privacy.clipping_norm"]),
        ({"defence": Median()}, ["defence=typed", "which of the others count", "defence=none"]),
        ({"defence": Krum()}, ["defence=typed", "which of the others count", "defence=none"]),
        (
            {"adapter": LoRASB(rank=2, init="client_sum")},
            ["init=client_sum", "=public or"],
        ),
        (
            {"evaluate": SimpleNamespace(clients=True)},
            ["evaluate.clients=true", "without noise", "evaluate.clients=false"],
        ),
        (
            {"participation": Trace(path="a.csv")},
            ["participation=typed", "how many clients to expect", "participation=uniform"],
        ),
        ({"participation": Markov(alpha=0.1)}, ["participation.alpha=0.1", "alpha=null"]),
        (
            {"participation": Bernoulli(rate=0.009)},
            ["0.9 clients are", "participation.rate"],
        ),
        ({"privacy": privacy(rounds=5)}, ["privacy.rounds=5", "privacy.rounds=null"]),
        (
            {"attack": SignFlip(fraction=0.2, factor=2.0, honest_majority=True)},
            ["attack.honest_majority=true", "no longer coins", "attack.honest_majority=false"],
        ),
        (
            {"privacy": privacy(quantile=0.5)},
            ["privacy.count_noise=0.5", "half of the noise multiplier, 1", "privacy.quantile=null"],
        ),
        (
            {"privacy": privacy(delta=0.01)},
            ["privacy.delta must be", "privacy.delta=null"],
        ),
    ],
    ids=str,
)
def test_what_breaks_the_guarantee_is_refused_with_the_reason(parts, words):
    (reason,) = reasons(**parts)
    assert all(word in reason for word in words), reason


def test_all_reasons_are_told_at_once():
    found = reasons(
        strategy=FedAvg(),
        defence=Median(),
        evaluate=SimpleNamespace(clients=True),
        on_client_error="skip",
        privacy=privacy(delta=0.5),
    )
    assert len(found) == 4
