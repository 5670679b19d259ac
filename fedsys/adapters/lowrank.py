"""The one adapter module, and where it goes.

    y = W x + b + scaling * B [R] A x

Shapes: W (out, in), A (rank, in), R (rank, rank), B (out, rank). LoRA trains A and B and has no R.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsys.models.stacks import stacks
from fedsys.params import Params

ALL_LINEAR = "all-linear"
OUTPUT_LAYERS = ("head", "classifier", "score", "lm_head", "embed_out")

Layers = str | Sequence[int] | None  # "last:2", numbers from 0, or all and what is outside of them


class LowRank(nn.Module):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, base: nn.Module, rank: int, scaling: float, *, middle: bool) -> None:
        """Put uninitialised factors beside ``base``, with R between them if ``middle``."""
        super().__init__()
        out, inside = weight_of(base).shape
        self.base = base
        self.scaling = scaling
        like = {"dtype": weight_of(base).dtype, "bias": False}
        self.A = nn.utils.skip_init(nn.Linear, inside, rank, **like)
        self.R = nn.utils.skip_init(nn.Linear, rank, rank, **like) if middle else nn.Identity()
        self.B = nn.utils.skip_init(nn.Linear, rank, out, **like)

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus the update, in the base's dtype."""
        y: Tensor = self.base(x)
        low = _apply(self.R, _apply(self.A, x))
        if self.scaling != 1:
            low = self.scaling * low
        if type(self.B) is not nn.Linear:
            update: Tensor = self.B(low.to(x.dtype))
            return y + update.to(y.dtype)
        # The product is added as it is made: one pass over the output in place of three.
        factor = self.B.weight.to(y.dtype)
        flat, inner = y.reshape(-1, y.shape[-1]), low.to(y.dtype).reshape(-1, low.shape[-1])
        return torch.addmm(flat, inner, factor.T).view(y.shape)


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    if type(layer) is nn.Linear:
        # A frozen factor is kept in float32 and applied in the dtype of the base.
        return F.linear(x, layer.weight.to(x.dtype))
    y: Tensor = layer(x)
    return y


def is_transposed(layer: nn.Module) -> bool:
    """Return whether ``layer`` is GPT-2's Conv1D, which stores its weight as (in, out)."""
    return type(layer).__name__ == "Conv1D"


def weight_of(layer: nn.Module) -> Tensor:
    """Return a view (out, in) of the layer's weight."""
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight matrix")
    return weight.T if is_transposed(layer) else weight


def check_layers(layers: Layers) -> None:
    """Raise ``ValueError`` unless ``layers`` is null, last:N, or numbers of layers."""
    if isinstance(layers, str):
        fits = re.fullmatch("last:[1-9][0-9]*", layers) is not None
    else:
        fits = layers is None or (len(layers) > 0 and min(layers) >= 0)
    if not fits:
        raise ValueError(f"layers is null, last:N or a list of numbers from 0, got {layers!r}")


def targets_of(model: nn.Module, targets: str | Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return the (name, layer) pairs that ``targets`` names, in the model's order.

    ``all-linear`` stands for every linear layer but the output layer; a list holds endings of names
    such as ``query`` or ``attention.output.dense``. Raises ``ValueError`` for an ending that
    matches nothing. Never adapted are a layer of a fresh head, which is trained in full, and one
    whose weight is tied to another module's.
    """
    linear = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear or is_transposed(m)]
    holders = Counter(id(getattr(m, "weight", None)) for m in model.modules())
    fresh = tuple(f"{head}." for head in getattr(model, "heads", ()))
    free = [
        (n, m) for n, m in linear if holders[id(m.weight)] == 1 and not f"{n}.".startswith(fresh)
    ]
    if targets == ALL_LINEAR:
        return [(n, m) for n, m in free if not _ends(n, OUTPUT_LAYERS)]
    endings = [targets] if isinstance(targets, str) else list(targets)
    missing = [e for e in endings if not any(_ends(n, [e]) for n, _ in free)]
    if missing:
        kinds = sorted({n.rpartition(".")[2] for n, _ in free})
        raise ValueError(
            f"adapter.targets: no linear layer is named {', '.join(missing)}; "
            f"this model has {', '.join(kinds)}"
        )
    return [(n, m) for n, m in free if _ends(n, endings)]


def attach(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int,
    scaling: float,
    *,
    middle: bool,
    layers: Layers = None,
) -> list[tuple[str, LowRank]]:
    """Freeze ``model``, put a ``LowRank`` at each target in ``layers``, and return them by name.

    Fresh heads (``model.heads``) stay trainable. The factors are uninitialised and frozen.
    """
    chosen = targets_of(model, targets)
    if not chosen:
        raise ValueError(f"adapter.targets: {targets!r} matches no linear layer of the model")
    if layers is not None:
        chosen = _within(model, chosen, layers)
    for name, layer in chosen:
        largest = min(weight_of(layer).shape)
        if rank > largest:
            raise ValueError(f"adapter.rank is at most {largest} for layer {name}, got {rank}")
    model.requires_grad_(False)
    for name in getattr(model, "heads", ()):
        model.get_submodule(name).requires_grad_(True)
    placed = []
    for name, layer in chosen:
        adapter = LowRank(layer, rank, scaling, middle=middle).requires_grad_(False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter)
        placed.append((name, adapter))
    return placed


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Yield the (name, adapter) pairs of ``model`` in order."""
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            yield name, module


def factor_names(layer: str) -> tuple[str, str]:
    """Return the names of A and B of an adapted layer."""
    return f"{layer}.A.weight", f"{layer}.B.weight"


def base_weights(model: nn.Module) -> Params:
    """Return a copy (out, in) of W under each adapter, by the adapter's name."""
    return {name: weight_of(layer.base).detach().clone() for name, layer in low_rank_layers(model)}


def moved(base: Params, moves: Params) -> Params:
    """Return W + B A of each layer, given ``layer.A.weight`` (k, in), ``layer.B.weight`` (out, k).

    Raises ``ValueError`` unless the factors are those of all layers, and fit.
    """
    if moves.keys() != {factor for name in base for factor in factor_names(name)}:
        raise ValueError("the base moves by factors of other layers than are adapted")
    result = {}
    for name, weight in base.items():
        a, b = (moves[factor] for factor in factor_names(name))
        if (len(b), a.shape[-1]) != weight.shape or b.shape[-1] != len(a):
            raise ValueError(f"{name} of {tuple(weight.shape)} moves by factors of other shapes")
        result[name] = weight + (b @ a).to(weight)
    return result


def load_base(model: nn.Module, base: Params) -> None:
    """Copy ``base`` into ``model``; raises ``ValueError`` unless names and shapes agree."""
    layers = dict(low_rank_layers(model))
    shapes = {name: weight_of(layer.base).shape for name, layer in layers.items()}
    if shapes != {name: weight.shape for name, weight in base.items()}:
        raise ValueError("the base received does not fit this model's adapted layers")
    for name, weight in base.items():
        weight_of(layers[name].base).detach().copy_(weight)  # not .data: that it moved can be seen


def _within(
    model: nn.Module, chosen: list[tuple[str, nn.Module]], layers: str | Sequence[int]
) -> list[tuple[str, nn.Module]]:
    """Return which of the ``chosen`` (name, layer) pairs are in ``layers`` of the model's stack."""
    found = {n: len(s) for n, s in stacks(model).items() if _inside(chosen, [n])}
    if len(found) != 1:
        what = " and ".join(found) or "no"
        raise ValueError(
            f"adapter.layers needs one stack of equal layers, and this model has {what}: "
            "choose by adapter.targets instead"
        )
    ((stack, depth),) = found.items()
    wanted = _last(layers, depth) if isinstance(layers, str) else sorted(set(layers))
    if wanted[0] < 0 or wanted[-1] >= depth:
        raise ValueError(f"adapter.layers: this model has layers 0 to {depth - 1}, got {layers}")
    inside = _inside(chosen, [f"{stack}.{number}" for number in wanted])
    if not inside:
        raise ValueError(f"adapter.layers: {layers} holds none of adapter.targets")
    return inside


def _last(layers: str, depth: int) -> list[int]:
    return list(range(depth - int(layers.removeprefix("last:")), depth))


def _inside(
    chosen: list[tuple[str, nn.Module]], parts: Sequence[str]
) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in chosen if n.startswith(tuple(f"{part}." for part in parts))]


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == e or name.endswith("." + e) for e in endings)
