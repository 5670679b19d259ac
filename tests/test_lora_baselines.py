"""FedIT and FFA-LoRA: what their averages are worth, by the numbers of the specification."""

import pytest
import torch
from torch import Tensor

from clients.training import LocalTraining
from fedsys.adapters import FFA, LoRA
from fedsys.params import Params
from fedsys.strategy import Strategy
from fedsys.update import Update
from strategies import FedAvg, FedIT, FFALoRA
from tests.cohorts import Federation, Plain, network, trainable, vectors

B1, B2 = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0]])
A1, A2 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
TRUE = torch.tensor([[0.5, 0.0], [0.0, 1.0]])  # the mean of the products


def mean(strategy: Strategy, clients: list[Params], counts: tuple[int, ...] = (1, 1)) -> Params:
    start = {name: torch.full_like(value, 0.25) for name, value in clients[0].items()}
    updates = [
        Update(n, {name: own[name] - start[name] for name in own}, count)
        for n, (own, count) in enumerate(zip(clients, counts, strict=True))
    ]
    direction, state = strategy.combine(iter(updates), strategy.init(start, len(clients)))
    return strategy.step(start, direction, state)[0]


def test_fedit_gives_the_product_of_the_means():
    found = mean(FedIT(), [{"A": A1, "B": B1}, {"A": A2, "B": B2}])
    product = found["B"] @ found["A"]
    assert product.tolist() == [[0.25, 0.25], [0.5, 0.5]]
    residual = TRUE - product
    assert residual.tolist() == [[0.25, -0.25], [-0.5, 0.5]]
    assert torch.linalg.matrix_rank(residual) == 1
    covariance = sum((b - found["B"]) @ (a - found["A"]) for a, b in ((A1, B1), (A2, B2))) / 2
    torch.testing.assert_close(residual, covariance)


def test_fedit_weighs_by_examples():
    found = mean(FedIT(), [{"A": A1, "B": B1}, {"A": A2, "B": B2}], (1, 3))
    assert found["A"].tolist() == [[0.25, 0.75]]
    assert found["B"].tolist() == [[0.25], [1.5]]


def test_fedit_is_exact_for_clients_that_agree():
    found = mean(FedIT(), [{"A": A1, "B": B2}] * 3, (1, 5, 9))
    torch.testing.assert_close(found["B"] @ found["A"], B2 @ A1)


def test_ffa_averages_exactly():
    a = torch.tensor([[1.0, 1.0]])
    found = mean(FFALoRA(), [{"B": B1}, {"B": B2}])
    assert (found["B"] @ a).tolist() == [[0.5, 0.5], [1.0, 1.0]]
    assert torch.equal(found["B"] @ a, (B1 @ a + B2 @ a) / 2)


@pytest.mark.parametrize(
    ("strategy", "adapter"), [(FedIT(), LoRA(3, 6)), (FFALoRA(), FFA(3, 6)), (FedAvg(), LoRA(3, 6))]
)
def test_one_client_is_central_lora(strategy: Strategy, adapter: LoRA):
    model, data = network("mlp"), vectors(30, torch.float64)
    adapter.attach(model, 0)
    training = LocalTraining(lr=0.05, optimizer="adam", batch_size=8, epochs=2)
    (after,) = Federation(strategy, model, data, training, [torch.arange(30)]).run()
    plain = Plain(model, data, lambda p: torch.optim.Adam(p, lr=0.05))
    expected, _ = plain.train(training.batches(torch.arange(30), 0, 1, 0))
    start = trainable(model)
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=1e-10)
        assert not torch.equal(after[name], start[name])


def test_ffa_sends_b_and_the_head():
    model = network("mlp")
    FFA(3, 6).attach(model, 0)
    assert {n: tuple(p.shape) for n, p in trainable(model).items()} == {
        "fc1.B.weight": (12, 3),
        "fc2.B.weight": (10, 3),
        "head.weight": (3, 10),
        "head.bias": (3,),
    }


def test_only_the_product_of_lr_and_scaling_matters_to_ffa_with_sgd():
    def weight(alpha: float, lr: float) -> Tensor:
        model = network("mlp")
        model.heads = ()
        FFA(3, alpha, targets="fc1").attach(model, 0)
        training = LocalTraining(lr=lr, batch_size=8, epochs=2)
        data = vectors(30, torch.float64)
        shards = list(torch.arange(30).split([20, 10]))
        (after,) = Federation(FFALoRA(), model, data, training, shards).run()
        return alpha / 3 * after["fc1.B.weight"] @ model.fc1.A.weight.detach()

    # B enters W times s, and its gradient has another s: lr s^2 is the step of W.
    torch.testing.assert_close(weight(6, 0.1), weight(3, 0.4), rtol=1e-9, atol=1e-12)
