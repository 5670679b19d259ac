"""Local training of K >= 1 clients together; K = 1 is the same code.

    g_k = dF_k/dw_k + local_gradient(w_k, x_t),     w_k <- optimizer(w_k, g_k)       k = 1..K

Every client's tensors are one row of a matrix (K, size), so one optimizer over the matrix, being
element-wise, is K optimizers. Clients are ordered by their number of local steps: those still
training are the first rows, and a client that has finished is out of reach of momentum and Adam.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.descent import Descent
from clients.passes import Passes, by_column, by_row, gather
from clients.private import Private, private_gradients
from clients.training import LocalTraining
from fedsys.attacks import flip_labels
from fedsys.cohort import CohortModel, row_gradients
from fedsys.data.examples import Batch, Examples
from fedsys.losses import client_losses, client_targets, row_targets
from fedsys.params import Params

LocalGradient = Callable[[Params, Params], Params]  # (w, x_t) -> what is added to the gradient


@dataclass(frozen=True)
class Task:
    """What a cohort trains on in one round."""

    model: CohortModel
    examples: Examples
    training: LocalTraining
    local_gradient: LocalGradient
    device: torch.device
    flipped: Tensor | None = None  # (K,) bool: who trains on label C - 1 - y in place of y
    num_classes: int = 0  # C
    private: tuple[Private, ...] = ()  # one a client, where rows are protected

    def first(self, clients: list[int]) -> "Task":
        """Return the task of ``clients`` of this one's, in that order."""
        return replace(
            self,
            flipped=None if self.flipped is None else self.flipped[clients],
            private=tuple(self.private[k] for k in clients) if self.private else (),
        )


def train_cohort(
    task: Task, start: Tensor, batches: list[Tensor], lr: float
) -> tuple[Tensor, Tensor]:
    """Train K clients from ``start`` and return x_n (K, size) and mean losses (K,).

    ``start`` is x_t (size,), or (K, size) where every client has its own. ``batches`` holds each
    client's row numbers (steps_k, size_k), -1 for no row. Where rows are protected, no loss is
    known: the losses are NaN.
    """
    taken = [plan.shape[0] for plan in batches]  # len(plan) takes microseconds
    order = sorted(range(len(batches)), key=lambda k: -taken[k])
    start = start[order] if start.dim() == 2 else start
    task = task.first(order)
    plan = _padded([batches[k] for k in order])
    steps = torch.tensor([taken[k] for k in order])
    trained = start.expand(len(order), -1).clone()
    losses = torch.zeros(len(order))
    active = len(order)
    flat, leaves, optimizer = _begin(task, trained, lr, None)
    if task.model.prefix is not None:
        task.model.remember(task.examples, plan[plan >= 0])
    for step in range(plan.shape[1]):
        if (still := int((steps > step).sum())) < active:
            active = still
            flat, leaves, optimizer = _begin(task, trained[:active], lr, optimizer)
        gradients = _private_gradients if task.private else _gradients
        losses[:active] += gradients(task, flat, leaves, plan[:active, step])
        origin = start[:active] if start.dim() == 2 else start
        _step(task, optimizer, flat, leaves, origin, steps[:active], step)
    losses /= steps
    if order == sorted(order):
        return trained, losses
    back = torch.tensor(order).argsort()
    return trained.index_select(0, back.to(trained.device)), losses[back]


def _padded(batches: list[Tensor]) -> Tensor:
    """Return the clients' plans (steps_k, size_k) as one (K, steps, size), filled up with -1."""
    steps, size = (max(part.shape[dim] for part in batches) for dim in (0, 1))
    if all(part.shape == (steps, size) for part in batches):
        return torch.stack(batches)
    parts = [F.pad(p, (0, size - p.shape[1], 0, steps - len(p)), value=-1) for p in batches]
    return torch.stack(parts)


def _gradients(task: Task, flat: nn.Parameter, leaves: Params, rows: Tensor) -> Tensor:
    """Write the gradients of the losses on ``rows`` (K, B), and return the losses (K,)."""
    model, together = task.model, by_column(task.examples, rows, task.device)
    # Sums by row are not reproducible on other devices, and alone there is nothing to gain.
    if together.cost is not None and len(rows) > 1 and task.device.type == "cpu":
        alone = by_row(task.examples, rows, task.device, model.layout.size)
        copies = model.copying * int((rows >= 0).sum())
        if alone.cost is not None and alone.cost + copies < together.cost:
            return _gradients_by_row(task, flat, alone)
    if flat.grad is None:
        flat.grad = torch.empty_like(flat)
    model.bind(leaves)
    clients = torch.arange(len(rows))[:, None]
    batches = [
        _batch(task, part, clients.expand(part.shape), absent) for part, absent in together.parts
    ]
    # A client's mean is over the targets of all passes.
    targets = torch.stack([client_targets(b["labels"], len(rows)) for b in batches]).sum(0)
    losses = torch.zeros(len(rows), device=task.device)
    written, tensors = list(model.layout.unpack(flat.grad).values()), list(leaves.values())
    for number, batch in enumerate(batches):
        labels = batch.pop("labels")
        parts = client_losses(model(**batch), labels, targets)
        gradients = torch.autograd.grad(parts.sum(), tensors, materialize_grads=True)
        if number == 0:
            torch._foreach_copy_(written, gradients)
        else:
            torch._foreach_add_(written, gradients)
        losses += parts.detach()
    return losses.cpu()


def _gradients_by_row(task: Task, flat: nn.Parameter, passes: Passes) -> Tensor:
    """Do what ``_gradients`` does where each row has a copy of its client's tensors."""
    batches = [(_batch(task, part, owner), owner) for part, owner in passes.parts]
    targets = torch.zeros(len(flat), dtype=torch.int64)
    for batch, owner in batches:
        targets.index_add_(0, owner, row_targets(batch["labels"]))
    losses = torch.zeros(len(flat))
    gradient = flat.grad = torch.zeros_like(flat)
    unpacked = task.model.layout.unpack(gradient).values()
    written = [part.reshape(len(part), -1) for part in unpacked]
    for batch, owner in batches:
        labels = batch.pop("labels")
        copies = flat.detach()[owner]
        parts, gradients = row_gradients(task.model, copies, batch, labels, targets[owner])
        for whole, part in zip(written, gradients, strict=True):
            whole.index_add_(0, owner, part)
        losses.index_add_(0, owner, parts.float())
    return losses


def _private_gradients(task: Task, flat: nn.Parameter, leaves: Params, rows: Tensor) -> Tensor:
    """Write the noised gradients of the lots ``rows`` (K, B), and return NaN (K,)."""
    lots = by_row(task.examples, rows, task.device, task.model.layout.size)
    batches = [(_batch(task, part, owner), owner.to(task.device)) for part, owner in lots.parts]
    clients = task.private[: len(flat)]
    flat.grad = private_gradients(task.model, flat.detach(), batches, clients)
    return torch.full((len(flat),), torch.nan)


def _batch(task: Task, rows: Tensor, owner: Tensor, absent: Tensor | None = None) -> Batch:
    """Return the batch of ``rows``, each that of the client that ``owner`` names at its place."""
    batch = gather(task.examples, rows, task.device, absent, task.model)
    if task.flipped is not None:
        labels = batch["labels"]
        flipped = task.flipped[owner.flatten()].to(labels.device)
        batch["labels"] = torch.where(flipped, flip_labels(labels, task.num_classes), labels)
    return batch


def _step(
    task: Task,
    optimizer: Descent,
    flat: nn.Parameter,
    leaves: Params,
    start: Tensor,
    steps: Tensor,
    step: int,
) -> None:
    """Take one local step of every active client; the gradients of their losses are there."""
    gradient = flat.grad
    if gradient is None:
        raise ValueError("without gradients there is no step to take")
    # After the noise of private training, so that what a strategy adds is not clipped away.
    with torch.no_grad():
        extra = task.local_gradient(leaves, task.model.layout.unpack(start))
    if extra:
        # A name the strategy leaves out stands for zeros.
        gradient += _join([extra.get(name, torch.zeros_like(x)) for name, x in leaves.items()])
    if task.training.varies_in_round:
        before = flat.detach().clone()
        optimizer.step(flat.data, gradient)
        # Every update is linear in lr, so a client's own step size is a fraction of the way.
        factors = task.training.step_factors(step, steps).to(flat)
        flat.data.copy_(torch.lerp(before, flat.data, factors[:, None]))
    else:
        optimizer.step(flat.data, gradient)


def _begin(
    task: Task, rows: Tensor, lr: float, previous: Descent | None
) -> tuple[nn.Parameter, Params, Descent]:
    """Return parameters that share the memory of ``rows`` (K, size), whole and by name.

    The optimizer over them goes on with the first K rows of the state of ``previous``.
    """
    flat = nn.Parameter(rows)
    parts = task.model.layout.unpack(flat.data)
    leaves: Params = {name: nn.Parameter(part) for name, part in parts.items()}
    optimizer = task.training.make_optimizer(lr) if previous is None else previous.first(len(rows))
    return flat, leaves, optimizer


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Return ``parts``, each (K, *shape), as one matrix (K, size)."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)
