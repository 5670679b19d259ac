"""FedAvg: the average of the clients' models, by their examples or uniform.

    x_{t+1} = x_t + eta * sum_{n in S_t} w_n Delta_n,
    w_n     = |D_n| / sum_{m in S_t} |D_m|   (examples)   or   1 / |S_t|   (uniform)

Symbols: x_t params, eta server_lr, S_t cohort, Delta_n update.delta, |D_n| update.num_examples.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, https://arxiv.org/abs/1602.05629, Algorithm 1.
"""

from dataclasses import dataclass

from fedsys.strategy import Strategy


@dataclass(kw_only=True)
class FedAvg(Strategy):
    """The base's own averaging under its name."""
