"""What would leave a device: ``fedsys join FOLDER --dry-run``."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from fedsys.deployment.device import Device
from fedsys.deployment.policy import Policy, level_of
from fedsys.errors import LedgerError
from fedsys.privacy.accounting import epsilon
from fedsys.privacy.ledger import Totals, read
from fedsys.schema import show

LAST_RUN = "last_run.json"  # in state/: what the node let in last
_DELTA = 1e-5  # where the policy names none

_NEVER = (
    "rows and their labels",
    "the base model, the privacy ledger, device.key, logs",
    "anything in answer to code, settings or messages that the policy does not allow",
)


def disclosure(device: Device, policy: Policy) -> str:
    """Return in words what the policy lets leave ``device``; no network is touched."""
    return "\n".join(_lines(device, policy)) + "\n"


def _lines(device: Device, policy: Policy) -> Iterator[str]:
    said, last = device.settings, _last(device)
    secured = "by TLS, with a key of its own" if device.secure else "in the clear, on this machine"
    yield f"device {said.name}, number {said.number}; server {said.server}, {secured}"
    yield f"rows: {device.data or 'its part of the data that the run names'}"
    yield ""
    yield "what leaves, in messages that this device asks the server for:"
    yield "  query     its number"
    yield from _of_training(policy, last)
    metrics = "loss and accuracy on its rows, and how many there are"
    yield f"  evaluate  {metrics if policy.evaluate else 'nothing: not allowed'}"
    yield f"  errors    {_of_errors(policy)}"
    yield "what never leaves:"
    yield from (f"  {line}" for line in _NEVER)
    yield ""
    yield f"the policy, {device.policy}:"
    yield from (f"  {f.name}: {show(getattr(policy, f.name))}" for f in fields(policy))
    if not policy.code:
        yield "  so no code may run: `fedsys serve` names the hash of what it submits"
    yield from _of_last(policy, last)
    yield ""
    yield from _of_ledger(device, policy)


def _of_training(policy: Policy, last: Mapping[str, Any] | None) -> Iterator[str]:
    yield f"  train     the trained tensors, in all at most {policy.max_bytes} bytes:"
    shapes = None if last is None else _trainable(last["settings"])
    if shapes is None:
        yield "              which they are is known when a run has named its model"
    for name, (shape, size) in (shapes or {}).items():
        yield f"              {name} {'x'.join(map(str, shape)) or 'scalar'}, {size} bytes"
    if policy.privacy == "none":
        yield "            the number of rows, and the mean loss on them"
    elif policy.privacy == "client":
        yield "            the number of rows, and the mean loss where the server adds the noise"
    else:
        yield "            with noise for each row, the number of rows, what was spent in all"


def _of_errors(policy: Policy) -> str:
    if policy.privacy == "none":
        return "the reason, 200 characters of it"
    return "that it failed; a reason only where it tells nothing of the rows"


def _of_last(policy: Policy, last: Mapping[str, Any] | None) -> Iterator[str]:
    if last is None:
        yield "no run was taken part in yet"
        return
    reasons = policy.of_run(last["code"], last["settings"], last["bundled"])
    verdict = "it may go on" if not reasons else f"now refused: {'; '.join(reasons)}"
    yield f"the last run, {last['run']}, of privacy {level_of(last['settings'])}: {verdict}"


def _of_ledger(device: Device, policy: Policy) -> Iterator[str]:
    if not device.ledger.exists():
        yield "spent so far: nothing"
        return
    try:
        entries = read(device.ledger)
    except LedgerError as error:
        yield f"spent so far: {error}"
        return
    totals = Totals()
    for entry in entries:
        totals.add(entry.client, entry.release)
    delta = policy.max_delta or _DELTA
    yield f"spent so far, in {len(entries)} releases, at delta {delta:g}:"
    for client in sorted(totals.clients):
        figure = epsilon(totals.spent(client), delta)
        shown = "without limit" if math.isinf(figure) else f"{figure:.3f}"
        of = "" if policy.max_epsilon is None else f" of {policy.max_epsilon:g}"
        yield f"  {client}: epsilon {shown}{of}"


def _last(device: Device) -> dict[str, Any] | None:
    """Return the last run that was let in; None if there was none."""
    try:
        last = json.loads((device.state / LAST_RUN).read_text(encoding="utf-8"))
        if all(isinstance(last[name], kind) for name, kind in _LAST.items()):
            return dict(last)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


_LAST = {"run": str, "code": str, "settings": dict, "bundled": list}


def _trainable(settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], int]] | None:
    """Return shape and bytes of the tensors that a run trains; None where they cannot be told."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported now: whoever only joins does without.
    from fedsys.config import build
    from fedsys.federation import assemble

    try:
        model = assemble(build(settings)).site.model
    except Exception:  # of data that are not here, or a model; it is not worth failing for
        return None
    layout = model.layout
    return {
        name: (tuple(shape), shape.numel() * layout.dtype.itemsize)
        for name, shape in layout.shapes.items()
    }
