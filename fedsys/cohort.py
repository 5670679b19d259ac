"""A model whose trainable tensors exist once per client, so that K clients share one pass.

The K batches of a cohort are concatenated to one batch of K*B rows. Frozen modules see nothing but
a larger batch; a module with trainable tensors holds one copy per client and applies client k's
copy to client k's rows. The sum of the K clients' losses then gives each client exactly its own
gradient. This is right for every model that never mixes rows (``refuse_cross_sample`` checks).

Symbols: K clients, B rows per client in this pass.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedsys.cohort_conv import CohortConv2d, CohortGroupNorm
from fedsys.cohort_layers import (
    PROBES,
    CohortLayer,
    CohortLinear,
    CohortModule,
    Lengths,
    Pass,
    length_of,
)
from fedsys.data.examples import Batch, Examples
from fedsys.losses import client_losses, row_targets
from fedsys.models import refuse_cross_sample
from fedsys.params import Layout, Params
from fedsys.prefix import STATES, prefix_of

# Copying a number and adding its gradient up takes 4 ns, a position 0.06 ns for each number of the
# model: six operations, at 100 GFLOP/s.
COPYING = 64

__all__ = ["CohortLinear", "CohortModel", "CohortModule", "row_gradients"]


class CohortModel(nn.Module):
    """``model`` with its trainable tensors replaced by one copy per client.

    ``layout`` says where each lies in a client's flat vector, ``initial`` (size,) is their value
    at construction, ``copying`` is how many positions of a row take as long as one more copy. The
    modules of ``model`` are replaced in place.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take over ``model``; raise ``ValueError`` if it mixes rows or nothing is trainable."""
        super().__init__()
        refuse_cross_sample(model)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("the model has no trainable tensor: check adapter.targets")
        names = {id(p): n for n, p in trainable.items()}
        initial = {n: p.detach().clone() for n, p in trainable.items()}
        self.layout = Layout.of(initial)
        self.initial = self.layout.pack(initial)
        self.copying = COPYING * self.layout.size / sum(p.numel() for p in model.parameters())
        self._size = Pass()
        self._slots: dict[str, list[Callable[[Tensor], None]]] = {n: [] for n in trainable}
        self._layers: dict[nn.Module, CohortLayer] = {}  # by the module each stands for
        self._probed = False
        holder = nn.Module()
        holder.model = model
        self._swap(holder, "", names)
        self.model: nn.Module = holder.model
        megabytes = getattr(model, "prefix_cache_mb", 0)
        self.prefix = prefix_of(self.model, set(self._layers.values()), megabytes << 20)
        self.bind(self.layout.unpack(self.initial[None]))

    def bind(self, params: Mapping[str, Tensor]) -> None:
        """Make ``params`` (K, *shape) the clients' tensors; K may differ from call to call."""
        for name, value in params.items():
            for slot in self._slots[name]:
                slot(value)
        self._params = params
        self._size.clients = len(next(iter(params.values())))

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the logits of K*B rows, client by client."""
        if self._size.clients > 1 and not self._probed:
            self._probe(inputs)
        self._size.rows = len(next(iter(inputs.values())))
        return self._logits(inputs)

    def remember(self, examples: Examples, rows: Tensor) -> None:
        """Run the frozen blocks on ``rows`` (n,) once for all passes to come, where that can be."""
        if self.prefix is None:
            return
        bound = self._params
        self.bind({name: value[:1] for name, value in bound.items()})
        try:
            self.prefix.fill(examples, rows)
        finally:
            self.bind(bound)

    def states(self, examples: Examples, rows: Tensor) -> Batch:
        """Return what a batch of ``rows`` (b,) may hold besides, to spare the frozen blocks."""
        return {} if self.prefix is None else self.prefix.states(examples, rows)

    def _logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        plain = {name: value for name, value in inputs.items() if name != STATES}
        if self.prefix is None or STATES not in inputs:
            logits: Tensor = self.model(**plain)
            return logits
        with self.prefix.given(inputs[STATES]):
            logits = self.model(**plain)
        return logits

    @torch.no_grad()
    def _probe(self, inputs: Params) -> None:
        """Let every layer learn from two small passes which of its inputs have rows."""
        bound = self._params
        self.bind({name: value[:1] for name, value in bound.items()})
        calls: list[dict[nn.Module, list[Lengths]]] = []

        def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
            calls[-1][layer].append(list(map(length_of, pytree.tree_leaves((args, kwargs)))))

        hooks = [x.register_forward_pre_hook(note, with_kwargs=True) for x in self._layers.values()]
        try:
            for rows in PROBES:
                calls.append(defaultdict(list))
                self._logits({n: v[torch.arange(rows) % len(v)] for n, v in inputs.items()})
        finally:
            for hook in hooks:
                hook.remove()
            self.bind(bound)
        for layer in self._layers.values():
            layer.learn(calls[0][layer], calls[1][layer])
        self._probed = True

    def _swap(self, parent: nn.Module, prefix: str, names: dict[int, str]) -> None:
        # A layer in two places must be replaced in both, so not by named_children.
        for name, child in parent._modules.items():
            if child is None:
                continue
            path = f"{prefix}.{name}".removeprefix(".model.").removeprefix(".")
            if any(id(p) in names for p in child.parameters(recurse=False)):
                if child not in self._layers:
                    self._layers[child] = self._stand_in(child, path, names)
                setattr(parent, name, self._layers[child])
            else:
                self._swap(child, path, names)

    def _stand_in(self, child: nn.Module, path: str, names: dict[int, str]) -> CohortLayer:
        inside = dict(child.named_parameters(remove_duplicate=False))
        cohort: CohortLinear | CohortModule
        if type(child) is nn.Linear:
            cohort = CohortLinear(child, path, self._size)
        elif type(child) is nn.Conv2d and child.padding_mode == "zeros":
            cohort = CohortConv2d(child, path, self._size)
        elif type(child) is nn.GroupNorm:
            cohort = CohortGroupNorm(child, path, self._size)
        else:
            cohort = CohortModule(child, path, self._size)
        for inner, param in inside.items():
            if id(param) in names:
                self._slots[names[id(param)]].append(partial(cohort.bind, inner))
        return cohort


def row_gradients(
    model: CohortModel,
    copies: Tensor,
    inputs: Batch,
    labels: Tensor,
    targets: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return each row's loss (rows,), and its gradients, (rows, numbers) a tensor.

    They are taken at the row's own ``copies`` (rows, size): a row is a client of one row, so
    whatever layer trains in a cohort has gradients by row. ``targets`` (rows,) is what a row's
    loss is divided by; None: the targets of the row.
    """
    if targets is None:
        targets = row_targets(labels)
    leaves = {n: nn.Parameter(part) for n, part in model.layout.unpack(copies).items()}
    model.bind(leaves)
    losses = client_losses(model(**inputs), labels, targets)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return losses.detach(), [gradient.reshape(len(copies), -1) for gradient in gradients]
