"""What privacy=sample cannot be combined with, each refused with its reason."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsys.config import Experiment

_FACTORS = "the frozen base moves from round to round, and the audit has it as it was at the end"
_NO_AUDIT = {  # strategies whose updates are no sums of gradients at one model
    "FRL": "strategy=frl: clients send rankings, and no sum that a row could have a share in",
    "FedExLoRA": f"strategy=fedex_lora: {_FACTORS}",
    "FLoRA": f"strategy=flora: {_FACTORS}",
}
_VECTORS = {"Quadratic": "quadratic", "LeastSquares": "least_squares"}
NEEDS_CHECKPOINT = "the audit starts from the last checkpoint; set checkpoint.every=1"


def refusals(experiment: "Experiment") -> list[str]:
    """Return the reasons why ``experiment``, in which privacy=sample, is refused.

    A part that is None has no say.
    """
    training, privacy = experiment.client, experiment.privacy
    reasons = []
    if getattr(training, "order", "shuffled") == "stream":
        reasons.append(
            "privacy=sample with client.order=stream: the epsilon is that of Poisson lots; set"
            " client.order=shuffled"
        )
    if getattr(training, "group_by_length", False):
        reasons.append(
            "privacy=sample with client.group_by_length=true: the epsilon is that of Poisson lots,"
            " whose rows do not depend on each other"
        )
    if experiment.evaluate is not None and experiment.evaluate.clients:
        reasons.append(
            "privacy=sample with evaluate.clients=true: a client's metrics on its own rows would"
            " leave it without noise; epsilon would say nothing of them"
        )
    if (alpha := getattr(experiment.participation, "alpha", None)) is not None:
        reasons.append(
            f"privacy=sample with participation.alpha={alpha}: how often a client takes part would"
            " follow from its labels, without noise; set participation.alpha=null"
        )
    if _class(experiment.partition, {"Bootstrap": "bootstrap"}):
        reasons.append(
            "privacy=sample with partition=bootstrap: a record is drawn by several clients, and by"
            " one several times; epsilon is of records that are counted once. Use another partition"
        )
    init = getattr(experiment.adapter, "init", "")
    if init == "client_sum" and not privacy.allow_unprotected_initialisation:
        reasons.append(
            "privacy=sample with adapter.init=client_sum: clients would send sums of gradients"
            " without noise. Set adapter.init=private (noised, charged to epsilon),"
            " adapter.init=public (data.public_fraction above 0) or adapter.init=seeded_random; the"
            " paper's way, which epsilon then excludes, is"
            " privacy.allow_unprotected_initialisation=true"
        )
    return reasons + (_canaries(experiment) if privacy.canaries is not None else [])


def _canaries(experiment: "Experiment") -> list[str]:
    """Return why the audit could not say what it has measured."""
    asked = f"privacy.canaries={experiment.privacy.canaries}"
    strategy, data = _class(experiment.strategy, _NO_AUDIT), _class(experiment.data, _VECTORS)
    reasons = []
    if strategy:
        reasons.append(f"{asked} with {_NO_AUDIT[strategy]}; set strategy=fed_sb")
    if data:
        reasons.append(
            f"{asked} with data={_VECTORS[data]}: its rows have vectors to hit, and a canary has"
            " a wrong class; use data with classes, or text"
        )
    if experiment.attack is not None:
        reasons.append(
            f"{asked} with an attack: epsilon is a promise about what honest clients send, and the"
            " audit would measure what malicious ones make of it; set attack=none"
        )
    if experiment.secagg is not None:
        reasons.append(
            f"{asked} with secagg=true: the audit reads what each client sends, which no server"
            " then sees; set secagg=none"
        )
    if experiment.checkpoint is not None and not experiment.checkpoint.every:
        reasons.append(f"{asked} with checkpoint.every=0: {NEEDS_CHECKPOINT}")
    return reasons


def _class(part: object, names: dict[str, str]) -> str:
    """Return which of the classes ``names`` the part is, "" for none."""
    return next((base.__name__ for base in type(part).__mro__ if base.__name__ in names), "")
