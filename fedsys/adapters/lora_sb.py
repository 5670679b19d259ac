"""LoRA-SB and LoRA-XS: W x + scaling B R A x with B, A frozen and R (rank, rank) trained.

LoRA-SB takes B and A from the first step of full fine-tuning: with G the summed gradient of W,

    dW = -init_lr * G   or   -init_lr * sign(G),      dW ~ U_r S_r V_r^T   (truncated SVD)
    B = U_r,   A = V_r^T,   R_0 = S_r / scaling   or   0

so that R moves W within the best rank-r subspace of that step. B^T B = A A^T = I and scaling = 1
make the gradient of R the optimal one (Ponkshe et al. 2024, https://arxiv.org/abs/2411.19557,
Sections 3.2 to 3.4). LoRA-XS (Balazy et al. 2024, https://arxiv.org/abs/2405.17604) decomposes W
itself, B = U_r, A = S_r V_r^T, R_0 ~ N(0, 1e-5^2).

The factors stay in float32: the authors' code rounds them to bfloat16, which costs B its
orthonormality (B^T B - I of 4e-3).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedsys.adapters.lora import check_rank
from fedsys.adapters.lowrank import (
    ALL_LINEAR,
    Layers,
    LowRank,
    attach,
    check_layers,
    is_transposed,
    low_rank_layers,
    weight_of,
)
from fedsys.cohort import CohortModel
from fedsys.data.examples import Batch
from fedsys.losses import row_losses
from fedsys.params import Params, norm
from fedsys.seeds import forked, generator

EXACT_SVD = 2048  # the smaller side up to which the full SVD is taken
OVERSAMPLING = 10  # extra directions of the randomised SVD beyond it

Init = Literal["client_sum", "private", "public", "seeded_random"]
Gradient = Literal["raw", "sign"]
Start = Literal["zero", "singular"]
_CHOICES = {"init": Init, "gradient": Gradient, "start": Start}


@dataclass(frozen=True)
class LoRASB:
    """R trained between factors taken from the first gradient, or at random."""

    rank: int
    alpha: float | None = None  # scaling = alpha / rank; None: 1, which the theory asks for
    targets: str | Sequence[str] = ALL_LINEAR
    init: Init = "client_sum"
    gradient: Gradient = "raw"
    start: Start = "zero"  # R_0 = 0 or S_r / scaling
    init_lr: float = 1e-4  # scales R_0 only; B and A do not depend on it
    init_examples: int | None = None  # rows of each client, or public rows; None: all
    layers: Layers = None  # of the stack of equal layers: last:2, or numbers from 0; None: all

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_rank(self.rank)
        check_layers(self.layers)
        _check_alpha(self.alpha)
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")
        if self.init_lr <= 0:
            raise ValueError(f"init_lr must be positive, got {self.init_lr}")
        if self.init_examples is not None and self.init_examples < 1:
            raise ValueError(f"init_examples must be at least 1, got {self.init_examples}")

    @property
    def scaling(self) -> float:
        """The factor of B R A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def attach(self, model: nn.Module, seed: int) -> None:
        """Put the adapters into ``model`` with R = 0 and random orthonormal B, A from ``seed``."""
        scaling, layers = self.scaling, self.layers
        placed = attach(model, self.targets, self.rank, scaling, middle=True, layers=layers)
        for index, (_, adapter) in enumerate(placed):
            draw = generator(seed, "basis", index)
            for factor in (adapter.A.weight.data, adapter.B.weight.data):
                tall = max(factor.shape), self.rank
                q, _ = torch.linalg.qr(torch.randn(tall, generator=draw, dtype=factor.dtype))
                factor.copy_(q.T if factor.shape[0] == self.rank != tall[0] else q)
            middle = adapter.R.requires_grad_(True)
            nn.init.zeros_(middle.get_parameter("weight"))

    def factorise(self, gradients: Params) -> tuple[Params, Params]:
        """Return the factors and R_0 of the summed gradients {layer: (out, in)}, by full names.

        Empties ``gradients`` layer by layer, so that little more than one is held beside them.
        """
        factors: Params = {}
        starts: Params = {}
        for layer in list(gradients):
            step = gradients.pop(layer)
            b, a, singular = basis(step.sign() if self.gradient == "sign" else step, self.rank)
            factors[f"{layer}.A.weight"], factors[f"{layer}.B.weight"] = a, b
            r = torch.diag(self.init_lr * singular / self.scaling)
            starts[f"{layer}.R.weight"] = r if self.start == "singular" else torch.zeros_like(r)
        return factors, starts


@dataclass(frozen=True)
class LoRAXS:
    """R trained between the singular factors of the weight itself."""

    rank: int
    alpha: float | None = None  # scaling = alpha / rank; None: 1
    targets: str | Sequence[str] = ALL_LINEAR
    layers: Layers = None  # of the stack of equal layers: last:2, or numbers from 0; None: all

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_rank(self.rank)
        check_layers(self.layers)
        _check_alpha(self.alpha)

    def attach(self, model: nn.Module, seed: int) -> None:
        """Put the adapters into ``model``; R is drawn from ``seed``."""
        scaling, layers = 1.0 if self.alpha is None else self.alpha / self.rank, self.layers
        placed = attach(model, self.targets, self.rank, scaling, middle=True, layers=layers)
        for index, (_, adapter) in enumerate(placed):
            u, s, vt = truncated_svd(weight_of(adapter.base).detach(), self.rank)
            adapter.A.weight.data.copy_(s[:, None] * vt)
            adapter.B.weight.data.copy_(u)
            middle = adapter.R.requires_grad_(True).get_parameter("weight").data
            middle.normal_(0, 1e-5, generator=generator(seed, "adapter", index))


def _check_alpha(alpha: float | None) -> None:
    if alpha is not None and alpha <= 0:
        raise ValueError(f"alpha must be positive or null, got {alpha}")


def basis(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return B (out, r), A (r, in) and the singular values (r,) of the step ``-gradient``."""
    u, s, vt = truncated_svd(-gradient, rank)
    return u, vt, s


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r), S (r,), V^T (r, n): exact where the smaller side is at most 2048."""
    if min(matrix.shape) <= EXACT_SVD:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with forked(0, "svd"):  # svd_lowrank draws from the global generator
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLING, *matrix.shape), niter=10)
        vt = v.T
    return u[:, :rank].contiguous(), s[:rank], vt[:rank].contiguous()


def shared_factors(model: nn.Module) -> Params:
    """Return every frozen A and B beside a trained R, by name: what all clients must agree on."""
    factors: Params = {}
    for name, layer in low_rank_layers(model):
        if not isinstance(layer.R, nn.Identity):
            factors[f"{name}.A.weight"] = layer.A.weight.detach()
            factors[f"{name}.B.weight"] = layer.B.weight.detach()
    return factors


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every adapted layer, by name."""
    shapes = {name: weight_of(layer.base).shape for name, layer in low_rank_layers(model)}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def summed_gradients(model: CohortModel, batches: Iterable[Batch]) -> Params:
    """Return {layer: sum over rows of the loss's gradient (out, in)} of the adapted layers.

    Each layer's gradient is added to its sum and dropped while the backward pass goes on, so one
    layer's gradient is held beside the sums. ``model`` is called with a batch's inputs.
    """
    layers = dict(low_rank_layers(model.model))
    sums = {name: _zeros(layer) for name, layer in layers.items()}
    handles = []
    for name, layer in layers.items():
        weight = layer.base.get_parameter("weight").requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(_move_gradient(sums[name], layer)))
    try:
        for batch in batches:
            labels = batch["labels"]
            inputs = {n: v for n, v in batch.items() if n != "labels"}
            row_losses(model(**inputs), labels).sum().backward()
    finally:
        for handle, layer in zip(handles, layers.values(), strict=True):
            handle.remove()
            layer.base.requires_grad_(False)
        model.zero_grad()
    return sums


def clipped_gradients(
    model: CohortModel, rows: Iterable[Batch], clipping_norm: float, cell: float = 0.0
) -> Params:
    """Return {layer: sum (out, in) of the gradients of ``rows``, each a batch of one}, in float64.

    The gradient of a row, over all adapted layers together, is clipped to ``clipping_norm``; one
    that is not finite counts as zero. With ``cell`` > 0 entries are cut towards zero to multiples
    of it, of which sums are exact.
    """
    layers = dict(low_rank_layers(model.model))
    total = {name: _zeros(layer).double() for name, layer in layers.items()}
    for row in rows:
        gradient = summed_gradients(model, [row])
        length = norm(gradient)
        factor = min(1.0, clipping_norm / length) if length else 0.0
        for name, value in gradient.items() if math.isfinite(length) else ():
            share = value.double() * factor
            total[name] += share.div_(cell).trunc_().mul_(cell) if cell else share
    return total


def _zeros(layer: LowRank) -> Tensor:
    weight = weight_of(layer.base)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.zeros(weight.shape, dtype=dtype)


def _move_gradient(total: Tensor, layer: LowRank) -> Callable[[Tensor], None]:
    transposed = is_transposed(layer.base)

    def move(weight: Tensor) -> None:
        gradient = weight.grad
        if gradient is not None:
            total.add_((gradient.T if transposed else gradient).to(total))
            weight.grad = None

    return move
