"""Server strategies, one paper a file; each is a ``flwr.serverapp.strategy.Strategy``."""

from strategies.fed_sb import FedSB
from strategies.fedavg import FedAvg
from strategies.fedit import FedIT
from strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from strategies.fedprox import FedProx
from strategies.ffa_lora import FFALoRA

__all__ = ["FFALoRA", "FedAdagrad", "FedAdam", "FedAvg", "FedIT", "FedProx", "FedSB", "FedYogi"]
