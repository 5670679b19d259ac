"""Fed-SB: only R of W + s B R A is trained and averaged, between factors all clients share.

    phase 0   G = sum_n G_n  (or of public rows),   B, A, R_0 = LoRA-SB(G),   broadcast once
    rounds    R <- R + eta sum_{n in S_t} w_n (R_n - R),   w_n = 1 / |S_t|

sum_n w_n B R_n A = B (sum_n w_n R_n) A, so averaging is exact, and a client sends rank^2 numbers a
layer whatever the size of the layer and the number of clients. With other B, A at some client the
average would mean nothing, so their digest is checked at every aggregation.

Symbols: G_n a client's summed gradient of each adapted W, eta server_lr, s adapter.scaling.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", 2025, https://arxiv.org/abs/2502.15436, Sections 3 and 4.
The released code takes G from pooled training rows at the server; here clients send sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from fedsys.adapters.lora_sb import LoRASB
from fedsys.errors import RunError
from fedsys.params import Params, weighted_sum
from fedsys.rounds import Ask
from fedsys.strategy import Strategy


@dataclass(kw_only=True)
class FedSB(Strategy):
    """Averages R and the head, uniformly as in the paper.

    Without ``adapter`` there is no phase 0: the arrays are R and the head already.
    """

    weighting: Literal["examples", "uniform"] = "uniform"

    adapter: LoRASB | None = None  # makes the factors of phase 0
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)  # adapted W's (out, in)
    seeded_factors: Params | None = None  # adapter.init=seeded_random: what every client derives
    public_gradients: Callable[[], Params] | None = None  # adapter.init=public

    def prepare(self, params: Params, ask: Ask) -> tuple[Params, Params]:
        """Return R_0 with the head, and the factors: phase 0."""
        if self.adapter is None:
            return params, {}
        if self.seeded_factors is not None:
            return params, self.seeded_factors
        if self.public_gradients is not None:
            gradients = self.public_gradients()
        else:
            gradients = weighted_sum((1.0, sums) for _, sums in ask("gradient", self.layers))
        if not gradients:
            raise RunError("Fed-SB: no client sent a gradient, so there is no basis to train in")
        dtype = next(iter(params.values())).dtype
        factors, starts = self.adapter.factorise({n: g.to(dtype) for n, g in gradients.items()})
        return {**params, **starts}, factors

    @property
    def sends_factors(self) -> bool:
        """Factors from a seed are derived by the clients, all others are sent."""
        return self.seeded_factors is None
