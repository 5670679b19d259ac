"""pfl-research 0.6: its federated averaging over its simulated backend, in one process."""

from itertools import count
from typing import Any

import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]
from pfl.algorithm.base import NNAlgorithmParams  # type: ignore[import-not-found]
from pfl.algorithm.federated_averaging import (  # type: ignore[import-not-found]
    FederatedAveraging,
)
from pfl.callback.base import TrainingProcessCallback  # type: ignore[import-not-found]
from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
from pfl.data.pytorch import PyTorchTensorDataset  # type: ignore[import-not-found]
from pfl.hyperparam import NNTrainHyperParams  # type: ignore[import-not-found]
from pfl.metrics import Metrics, Weighted  # type: ignore[import-not-found]
from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.pace import Pace, serve
from benchmarks.plain import make_optimizer, trained_of, wrapped
from benchmarks.work import Work


class Timekeeper(TrainingProcessCallback):  # type: ignore[misc]
    """Hears of every round."""

    def __init__(self, pace: Pace, trained: dict[str, nn.Parameter]) -> None:
        self.pace, self.trained = pace, trained
        self.before = self._values()

    def on_train_begin(self, *, model: Any) -> Any:
        """Start the clock."""
        self.pace.start()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Any]:
        """Stop the clock, and start it again for the next round."""
        before, self.before = self.before, self._values()
        self.pace.stop(before, self.before)
        self.pace.start()
        return False, Metrics()

    def _values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trained.items()}


def run(work: Work, pace: Pace) -> None:
    """Train until ``pace`` has had enough."""
    model: Any = wrapped(work.model, work.noise)
    trained = trained_of(model)
    model.loss = lambda x, y: F.cross_entropy(model(x), y)
    model.metrics = lambda x, y: {"loss": Weighted(0.0, len(x))}  # the loss would cost a pass
    rounds, cohort, _, batch = work.plan.shape

    def local(parameters: Any, lr: float) -> Optimizer:
        return make_optimizer([p for p in parameters if p.requires_grad], lr, work.noise, batch)

    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=_data(work), val_data=None),
        model=PyTorchModel(model, local, SGD(trained.values(), 1.0)),
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=batch
        ),
        callbacks=[Timekeeper(pace, trained)],
        send_metrics_to_platform=False,
    )


def _data(work: Work) -> Any:
    """Return the clients in the order of the plan, each with its rows in their order."""
    clients = work.plan.flatten(2).flatten(0, 1)
    turn = count()

    def dataset(client: int) -> Any:
        rows = clients[client]
        return PyTorchTensorDataset((work.inputs[rows], work.labels[rows]), user_id=str(client))

    return FederatedDataset(dataset, lambda: next(turn))


if __name__ == "__main__":
    serve(run)
