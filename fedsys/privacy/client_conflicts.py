"""What privacy=client cannot be combined with, each refused with its reason.

The guarantee rests on one fact: a client moves the sum of the clipped updates by at most C, and
nothing else of it is shown. Whatever weighs, compares, remembers or reports clients breaks it.

Classes are told by their names, as in ``fedsys.conflicts``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedsys.privacy.client_level import amplification, expected_cohort
from fedsys.privacy.release import check_delta
from fedsys.privacy.sample_conflicts import NEEDS_CHECKPOINT

if TYPE_CHECKING:
    from fedsys.config import Experiment

_FEDAVG = "set strategy=fedavg or another that takes the mean of the updates"
_FACTORS = "clipping factors does not bound products; set strategy=fed_sb, ffa_lora or fedit"
# Strategies that merge the updates in a way of their own, which the private sum would replace.
_MERGES = {
    "FedAU": f"its weights grow while a client is away, so its share has no bound; {_FEDAVG}",
    "KnownProbability": f"its weights 1 / p_n raise a client's share above C; {_FEDAVG}",
    "AverageAll": f"the private sum has a divisor of its own, the expected cohort; {_FEDAVG}",
    "MIFA": f"it adds a client's last update in every round, asked or not; {_FEDAVG}",
    "FedVARP": f"it adds a client's last update in every round, asked or not; {_FEDAVG}",
    "FedExLoRA": f"it adds the mean of the products B A; {_FACTORS}",
    "FLoRA": f"it adds the mean of the products B A; {_FACTORS}",
    "FRL": f"clients send rankings, which have no norm to clip; {_FEDAVG}, and adapter=full",
}
_KEEPS_H = ("ef21", "ef21m", "econtrol")
_PUBLIC = ("seeded_random", "public")  # initialisations that read no client's rows

Said = Callable[[str], str]  # a group -> its option as the user types it, such as strategy=fedau


def refusals(experiment: "Experiment", said: Said) -> list[str]:
    """Return the reasons why ``experiment``, in which privacy=client, is refused.

    A part that is None has no say.
    """
    return [
        *_strategy(experiment, said),
        *_received(experiment, said),
        *_shown(experiment, said),
        *_participation(experiment, said),
        *_delta(experiment),
        *_canaries(experiment),
    ]


def _strategy(experiment: "Experiment", said: Said) -> list[str]:
    strategy = experiment.strategy
    if strategy is None:
        return []
    pair = f"{said('strategy')} with privacy=client"
    names = [base.__name__ for base in type(strategy).__mro__]
    for name in names:
        if name in _MERGES:
            return [f"{pair}: {_MERGES[name]}"]
    for hook in ("combine", "weight"):
        if _owner(strategy, hook) != "Strategy":
            return [f"{pair}: the private sum would stand in for its {hook}; {_FEDAVG}"]
    if strategy.weighting != "uniform":
        return [
            f"strategy.weighting={strategy.weighting} with privacy=client: how many rows a client"
            " has would show in its share, and the sum of the shares would be private too; set"
            " strategy.weighting=uniform"
        ]
    return []


def _received(experiment: "Experiment", said: Said) -> list[str]:
    """Return what stands between the clients and the sum that it may not."""
    reasons = []
    feedback = getattr(experiment.compression, "feedback", "none")
    if feedback in _KEEPS_H or _is(experiment.strategy, "EControl"):
        reasons.append(
            f"compression.feedback={feedback} with privacy=client: the server's h would add up"
            " the noise of all rounds, of which the clients' h_n have none; set"
            " compression.feedback=ec or none"
        )
    if _is(experiment.defence, "NormClip"):
        reasons.append(
            f"{said('defence')} with privacy=client: updates are clipped to privacy.clipping_norm"
            " already; set defence=none"
        )
    elif experiment.defence is not None:
        reasons.append(
            f"{said('defence')} with privacy=client: one client may decide which of the others"
            " count, so its share is not bounded by C; set defence=none, as clipping bounds"
            " malicious clients too"
        )
    return reasons


def _shown(experiment: "Experiment", said: Said) -> list[str]:
    """Return what shows of the clients' data besides the noisy sums."""
    reasons = []
    first = getattr(experiment.adapter, "init", "seeded_random")
    if first not in _PUBLIC:
        reasons.append(
            f"adapter.init={first} with privacy=client: it sums gradients of the clients without"
            " clipping and noise for a client; set adapter.init=public or seeded_random"
        )
    if experiment.on_client_error == "fail":
        reasons.append(
            "on_client_error=fail with privacy=client: one client could stop the run, and so be"
            " seen; set on_client_error=skip"
        )
    if getattr(experiment.evaluate, "clients", False):
        reasons.append(
            "evaluate.clients=true with privacy=client: metrics of the clients' own data are"
            " without noise; set evaluate.clients=false"
        )
    return reasons


def _participation(experiment: "Experiment", said: Said) -> list[str]:
    participation, privacy = experiment.participation, experiment.privacy
    if participation is None or not experiment.num_clients:
        return []
    try:
        expected = expected_cohort(participation, experiment.num_clients)
    except ValueError as reason:
        return [f"{said('participation')} with privacy=client: {reason}"]
    reasons = []
    if expected < 1:
        reasons.append(
            f"{said('participation')} with num_clients={experiment.num_clients} and privacy=client:"
            f" {expected:.3g} clients are expected in a round, less than one, so that most rounds"
            " are noise alone; raise participation.rate or num_clients"
        )
    if amplification(participation) is not None:
        if privacy.rounds is not None:
            reasons.append(
                f"privacy.rounds={privacy.rounds} with {said('participation')}: its rate is what"
                " keeps a client's cost low, and every client is charged for every round; set"
                " privacy.rounds=null"
            )
        if getattr(experiment.attack, "honest_majority", False):
            reasons.append(
                f"attack.honest_majority=true with {said('participation')} and privacy=client:"
                " cohorts that are drawn again are no longer coins of every client; set"
                " attack.honest_majority=false"
            )
    return reasons + _count(privacy, expected)


def _count(privacy: Any, expected: float) -> list[str]:
    try:
        privacy.split(privacy.noise_multiplier or 0.0, expected)
    except ValueError as reason:
        return [str(reason)]
    return []


def _delta(experiment: "Experiment") -> list[str]:
    delta, clients = experiment.privacy.delta, experiment.num_clients
    try:
        if delta is not None and clients:
            check_delta(delta, clients)
    except ValueError as reason:
        return [f"privacy.{reason}; set privacy.delta=null for 1 / (2 num_clients)"]
    return []


def _canaries(experiment: "Experiment") -> list[str]:
    canaries = experiment.privacy.canaries
    if canaries is None or experiment.checkpoint is None or experiment.checkpoint.every:
        return []
    return [f"privacy.canaries={canaries} with checkpoint.every=0: {NEEDS_CHECKPOINT}"]


def _is(part: Any, *names: str) -> bool:
    return any(base.__name__ in names for base in type(part).__mro__)


def _owner(part: Any, method: str) -> str:
    """Return the name of the class that ``part`` has ``method`` from."""
    return next(base.__name__ for base in type(part).__mro__ if method in vars(base))
