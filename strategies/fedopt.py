"""FedAdam, FedYogi, FedAdagrad: an adaptive optimizer on the server.

    m_t = beta1 m_{t-1} + (1 - beta1) d_t
    v_t = v_{t-1} + d_t^2                                       FedAdagrad
          v_{t-1} - (1 - beta2) d_t^2 sign(v_{t-1} - d_t^2)     FedYogi
          beta2 v_{t-1} + (1 - beta2) d_t^2                     FedAdam
    x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau)

Symbols: d_t direction (the cohort's weighted mean of Delta_n), eta server_lr, tau tau; m_0 = 0,
v_0 = tau^2. There is no bias correction, as in the paper. State is float64; x keeps its dtype.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295,
Algorithm 2.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedsys.params import Params, add
from fedsys.strategy import Strategy


class Moments(NamedTuple):
    """What the server optimizer remembers, shaped like the params."""

    first: Params  # m
    second: Params  # v


@dataclass(kw_only=True)
class _FedOpt(Strategy):
    """The three differ in how the second moment follows the direction."""

    server_lr: float = 0.01
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name, 0.0) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, got {self.tau}")

    def init(self, params: Params, num_clients: int) -> Moments:
        return Moments(
            first={n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()},
            second={
                n: torch.full_like(p, self.tau**2, dtype=torch.float64) for n, p in params.items()
            },
        )

    def step(self, params: Params, direction: Params, state: Moments) -> tuple[Params, Moments]:
        first, second, move = {}, {}, {}
        for name, d in direction.items():
            first[name] = self.beta1 * state.first[name] + (1 - self.beta1) * d
            second[name] = self.second_moment(state.second[name], d.square())
            move[name] = first[name] / (second[name].sqrt() + self.tau)
        return add(params, move, self.server_lr), Moments(first, second)

    @abstractmethod
    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return v_t from v_{t-1} and d_t^2."""


@dataclass(kw_only=True)
class FedAdagrad(_FedOpt):
    """The second moment sums; ``beta1`` is 0 in the paper's experiments."""

    server_lr: float = 0.1
    beta1: float = 0.0

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return the sum of all squares."""
        return v + squared


@dataclass(kw_only=True)
class FedYogi(_FedOpt):
    """The second moment moves by a bounded step towards d_t^2."""

    beta2: float = 0.99

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return v, moved towards d_t^2 by a fraction of d_t^2."""
        return v - (1 - self.beta2) * squared * torch.sign(v - squared)


@dataclass(kw_only=True)
class FedAdam(_FedOpt):
    """The second moment is an exponential mean."""

    beta2: float = 0.99

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return the mean of v and d_t^2, weighted by beta2."""
        return self.beta2 * v + (1 - self.beta2) * squared
