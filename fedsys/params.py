"""Arithmetic on ``Params``: the named trainable tensors of a model.

A name that is absent stands for zeros, so ``{}`` is the zero vector of every model.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, wraps
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]


def add(params: Params, direction: Params, scale: float = 1.0) -> Params:
    """Return ``params + scale * direction`` in the dtypes of ``params``.

    The sum is taken in float64 and rounded once; whole-number tensors round to the nearest.
    """
    return {
        name: _cast(value.double() + scale * direction[name].double(), value.dtype)
        if name in direction
        else value
        for name, value in params.items()
    }


def subtract(params: Params, other: Params) -> Params:
    """Return ``params - other``, name by name."""
    return {name: value - other[name] for name, value in params.items()}


def weighted_sum(terms: Iterable[tuple[float, Params]]) -> Params:
    """Return ``sum_n weight_n * params_n`` in float64, holding one term at a time.

    The result is ``{}``, the zero vector, when there are no terms.
    """
    total: Params = {}
    sums: list[Tensor] = []
    whole: Tensor | None = None
    for weight, params in terms:
        if not total:
            total = _zeros(params)
            sums, whole = list(total.values()), flat_of(total)
        if whole is not None and (flat := flat_of(params)) is not None:
            whole.add_(flat, alpha=weight)
        elif sums:
            torch._foreach_add_(sums, [params[name] for name in total], alpha=weight)
    return total


def weighted_mean(terms: Iterable[tuple[float, Params]]) -> Params:
    """Return ``sum_n weight_n * params_n / sum_n weight_n`` in one pass over ``terms``."""
    weights: list[float] = []

    def noted() -> Iterable[tuple[float, Params]]:
        for weight, params in terms:
            weights.append(weight)
            yield weight, params

    total = weighted_sum(noted())
    if total:
        torch._foreach_div_(list(total.values()), sum(weights) or 1.0)
    return total


def _zeros(params: Params) -> Params:
    """Return zeros in float64 of the shapes of ``params``, views of one vector if they are."""
    if isinstance(params, Views):
        return params.layout.views(torch.zeros_like(params.flat, dtype=torch.float64))
    return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}


def norm(params: Params) -> float:
    """Return the Euclidean norm over all tensors together."""
    squares = (value.double().square().sum().item() for value in params.values())
    return math.sqrt(sum(squares))


def digest(params: Params) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bits, in order of names."""
    state = hashlib.sha256()
    for name in sorted(params):
        value = params[name].detach().cpu()
        state.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        # A copy, because strides of one entry or none may be anything, and 0-dim has no bytes.
        flat = value.clone(memory_format=torch.contiguous_format).view(-1)
        state.update(flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def chained(previous: str, params: Params) -> str:
    """Return the digest of what had the digest ``previous`` and then changed by ``params``."""
    return hashlib.sha256(f"{previous}/{digest(params)}".encode()).hexdigest()


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in one flat vector of ``size`` numbers of one dtype."""

    shapes: dict[str, torch.Size]
    dtype: torch.dtype

    @classmethod
    def of(cls, params: Params) -> "Layout":
        """Return the layout of ``params``; raise ``TypeError`` when dtypes are mixed."""
        dtypes = {value.dtype for value in params.values()}
        if len(dtypes) > 1:
            raise TypeError(f"one flat vector holds one dtype, got {sorted(map(str, dtypes))}")
        return cls({n: p.shape for n, p in params.items()}, next(iter(dtypes), torch.float32))

    @cached_property
    def size(self) -> int:
        """How many numbers the vector holds."""
        return sum(shape.numel() for shape in self.shapes.values())

    def pack(self, params: Params) -> Tensor:
        """Return ``params`` as one vector of shape (size,)."""
        if not self.shapes:
            return torch.zeros(0, dtype=self.dtype)
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def unpack(self, flat: Tensor) -> Params:
        """Return views of ``flat`` (..., size), each of shape (..., *shape)."""
        front = flat.shape[:-1]
        parts = torch.split_with_sizes(flat, self._sizes, -1)
        return {
            name: part if len(shape) == 1 else part.view(front + shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def views(self, flat: Tensor) -> "Views":
        """Return views of ``flat`` (size,) that know it."""
        return Views(self, flat)

    @cached_property
    def _sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes.values()]


def _made_first(views: type["Views"]) -> type["Views"]:
    """Have every method of dict make the views before it looks at them, or changes them."""

    def after_making(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def looking(self: "Views", *args: Any, **kwargs: Any) -> Any:
            self.make()
            return method(self, *args, **kwargs)

        return looking

    for name, method in vars(dict).items():
        of_instances = isinstance(method, WrapperDescriptorType | MethodDescriptorType)
        if of_instances and name not in ("__init__", "__getattribute__"):
            setattr(views, name, after_making(method))
    return views


@_made_first
class Views(dict[str, Tensor]):
    """``Params`` that are views of one vector: sums of them take one addition, not one a name.

    Not to be changed: whoever wants other tensors makes another dict. The views are made when
    somebody looks, since to make them takes longer than to add a small vector.
    """

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        """View ``flat`` (size,) as ``layout`` says."""
        self.layout, self.flat = layout, flat
        self._made = False

    def __reduce__(self) -> tuple[type["Views"], tuple[Layout, Tensor]]:
        """Copy and pickle by the vector."""
        return Views, (self.layout, self.flat)

    def make(self) -> None:
        """Make the views, unless they are there."""
        if not self._made:
            dict.update(self, self.layout.unpack(self.flat))
            self._made = True


def flat_of(params: Params) -> Tensor | None:
    """Return the vector whose views ``params`` are, if they are."""
    return params.flat if isinstance(params, Views) else None


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)
