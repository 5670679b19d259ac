"""The audit of a run that is over: what an attack finds, beside the epsilon that is claimed.

With privacy=sample the canaries are rows, and the attack is on what clients sent, round by round;
it proves a lower bound. With privacy=client they are clients, and the attack is on the last model
alone; it gives an estimate.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedsys.errors import ConfigError, RunError
from fedsys.experiment import restored, saved_experiment
from fedsys.federation import Federation
from fedsys.json_lines import JsonLines, strict, write_whole
from fedsys.params import subtract
from fedsys.privacy.account import ClientAccount
from fedsys.privacy.audit import Audit, Guess, audit, estimate
from fedsys.privacy.observed import Observed
from fedsys.privacy.scores import scores
from fedsys.rounds import Ask
from fedsys.snapshot import Snapshot

_REFERENCE = 300  # held-out rows, from which the attack learns what all rows have in common


def audit_run(folder: Path, phase: Callable[[str], None] = lambda _: None) -> Audit:
    """Attack the run in ``folder``, and write what comes of it to audit.json and summary.json.

    Raises ``ConfigError`` for a run without canaries, ``RunError`` for one that has not ended.
    """
    experiment = saved_experiment(folder)
    if getattr(experiment.privacy, "canaries", None) is None:
        raise ConfigError(
            [f"{folder}: was trained without canaries; begin a run with privacy.canaries=200"]
        )
    summary = _completed(folder)
    federation, snapshot = restored(experiment, phase)
    phase("looking for the canaries")
    attack = _on_rows if federation.planted is not None else _on_clients
    found = attack(federation, snapshot, float(summary["epsilon"]), float(summary["delta"]))
    said = asdict(found)
    write_whole(folder / "audit.json", strict(said, indent=2) + "\n")
    write_whole(folder / "summary.json", strict({**summary, "audit": said}, indent=2) + "\n")
    return found


def rows(found: Audit) -> list[tuple[str, str]]:
    """Return the result as rows of a table."""
    table = [
        ("claimed", f"epsilon {found.claimed:.4g} at delta {found.delta:.3g}"),
        ("measured", f"epsilon {found.measured:.4g}"),
    ]
    if found.confidence is None:
        over = found.measured > found.claimed
        verdict = "above the claim, which an estimate cannot refute" if over else "as claimed"
        return [
            *table,
            ("method", f"{found.method}: no bound"),
            ("canaries", f"{found.canaries} clients that took part"),
            ("result", verdict),
        ]
    return [
        *table,
        ("method", f"{found.method}, with {found.confidence:.0%} confidence"),
        ("canaries", f"{found.canaries} rows"),
        ("guesses", f"{found.guesses}, of which {found.correct} right"),
        ("result", "the claim is refuted" if found.contradicts else "the claim is not refuted"),
    ]


def _completed(folder: Path) -> dict[str, Any]:
    """Return summary.json of a run that has ended."""
    path = folder / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("status") != "completed":
        raise RunError(f"{folder} has not ended; first `fedsys resume {folder}`")
    return dict(found)


def _on_rows(federation: Federation, _: Snapshot, epsilon: float, delta: float) -> Audit:
    """Return the one-run bound: each canary's share in what its owner sent."""
    experiment, planted = federation.experiment, federation.planted
    if planted is None:
        raise RuntimeError("nothing was planted")
    held_out = federation.dataset.evaluation
    reference = held_out.subset(torch.arange(min(_REFERENCE, len(held_out))))
    lines = JsonLines(experiment.out / "participation.jsonl").read()
    observed = Observed(experiment.out / "audit", federation.model.layout)
    seen = observed.read({line["round"]: line["clients"] for line in lines})
    found = scores(
        federation.model,
        planted,
        reference,
        (replace(each, start=each.start.to(federation.device)) for each in seen),
        experiment.privacy.clipping_norm,
    )
    # As many guesses as were planned: counts chosen by how well they do would prove nothing.
    return audit(found, planted.coins, Guess.quarters(len(found)), epsilon, delta)


def _on_clients(federation: Federation, last: Snapshot, epsilon: float, delta: float) -> Audit:
    """Return the one-shot estimate: how far the model went each canary's way."""
    account = federation.strategy.account
    if not isinstance(account, ClientAccount) or account.canaries is None:
        raise RuntimeError("no client was planted")
    first, _ = federation.strategy.prepare(federation.first_snapshot().params, _nobody())
    try:
        cosines = account.canaries.cosines(subtract(last.params, first), last.round)
        return estimate(cosines, federation.model.layout.size, epsilon, delta)
    except ValueError as error:
        raise RunError(f"{federation.experiment.out} cannot be audited: {error}") from error


def _nobody() -> Ask:
    """Return what asks no client: where clients are protected, none is needed for x_0."""

    def ask(action: str, shapes: Any) -> Any:
        raise RuntimeError(f"x_0 took {action} of the clients")

    return ask
