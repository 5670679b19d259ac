"""FedProx's pull back to the global model; its training is compared in test_cohort."""

import pytest
import torch

from clients.training import LocalTraining
from strategies import FedAvg, FedProx
from tests.cohorts import Federation, network, trainable, vectors


def test_gradient_is_that_of_the_proximal_term():
    start = {"w": torch.randn(3, 2, dtype=torch.float64)}
    params = {"w": torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)}
    term = 0.7 / 2 * (params["w"] - start["w"]).square().sum()
    (expected,) = torch.autograd.grad(term, params["w"])
    found = FedProx(mu=0.7).local_gradient(params, start)["w"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def run(strategy: FedAvg | FedProx, lr: float = 0.1) -> dict[str, torch.Tensor]:
    training = LocalTraining(lr=lr, batch_size=8, epochs=3)
    shards = list(torch.arange(40).split([10, 25, 5]))
    data = vectors(40, torch.float64)
    return Federation(strategy, network("mlp"), data, training, shards).run(2)[-1]


def test_without_a_pull_it_is_fedavg():
    expected, found = run(FedAvg()), run(FedProx(mu=0.0))
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_the_harder_the_pull_the_nearer_the_start():
    start = trainable(network("mlp"))

    def moved(mu: float) -> float:
        after = run(FedProx(mu=mu), lr=0.01)
        return sum((after[n] - start[n]).square().sum().item() for n in start)

    distances = [moved(mu) for mu in (0.0, 1.0, 10.0, 50.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0] / 10


def test_clients_of_flower_are_told():
    assert FedProx(mu=0.3).train_config() == {"proximal-mu": 0.3}


def test_a_push_is_refused():
    with pytest.raises(ValueError, match=r"mu must not be negative, got -0.1"):
        FedProx(mu=-0.1)
