"""A model whose trainable tensors exist once per client, so that K clients share one pass.

The K batches of a cohort are concatenated to one batch of K*B rows. Frozen modules see nothing but
a larger batch; a module with trainable tensors holds one copy per client and applies client k's
copy to client k's rows. The sum of the K clients' losses then gives each client exactly its own
gradient. This is right for every model that never mixes rows (``refuse_cross_sample`` checks).

Symbols: K clients, B rows per client in this pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from fedsys.models import refuse_cross_sample
from fedsys.params import Layout, Params


@dataclass
class Pass:
    """The size of the pass now under way, shared by all cohort layers of a model."""

    clients: int = 1  # K
    rows: int = 1  # K * B


class CohortLinear(nn.Module):
    """``nn.Linear`` with one weight (K, out, in) and bias (K, out) per client."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.detach()[None], layer.weight.requires_grad)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach()[None], bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Apply client k's weight to the k-th of K equal parts of ``x`` (K*B, ..., in).

        Computes and returns in the weight's dtype, whatever that of ``x``.
        """
        parts = x.reshape(len(self.weight), -1, self.in_features).to(self.weight.dtype)
        weight = self.weight.transpose(1, 2)
        if self.bias is None:
            y = torch.bmm(parts, weight)
        else:
            y = torch.baddbmm(self.bias[:, None], parts, weight)
        return y.view(*x.shape[:-1], self.out_features)

    def bind(self, name: str, value: Tensor) -> None:
        """Make ``value`` (K, *shape) the tensor ``name``."""
        setattr(self, name, value if isinstance(value, nn.Parameter) else _constant(value))


class CohortModule(nn.Module):
    """Any other module with trainable tensors, mapped over the clients by ``torch.func.vmap``."""

    def __init__(self, module: nn.Module, size: Pass) -> None:
        super().__init__()
        self._module = [module]  # in a list: its tensors are not this module's
        self._size = size
        self._stacked: Params = {
            name: p[None] for name, p in module.named_parameters() if p.requires_grad
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Split what has one entry a row among the clients; hand over the rest as it is."""
        size, module = self._size, self._module[0]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        split = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == size.rows for x in leaves]
        leaves = [
            x.reshape(size.clients, -1, *x.shape[1:]) if s else x
            for x, s in zip(leaves, split, strict=True)
        ]

        def one(params: Params, *leaves: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(list(leaves), spec)
            return functional_call(module, params, args, kwargs, tie_weights=False)

        out = vmap(one, in_dims=(0, *(0 if s else None for s in split)))(self._stacked, *leaves)
        return pytree.tree_map(self._join if any(split) else self._repeat, out)

    def bind(self, name: str, value: Tensor) -> None:
        """Make ``value`` (K, *shape) the tensor ``name``."""
        self._stacked[name] = value

    def _join(self, out: Tensor) -> Tensor:
        return out.flatten(0, 1)

    def _repeat(self, out: Tensor) -> Tensor:
        # No input had rows (position embeddings, say): (K, 1, ...) serves all rows of a client.
        each = self._size.rows // self._size.clients
        return out.expand(-1, each, *out.shape[2:]).flatten(0, 1)


class CohortModel(nn.Module):
    """``model`` with its trainable tensors replaced by one copy per client.

    ``layout`` says where each lies in a client's flat vector, ``initial`` (size,) is their value
    at construction. The modules of ``model`` are replaced in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        refuse_cross_sample(model)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("the model has no trainable tensor: check adapter.targets")
        names = {id(p): n for n, p in trainable.items()}
        initial = {n: p.detach().clone() for n, p in trainable.items()}
        self.layout = Layout.of(initial)
        self.initial = self.layout.pack(initial)
        self._size = Pass()
        self._slots: dict[str, list[Callable[[Tensor], None]]] = {n: [] for n in trainable}
        holder = nn.Module()
        holder.model = model
        self._swap(holder, names)
        self.model: nn.Module = holder.model
        self.bind(self.layout.unpack(self.initial[None]))

    def bind(self, params: Params) -> None:
        """Make ``params`` (K, *shape) the clients' tensors; K may differ from call to call."""
        for name, value in params.items():
            for slot in self._slots[name]:
                slot(value)
        self._size.clients = len(next(iter(params.values())))

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the logits of K*B rows, client by client."""
        self._size.rows = len(next(iter(inputs.values())))
        logits: Tensor = self.model(**inputs)
        return logits

    def _swap(self, parent: nn.Module, names: dict[int, str]) -> None:
        for name, child in parent.named_children():
            own = {n: p for n, p in child.named_parameters(recurse=False) if p.requires_grad}
            if not own:
                self._swap(child, names)
                continue
            plain = type(child) is nn.Linear
            cohort = CohortLinear(child) if plain else CohortModule(child, self._size)
            inside = own if plain else dict(child.named_parameters(remove_duplicate=False))
            for inner, param in inside.items():
                if param.requires_grad:
                    self._slots[names[id(param)]].append(_slot(cohort, inner))
            setattr(parent, name, cohort)


def _slot(module: CohortLinear | CohortModule, name: str) -> Callable[[Tensor], None]:
    return lambda value: module.bind(name, value)


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
