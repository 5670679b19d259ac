"""FedIT: FedAvg on the factors of LoRA.

    A <- A + eta sum_n w_n (A_n - A),      B <- B + eta sum_n w_n (B_n - B)

The product of the means is not the mean of the products: the error is the covariance
sum_n w_n (B_n - B)(A_n - A). FedEx-LoRA and FLoRA repair it; FFA-LoRA and Fed-SB avoid it.

Symbols: A, B the factors of ``adapter=lora``, eta server_lr, w_n by examples or uniform.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644, Algorithm 1.
"""

from dataclasses import dataclass

from fedsys.strategy import Strategy


@dataclass(kw_only=True)
class FedIT(Strategy):
    """Averages A and B as they come, by the base's FedAvg."""
