"""Models as plain modules, and the training of one client as everybody writes it."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.work import Noise, Work


class Adapted(nn.Module):
    """A linear layer with LoRA-SB: W x + b + B R A x, of which R, in float32, is trained."""

    def __init__(self, base: nn.Linear, down: Tensor, middle: nn.Linear, up: Tensor) -> None:
        """Take A as ``down`` (rank, in), R as ``middle`` and B as ``up`` (out, rank)."""
        super().__init__()
        self.base, self.R = base, middle
        self.down, self.up = (
            nn.Parameter(factor.detach().to(base.weight.dtype), requires_grad=False)
            for factor in (down, up)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output, in the dtype of ``x``."""
        y: Tensor = self.base(x)
        low = self.R(F.linear(x, self.down).to(self.R.weight.dtype))
        return y + F.linear(low.to(x.dtype), self.up)


class Encoder(nn.Module):
    """A transformer with a linear classifier on the mean of its hidden states."""

    def __init__(self, backbone: nn.Module, classifier: nn.Linear, padding: int | None) -> None:
        """Put both together; ``padding`` is the token that fills rows up, if any is short."""
        super().__init__()
        self.backbone, self.classifier, self.padding = backbone, classifier, padding

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of rows, run no longer than the longest of them."""
        if self.padding is None:
            mean = self.backbone(input_ids=ids).last_hidden_state.mean(1)
        else:
            ids = ids[:, : int((ids != self.padding).sum(1).max())]
            mask = ids != self.padding
            hidden = self.backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits: Tensor = self.classifier(mean.to(self.classifier.weight.dtype))
        return logits


def perceptron(fc1: nn.Module, head: nn.Module) -> nn.Module:
    """Return a perceptron with one hidden layer."""
    plain = nn.Sequential()
    for name, module in (("fc1", fc1), ("relu", nn.ReLU()), ("head", head)):
        plain.add_module(name, module)
    return plain


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained; the names are those before Opacus wrapped the model."""
    named = model.named_parameters()
    return {name.removeprefix("_module."): p for name, p in named if p.requires_grad}


def wrapped(model: nn.Module, noise: Noise | None) -> nn.Module:
    """Return ``model``, by Opacus if it trains with noise."""
    if noise is None:
        return model
    from opacus import GradSampleModule

    private: nn.Module = GradSampleModule(model, batch_first=True, loss_reduction="mean")
    return private


def make_optimizer(
    parameters: list[nn.Parameter], lr: float, noise: Noise | None, batch: int
) -> Optimizer:
    """Return SGD, with Opacus' noise if there is any."""
    plain = SGD(parameters, lr=lr)
    if noise is None:
        return plain
    from opacus.optimizers import DPOptimizer

    private: Optimizer = DPOptimizer(
        plain,
        noise_multiplier=noise.noise_multiplier,
        max_grad_norm=noise.clipping_norm,
        expected_batch_size=batch,
    )
    return private


def train(
    work: Work, model: nn.Module, trained: Mapping[str, nn.Parameter], batches: Tensor
) -> None:
    """Train ``model`` for a client's round of ``batches`` (steps, batch)."""
    optimizer = make_optimizer(list(trained.values()), work.lr, work.noise, batches.shape[1])
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(work.inputs[batch]), work.labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def copy_into(trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give ``trained`` the values of x_t."""
    for name, parameter in trained.items():
        parameter.copy_(values[name])
