"""What composes in code but not in mathematics, each refused with its reason.

Classes are told by their names, so that this module imports none of them and a user's subclass is
treated as what it derives from.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from fedsys.compose import TARGET, option
from fedsys.far_conflicts import far_conflicts

if TYPE_CHECKING:
    from fedsys.config import Experiment

# A strategy whose aggregation is right for one adapter only: its option, its class, and why.
_NEEDS_ADAPTER = {
    "FedSB": ("lora_sb", "LoRASB", "it averages R between factors B and A that all clients share"),
    "FedIT": ("lora", "LoRA", "it averages the factors B and A of LoRA"),
    "FFALoRA": ("ffa", "FFA", "it averages B beside an A that is frozen and shared"),
    "FedExLoRA": ("lora", "LoRA", "it averages the factors B and A of LoRA"),
    "FLoRA": ("lora", "LoRA", "it stacks the factors B and A of LoRA"),
    "FRL": ("supermask", "Supermask", "it votes on rankings of frozen random weights"),
}
_ADAPTERS = ("Full", "LoRA", "FFA", "LoRASB", "LoRAXS", "Supermask")
_MOVES_BASE = ("FedExLoRA", "FLoRA")
_KEEPS_H = ("ef21", "ef21m", "econtrol")
_OWN_WEIGHTS = ("FedAU", "AverageAll", "KnownProbability", "MIFA", "FedVARP")
_ARRAY_MODELS = ("MLP", "CNN", "CNNFedAU", "ViT")
_TEXT_MODELS = ("HFClassifier", "HFCausal")
_QUADRATIC = ("Quadratic", "LeastSquares")  # rows that belong to clients, with vectors to hit


def conflicts(experiment: "Experiment") -> list[str]:
    """Return the reasons why this combination is refused; a part that is None has no say."""
    return [
        *_adapters(experiment),
        *_compression(experiment),
        *_robustness(experiment),
        *_privacy(experiment),
        *_secagg(experiment),
        *_data(experiment),
        *_numbers(experiment),
        *far_conflicts(experiment),
    ]


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
    strategy, adapter = experiment.strategy, experiment.adapter
    for name, (wanted, needed, why) in _NEEDS_ADAPTER.items():
        if _is(strategy, name) and _adapter(adapter) not in (needed, None):
            pair = f"{_said(experiment, 'strategy')} with {_said(experiment, 'adapter')}"
            reasons.append(f"{pair}: {why}; it needs adapter={wanted}")
    first = getattr(adapter, "init", "seeded_random")
    if first != "seeded_random" and experiment.strategy and not _is(experiment.strategy, "FedSB"):
        reasons.append(
            f"{_said(experiment, 'strategy')} with adapter.init={first}: only strategy=fed_sb runs"
            " the phase that takes B and A from the first gradient; set adapter.init=seeded_random"
        )
    protected = str(experiment.resolved["privacy"].get(TARGET)).endswith("SamplePrivacy")
    if first == "private" and not protected:
        reasons.append("adapter.init=private needs privacy=sample, whose noise protects it")
    if first == "public" and not _public(experiment.data):
        reasons.append(
            "adapter.init=public needs data.public_fraction above 0: the first step is estimated"
            " from rows that no client owns"
        )
    if _adapter(adapter) == "Supermask" and experiment.strategy and not _is(strategy, "FRL"):
        reasons.append(
            f"{_said(experiment, 'strategy')} with adapter=supermask: the mean of scores is no"
            " ranking; it needs strategy=frl"
        )
    if _is(strategy, *_MOVES_BASE) and experiment.dtype == "bfloat16":
        reasons.append(
            f"{_said(experiment, 'strategy')} with dtype=bfloat16: the base moves by less than"
            " bfloat16 can hold; set dtype=float32"
        )
    if _is(adapter, "Full") and experiment.dtype == "bfloat16":
        reasons.append(
            "dtype=bfloat16 is for the frozen base beside an adapter; with adapter=full the trained"
            " weights would be bfloat16, in which small updates are lost"
        )
    return reasons


def _compression(experiment: "Experiment") -> list[str]:
    compression, strategy = experiment.compression, experiment.strategy
    if compression is None:
        if _is(strategy, "EControl"):
            return ["strategy=econtrol needs a compression with compression.feedback=econtrol"]
        return []
    pair = f"{_said(experiment, 'strategy')} with {_said(experiment, 'compression')}"
    if _is(strategy, "FRL"):
        return [f"{pair}: rankings are packed already, and floats would undo what they protect"]
    if _is(strategy, "FLoRA"):
        return [f"{pair}: factors that begin afresh each round have no change to compress"]
    feedback = getattr(compression, "feedback", "none")
    if _is(strategy, "EControl") and feedback != "econtrol":
        return [f"{pair}: it needs compression.feedback=econtrol, got {feedback}"]
    if feedback not in _KEEPS_H:
        return []
    why = "the server's h is the mean over all clients with fixed, equal weights"
    pair = f"{_said(experiment, 'strategy')} with compression.feedback={feedback}"
    if _is(strategy, "FedExLoRA"):
        why = "the mean of all h_n stands in for the updates that the residual is of"
    if _is(strategy, "FedExLoRA", *_OWN_WEIGHTS):
        return [f"{pair}: {why}; compression.feedback=ec composes"]
    reasons = []
    if getattr(strategy, "weighting", "uniform") != "uniform":
        reasons.append(f"{pair}: {why}; set strategy.weighting=uniform")
    if experiment.defence is not None:
        other = f"{_said(experiment, 'defence')} with compression.feedback={feedback}"
        reasons.append(f"{other}: what the defence changes or leaves out, the clients' h_n keep")
    return reasons


def _robustness(experiment: "Experiment") -> list[str]:
    strategy, attack, defence = experiment.strategy, experiment.attack, experiment.defence
    reasons = []
    votes = _is(strategy, "FRL")
    if attack is not None and strategy is not None:
        pair = f"{_said(experiment, 'strategy')} with {_said(experiment, 'attack')}"
        if votes and not (_is(attack, "ReverseRank") or attack.flips_labels):
            reasons.append(f"{pair}: clients send rankings; attack=reverse_rank or label_flip")
        if not votes and _is(attack, "ReverseRank"):
            reasons.append(f"{pair}: it reverses rankings, which only strategy=frl has")
        if _is(strategy, "FLoRA") and not attack.flips_labels:
            reasons.append(f"{pair}: clients send factors, not a change; use attack=label_flip")
        if attack.flips_labels and _is(experiment.model, "HFCausal"):
            reasons.append(f"{_said(experiment, 'attack')} with model=hf_causal: no labels to flip")
        if attack.flips_labels and _is(experiment.data, *_QUADRATIC):
            pair = f"{_said(experiment, 'attack')} with {_said(experiment, 'data')}"
            reasons.append(f"{pair}: its labels are vectors to hit, not classes to flip")
    if defence is not None and strategy is not None:
        pair = f"{_said(experiment, 'strategy')} with {_said(experiment, 'defence')}"
        if votes:
            reasons.append(f"{pair}: a ranking bounds each vote already, and has no mean")
        elif _is(strategy, "FedExLoRA") and _is(defence, "Median", "TrimmedMean"):
            reasons.append(f"{pair}: it leaves one update, of which there is no residual")
        elif _is(strategy, "FLoRA"):
            reasons.append(f"{pair}: factors of different clients cannot be compared by entry")
        elif _is(strategy, *_OWN_WEIGHTS) and not _is(defence, "NormClip"):
            reasons.append(
                f"{pair}: it weighs each client by itself, which needs every update;"
                " defence=norm_clip composes"
            )
    return reasons


def _privacy(experiment: "Experiment") -> list[str]:
    reasons = []
    unprotected = getattr(experiment.privacy, "allow_unprotected_initialisation", False)
    pretrained = getattr(experiment.model, "pretrained", False)
    private = getattr(experiment.data, "source_is_private", False)
    if experiment.privacy is not None and pretrained and private and not unprotected:
        reasons.append(
            f"{_said(experiment, 'privacy')} with model.pretrained=true: the base would be trained"
            " on the clients' own rows before they are protected; set data.public_fraction=0.2,"
            " whose rows are nobody's, or model.pretrained=false"
        )
    if experiment.privacy and getattr(experiment.data, "normalises_by_clients", False):
        reasons.append(
            f"{_said(experiment, 'privacy')} with {_said(experiment, 'data')}: mean and deviation"
            " of all rows would reach every client without noise; set data.public_fraction=0.1,"
            " by whose rows they are taken then"
        )
    if _is(experiment.privacy, "ClientPrivacy"):
        from fedsys.privacy import client_conflicts

        return reasons + client_conflicts.refusals(experiment, partial(_said, experiment))
    if _is(experiment.privacy, "SamplePrivacy"):
        from fedsys.privacy import sample_conflicts

        return reasons + sample_conflicts.refusals(experiment)
    return reasons


def _secagg(experiment: "Experiment") -> list[str]:
    if experiment.secagg is None:
        return []
    from fedsys.secagg import conflicts as secagg_conflicts

    return secagg_conflicts.refusals(experiment, partial(_said, experiment))


def _public(data: Any) -> bool:
    return data is None or getattr(data, "public_fraction", 1.0) > 0


def _data(experiment: "Experiment") -> list[str]:
    data, model = experiment.data, experiment.model
    text = _is(data, "TextColumns", "RandomTokens")
    pair = f"{_said(experiment, 'data')} with {_said(experiment, 'model')}"
    if _is(data, *_QUADRATIC) and model is not None and not _is(model, "Point"):
        return [f"{pair}: a quadratic problem needs model=point"]
    if _is(model, "Point") and (text or _is(data, "Digits", "Images")):
        return [f"{pair}: a point needs data=quadratic or data=least_squares"]
    if text and _is(model, *_ARRAY_MODELS):
        return [f"{pair}: text needs model=hf_classifier or model=hf_causal"]
    if _is(data, "Digits", "Images") and _is(model, *_TEXT_MODELS):
        return [f"{pair}: images need model=mlp, model=cnn, model=cnn_fedau or model=vit"]
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
    data, partition = experiment.data, experiment.partition
    if _is(data, *_QUADRATIC) and clients is not None and data.clients != clients:
        return [f"num_clients={clients}: the rows of data are those of {data.clients} clients"]
    if _is(data, *_QUADRATIC) and partition and not _is(partition, "Contiguous", "Natural"):
        return [
            f"{_said(experiment, 'data')} with {_said(experiment, 'partition')}: rows belong to"
            " clients; set partition=contiguous"
        ]
    if cohort is not None and clients is not None and cohort > clients:
        return [f"participation.cohort={cohort}: must be at most num_clients={clients}"]
    return []
