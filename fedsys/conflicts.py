"""What composes in code but not in mathematics, each refused with its reason.

Classes are told by their names, so that this module imports none of them and a user's subclass is
treated as what it derives from.
"""

from typing import TYPE_CHECKING, Any

from fedsys.compose import TARGET, option

if TYPE_CHECKING:
    from fedsys.config import Experiment

# A strategy whose aggregation is right for one adapter only: its option, its class, and why.
_NEEDS_ADAPTER = {
    "FedSB": ("lora_sb", "LoRASB", "it averages R between factors B and A that all clients share"),
    "FedIT": ("lora", "LoRA", "it averages the factors B and A of LoRA"),
    "FFALoRA": ("ffa", "FFA", "it averages B beside an A that is frozen and shared"),
}
_ADAPTERS = ("Full", "LoRA", "FFA", "LoRASB", "LoRAXS")
_ARRAY_MODELS = ("MLP", "CNN", "ViT")
_TEXT_MODELS = ("HFClassifier", "HFCausal")


def conflicts(experiment: "Experiment") -> list[str]:
    """Return the reasons why this combination is refused; a part that is None has no say."""
    return [*_adapters(experiment), *_data(experiment), *_numbers(experiment)]


def _is(part: Any, *names: str) -> bool:
    return any(base.__name__ in names for base in type(part).__mro__)


def _adapter(adapter: Any) -> str | None:
    """Return the nearest adapter of ours that this one is; FFA, for one, is a kind of LoRA."""
    names = [base.__name__ for base in type(adapter).__mro__]
    return next((name for name in names if name in _ADAPTERS), None)


def _said(experiment: "Experiment", group: str) -> str:
    target = experiment.resolved[group][TARGET]
    return f"{group}={option(group, target) or target}"


def _adapters(experiment: "Experiment") -> list[str]:
    reasons = []
    adapter = experiment.adapter
    for strategy, (wanted, needed, why) in _NEEDS_ADAPTER.items():
        if _is(experiment.strategy, strategy) and _adapter(adapter) not in (needed, None):
            pair = f"{_said(experiment, 'strategy')} with {_said(experiment, 'adapter')}"
            reasons.append(f"{pair}: {why}; it needs adapter={wanted}")
    first = getattr(adapter, "init", "seeded_random")
    if first != "seeded_random" and experiment.strategy and not _is(experiment.strategy, "FedSB"):
        reasons.append(
            f"{_said(experiment, 'strategy')} with adapter.init={first}: only strategy=fed_sb runs"
            " the phase that takes B and A from the first gradient; set adapter.init=seeded_random"
        )
    if first == "public" and not _public(experiment.data):
        reasons.append(
            "adapter.init=public needs data.public_fraction above 0: the first step is estimated"
            " from rows that no client owns"
        )
    if _is(adapter, "Full") and experiment.dtype == "bfloat16":
        reasons.append(
            "dtype=bfloat16 is for the frozen base beside an adapter; with adapter=full the trained"
            " weights would be bfloat16, in which small updates are lost"
        )
    return reasons


def _public(data: Any) -> bool:
    return data is None or getattr(data, "public_fraction", 1.0) > 0


def _data(experiment: "Experiment") -> list[str]:
    data, model = experiment.data, experiment.model
    text = _is(data, "TextColumns", "RandomTokens")
    pair = f"{_said(experiment, 'data')} with {_said(experiment, 'model')}"
    if text and _is(model, *_ARRAY_MODELS):
        return [f"{pair}: text needs model=hf_classifier or model=hf_causal"]
    if _is(data, "Digits", "Images") and _is(model, *_TEXT_MODELS):
        return [f"{pair}: images need model=mlp, model=cnn or model=vit"]
    if _is(data, "TextColumns") and _is(model, "HFCausal") and data.label is not None:
        return [
            f"data.label={data.label} with model=hf_causal: a causal model continues text;"
            " set data.label=null, or model=hf_classifier to predict the label"
        ]
    if _is(data, "TextColumns") and _is(model, "HFClassifier") and data.label is None:
        return ["model=hf_classifier needs data.label, the column with the classes"]
    return []


def _numbers(experiment: "Experiment") -> list[str]:
    cohort = getattr(experiment.participation, "cohort", None)
    clients = experiment.num_clients
    if cohort is not None and clients is not None and cohort > clients:
        return [f"participation.cohort={cohort}: must be at most num_clients={clients}"]
    return []
