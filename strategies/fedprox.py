"""FedProx: FedAvg whose clients are pulled back to the global model.

    g_n(w)  = dF_n/dw + mu (w - x_t)        at every local step
    x_{t+1} = x_t + eta * sum_n w_n Delta_n

Symbols: x_t start, w params, mu mu, eta server_lr, Delta_n update.delta.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
https://arxiv.org/abs/1812.06127, Algorithm 2.
"""

from dataclasses import dataclass

from fedsys.params import Params, subtract
from fedsys.strategy import Strategy


@dataclass(kw_only=True)
class FedProx(Strategy):
    """Adds the gradient of mu/2 ||w - x_t||^2 at the client."""

    mu: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mu < 0:
            raise ValueError(f"mu must not be negative, got {self.mu}")

    def local_gradient(self, params: Params, start: Params) -> Params:
        """Return the gradient of the proximal term."""
        return {name: self.mu * value for name, value in subtract(params, start).items()}

    def train_config(self) -> dict[str, float]:
        """Return mu, for clients that are not ours."""
        # The key that clients written for Flower's own FedProx read.
        return {"proximal-mu": self.mu}
