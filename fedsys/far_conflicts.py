"""What cannot be where clients are in other processes, or hold rows that only they know."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsys.config import Experiment

_ON_DEVICES = "partition=on_devices"


def far_conflicts(experiment: "Experiment") -> list[str]:
    """Return the reasons why this combination is refused; a part that is None has no say."""
    reasons = []
    engine, privacy = type(experiment.engine).__name__, experiment.privacy
    if engine not in ("Local", "NoneType") and getattr(privacy, "canaries", None):
        reasons.append(
            f"privacy.canaries={privacy.canaries} with clients in other processes: canaries are"
            " planted among rows that the server holds; audit with engine=local"
        )
    if type(experiment.partition).__name__ == "OnDevices":
        reasons += _on_devices(experiment, engine)
    return reasons


def _on_devices(experiment: "Experiment", engine: str) -> list[str]:
    reasons = []
    data, privacy = experiment.data, experiment.privacy
    if engine not in ("Deployment", "NoneType"):
        reasons.append(f"{_ON_DEVICES} needs engine=deployment: simulated clients have no device")
    if data is not None and type(data).__name__ != "Text":
        reasons.append(f"{_ON_DEVICES} needs data=text: other data cannot name their classes yet")
    elif getattr(data, "label", None) and data.classes is None:
        reasons.append(
            f"{_ON_DEVICES} needs data.classes, the labels in order, such as [no,yes]: a device may"
            " not hold rows of each"
        )
    if getattr(privacy, "unit", "") == "record" and privacy.delta is None:
        reasons.append(
            f"{_ON_DEVICES} with privacy=sample needs privacy.delta: how many rows a device holds"
            " is not known here; take less than 1 over the most"
        )
    if getattr(experiment.participation, "alpha", None) is not None:
        reasons.append(
            f"{_ON_DEVICES} with participation.alpha: it ties rates"
            " to labels that the server does not know; set it to null"
        )
    return reasons
