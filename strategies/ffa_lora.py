"""FFA-LoRA: A is drawn once from the shared seed and frozen; B is averaged.

    B <- B + eta sum_n w_n (B_n - B),      so   mean_n(B_n A) = mean_n(B_n) A   exactly

Symbols: A frozen and B trained factor of ``adapter=ffa``, eta server_lr, w_n by examples or
uniform. Half of the factors travel; noise for privacy enters W linearly.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
https://arxiv.org/abs/2403.12313, Section 4. A has a seed of its own in every layer; the Fed-SB
authors' code draws the same A for all layers of a shape.
"""

from dataclasses import dataclass

from fedsys.strategy import Strategy


@dataclass(kw_only=True)
class FFALoRA(Strategy):
    """Averages B, by the base's FedAvg."""
