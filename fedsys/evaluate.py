"""Loss and accuracy of a global model on given rows."""

import torch
from torch import Tensor

from fedsys.cohort import CohortModel
from fedsys.data.examples import Examples
from fedsys.losses import row_hits, row_losses, row_targets


@torch.no_grad()
def evaluate(
    model: CohortModel,
    params: Tensor,
    examples: Examples,
    rows: Tensor,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Return ``eval_loss`` and ``eval_accuracy`` over all targets of ``rows``.

    ``params`` (size,) is the model's flat vector; for language modelling a target is a token.
    Where targets are vectors there is no accuracy.
    """
    regression = examples.labels is not None and examples.labels.is_floating_point()
    lengths = examples.lengths(rows)
    if lengths is not None:  # neighbours of one length need little padding
        rows = rows[lengths.argsort(stable=True)]
    model.bind(model.layout.unpack(params[None].to(device)))
    model.remember(examples, rows)
    loss = hits = targets = 0.0
    for part in rows.split(batch_size) if len(rows) else ():
        batch = examples.batch(part) | model.states(examples, part)
        batch = {n: v.to(device) for n, v in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch)
        loss += row_losses(logits, labels).double().sum().item()
        targets += row_targets(labels).sum().item()
        if not regression:
            hits += row_hits(logits, labels).sum().item()
    found = {"eval_loss": loss / max(targets, 1.0)}
    return found if regression else found | {"eval_accuracy": hits / max(targets, 1.0)}
