"""Evaluation against a plain loop."""

import copy

import pytest
import torch

from fedsys.adapters import LoRA
from fedsys.cohort import CohortModel
from fedsys.evaluate import evaluate
from tests.cohorts import CPU, Plain, examples_of, network


@pytest.mark.parametrize("size", [1, 4, 30])
@pytest.mark.parametrize("name", ["mlp", "bert", "llama"])
def test_loss_and_accuracy_over_all_targets(name: str, size: int):
    model, examples = network(name), examples_of(name, 13, torch.float64)
    LoRA(2, 4).attach(model, 0)
    plain = Plain(copy.deepcopy(model), examples, lambda params: torch.optim.SGD(params, lr=1))
    rows = torch.tensor([3, 9, 0, 12, 5, 6, 7])
    loss = hits = targets = 0.0
    for row in rows:
        batch = examples.batch(row[None])
        labels = batch.pop("labels")
        logits = plain.model(**batch)
        if labels.dim() == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        count = int((labels != -100).sum())
        loss += plain.loss(plain.model, row[None]).item() * count if count else 0.0
        hits += (logits.argmax(-1) == labels).sum().item()
        targets += count
    cohort = CohortModel(model)
    found = evaluate(cohort, cohort.initial, examples, rows, size, CPU)
    assert found["eval_loss"] == pytest.approx(loss / targets, rel=1e-12)
    assert found["eval_accuracy"] == pytest.approx(hits / targets, rel=1e-12)


def test_no_rows_are_no_loss():
    cohort = CohortModel(network("bert"))
    rows = torch.zeros(0, dtype=torch.int64)
    found = evaluate(cohort, cohort.initial, examples_of("bert", 3), rows, 4, CPU)
    assert found == {"eval_loss": 0.0, "eval_accuracy": 0.0}


def test_params_are_those_given():
    cohort = CohortModel(network("mlp"))
    rows, examples = torch.arange(20), examples_of("mlp", 20, torch.float64)
    zero = torch.zeros_like(cohort.initial)
    found = evaluate(cohort, zero, examples, rows, 8, CPU)
    assert found["eval_loss"] == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-6)
    assert evaluate(cohort, cohort.initial, examples, rows, 8, CPU) != found
