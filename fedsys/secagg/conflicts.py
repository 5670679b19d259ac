"""What secagg=true cannot be combined with, each refused with its reason.

The server learns one sum of a cohort's updates, all of weight one, and each client clips its own.
Whatever needs an update by itself, at the server or in the clear, has none to work on.

Classes are told by their names, as in ``fedsys.conflicts``.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedsys.privacy.client_level import amplification, expected_cohort
from fedsys.secagg.settings import FEWEST

if TYPE_CHECKING:
    from fedsys.config import Experiment

_FEDAVG = "set strategy=fedavg or another that takes the mean of the updates"
_FACTORS = "a sum of factors is no sum of products; set strategy=fed_sb, ffa_lora or fedit"
_OWN = f"it weighs each client by itself, and the server sees their sum only; {_FEDAVG}"
_LAST = f"it keeps each client's last update, which no server then sees; {_FEDAVG}"
# Strategies that need more of the updates than their sum.
_NEEDS_UPDATES = {
    "FedAU": _OWN,
    "KnownProbability": _OWN,
    "AverageAll": f"its divisor is not the number of clients in the sum; {_FEDAVG}",
    "MIFA": _LAST,
    "FedVARP": _LAST,
    "FedExLoRA": f"it adds the mean of the products B A; {_FACTORS}",
    "FLoRA": f"it stacks the factors of every client; {_FACTORS}",
    "FRL": f"clients send rankings, which are votes and no numbers; {_FEDAVG}, and adapter=full",
    "EControl": f"the server's h is the mean of what each client sends; {_FEDAVG}",
}
# Of delta: how likely a round without a sum may be, which shows that a cohort was small. What such
# rounds add to delta is (1 + e^epsilon) times that, so less than it for any epsilon below 13.
_RARE = 1e-6

Said = Callable[[str], str]  # a group -> its option as the user types it, such as strategy=fedau


def refusals(experiment: "Experiment", said: Said) -> list[str]:
    """Return the reasons why ``experiment``, in which secagg=true, is refused.

    A part that is None has no say.
    """
    return [
        *_strategy(experiment, said),
        *_received(experiment, said),
        *_cohort(experiment, said),
        *(_noise(experiment, said) if _is(experiment.privacy, "ClientPrivacy") else ()),
    ]


def _strategy(experiment: "Experiment", said: Said) -> list[str]:
    strategy = experiment.strategy
    if strategy is None:
        return []
    pair = f"{said('strategy')} with secagg=true"
    bases = [base for base in type(strategy).__mro__ if base.__name__ in _NEEDS_UPDATES]
    if bases:
        return [f"{pair}: {_NEEDS_UPDATES[bases[0].__name__]}"]
    for hook in ("combine", "weight"):
        if _owner(strategy, hook) != "Strategy":
            return [f"{pair}: its {hook} would see one update, the mean; {_FEDAVG}"]
    if strategy.weighting != "uniform":
        return [
            f"strategy.weighting={strategy.weighting} with secagg=true: a sum has equal weights;"
            " set strategy.weighting=uniform"
        ]
    return []


def _received(experiment: "Experiment", said: Said) -> list[str]:
    """Return what would have to work on single updates, or shows them."""
    reasons = []
    if experiment.compression is not None:
        reasons.append(
            f"{said('compression')} with secagg=true: masked numbers are random, which nothing"
            " compresses; set compression=none, and secagg.bits for smaller messages"
        )
    if experiment.defence is not None:
        reasons.append(
            f"{said('defence')} with secagg=true: it compares updates, of which the server sees"
            " the sum only; set defence=none, as clients clip to secagg.clipping_norm"
        )
    if experiment.attack is not None and not experiment.attack.flips_labels:
        reasons.append(
            f"{said('attack')} with secagg=true: the adversary stands at the server, where it"
            " would find no update to replace; attack=label_flip composes"
        )
    if getattr(experiment.adapter, "init", "") == "client_sum":
        reasons.append(
            "adapter.init=client_sum with secagg=true: clients would send their gradients in the"
            " clear; set adapter.init=seeded_random or public, or private with privacy=sample"
        )
    return reasons


def _cohort(experiment: "Experiment", said: Said) -> list[str]:
    participation, clients = experiment.participation, experiment.num_clients
    if participation is None or not clients:
        return []
    try:
        expected = expected_cohort(participation, clients)
    except ValueError:  # nobody knows: rounds of too few are told as they come
        return []
    if expected >= FEWEST:
        return []
    return [
        f"{said('participation')} with num_clients={clients} and secagg=true: {expected:.3g}"
        f" clients are expected in a round, and a sum of fewer than {FEWEST} shows too much of"
        " each; ask more clients a round"
    ]


def _noise(experiment: "Experiment", said: Said) -> list[str]:
    """Return what breaks the bound on a client's share that the noise of the server relies on."""
    privacy, secagg = experiment.privacy, experiment.secagg
    reasons = []
    if privacy.quantile is not None:
        reasons.append(
            f"privacy.quantile={privacy.quantile} with secagg=true: clients clip themselves, to a"
            " norm that does not follow their norms; set privacy.quantile=null"
        )
    if privacy.clipping_norm != secagg.clipping_norm:
        reasons.append(
            f"privacy.clipping_norm={privacy.clipping_norm:g} with"
            f" secagg.clipping_norm={secagg.clipping_norm:g}: with secagg=true clients clip"
            " themselves, once; set both to the same"
        )
    return reasons + _hidden(experiment, said)


def _hidden(experiment: "Experiment", said: Said) -> list[str]:
    """Return why rounds without a sum would tell who took part, where nobody may know.

    That somebody is lost in mid-round is taken to have nothing to do with what the clients hold.
    """
    participation, clients = experiment.participation, experiment.num_clients
    if participation is None or not clients or not experiment.rounds:
        return []
    rate = amplification(participation)
    delta = experiment.privacy.delta_of(clients)
    if rate is None or experiment.rounds * few(clients - 1, rate) <= _RARE * delta:
        return []
    return [
        f"{said('participation')} with secagg=true and privacy=client: a cohort of fewer than"
        f" {FEWEST} has no sum, which shows in the model that it was small; of {rate * clients:.3g}"
        " expected clients that is too likely for delta. Raise participation.rate or num_clients,"
        " or set participation=uniform"
    ]


def few(clients: int, rate: float) -> float:
    """Return how likely fewer than ``FEWEST`` of ``clients`` take part, each by a coin."""
    counts = range(min(FEWEST, clients + 1))
    return sum(math.comb(clients, k) * rate**k * (1 - rate) ** (clients - k) for k in counts)


def _is(part: Any, *names: str) -> bool:
    return any(base.__name__ in names for base in type(part).__mro__)


def _owner(part: Any, method: str) -> str:
    """Return the name of the class that ``part`` has ``method`` from."""
    return next(base.__name__ for base in type(part).__mro__ if method in vars(base))
