"""Losses by row and by client, against torch's own on the targets alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedsys.losses import (
    IGNORE,
    MANY,
    NARROW,
    client_losses,
    client_targets,
    row_hits,
    row_losses,
    row_targets,
    weightless,
)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_classes():
    logits, labels = drawn(3, 4), torch.tensor([2, IGNORE, 0])
    sums, counts = row_losses(logits, labels), row_targets(labels)
    assert counts.tolist() == [1, 0, 1]
    assert sums[0].item() == pytest.approx(-logits[0].log_softmax(0)[2].item())
    assert sums[1].item() == 0
    best = logits.argmax(1)
    assert row_hits(logits, best).tolist() == [1, 1, 1]
    assert row_hits(logits, (best + 1) % 4).tolist() == [0, 0, 0]
    assert row_hits(logits, torch.where(torch.arange(3) == 1, IGNORE, best)).tolist() == [1, 0, 1]


@pytest.mark.parametrize("classes", [2, 10, NARROW])
def test_many_rows_have_the_losses_of_each(classes: int):
    rows = 2 * MANY // classes
    logits = drawn(rows, classes).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    labels[::7] = IGNORE
    sums, counts = row_losses(logits, labels), row_targets(labels)
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(sums, expected)
    assert torch.equal(counts, (labels != IGNORE).long())
    gradients = [
        torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (sums, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_a_token_is_predicted_by_the_position_before_it():
    # Position t puts all its weight on token t + 1; those of the last position count for nothing.
    tokens = torch.tensor([[1, 4, 2], [3, 3, 0]])
    logits = F.one_hot(tokens.roll(-1, 1), 5) * 100.0
    sums, counts = row_losses(logits, tokens), row_targets(tokens)
    assert counts.tolist() == [2, 2]
    assert sums.abs().max() < 1e-20
    assert row_hits(logits, tokens).tolist() == [2, 2]
    unshifted = F.one_hot(tokens, 5) * 100.0
    assert row_hits(unshifted, tokens).tolist() == [0, 1]


def test_even_logits_cost_the_logarithm_of_the_classes():
    labels = torch.full((2, 6), 3)
    sums, counts = row_losses(torch.zeros(2, 6, 8), labels), row_targets(labels)
    assert counts.tolist() == [5, 5]
    torch.testing.assert_close(sums, torch.full((2,), 5 * math.log(8)))


def test_silent_tokens_have_no_weight():
    logits, labels = drawn(2, 5, 7), torch.tensor([[1, 2, 3, 4, 5], [6, 0, 1, 2, 3]])
    silent = labels.clone()
    silent[0, :3] = IGNORE  # a prompt, of which position 2 still predicts the first answer
    silent[1, 3:] = IGNORE  # padding
    sums, counts = row_losses(logits, silent), row_targets(silent)
    assert counts.tolist() == [2, 2]
    for row, (first, last) in enumerate([(2, 4), (0, 2)]):
        expected = F.cross_entropy(
            logits[row, first:last], labels[row, first + 1 : last + 1], reduction="sum"
        )
        assert sums[row].item() == pytest.approx(expected.item())


def test_rows_of_one_token_and_no_rows():
    for rows in (0, 3):
        labels = torch.zeros(rows, 1, dtype=torch.int64)
        assert row_losses(drawn(rows, 1, 5), labels).tolist() == [0] * rows
        assert row_targets(labels).tolist() == [0] * rows
        assert row_targets(labels[:, 0]).tolist() == [1] * rows


def test_half_precision_is_reduced_in_float32():
    logits = drawn(4, 9).bfloat16()
    sums = row_losses(logits, torch.arange(4))
    expected = F.cross_entropy(logits.float(), torch.arange(4), reduction="none")
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)])
def test_the_parts_of_a_clients_mean_add_up(shape: tuple[int, ...]):
    logits = drawn(*shape)
    labels = torch.arange(math.prod(shape[:-1])).view(shape[:-1]) % 4
    labels[1] = IGNORE
    targets = client_targets(labels, 2)
    whole = client_losses(logits, labels, targets)
    first, rest = [0, 3], [1, 2, 4, 5]  # a row of each client, then two
    parts = [client_losses(logits[rows], labels[rows], targets) for rows in (first, rest)]
    torch.testing.assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)])
def test_each_client_has_the_mean_over_its_own_targets(shape: tuple[int, ...]):
    logits = drawn(*shape).requires_grad_()
    labels = torch.arange(math.prod(shape[:-1])).view(shape[:-1]) % 4
    labels[[1, 4]] = IGNORE
    labels[5] = IGNORE
    losses = client_losses(logits, labels, client_targets(labels, 3))
    assert losses.shape == (3,)
    for client in range(3):
        part, own = logits[2 * client : 2 * client + 2], labels[2 * client : 2 * client + 2]
        if len(shape) == 3:
            part, own = part[:, :-1].flatten(0, 1), own[:, 1:].flatten()
        if client < 2:
            expected = F.cross_entropy(part, own, ignore_index=IGNORE)
            torch.testing.assert_close(losses[client], expected)
    assert losses[2].item() == 0
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient[4:].eq(0).all()
    assert gradient.isfinite().all()


# ---- vectors to hit


def test_a_vector_costs_half_the_squared_distance():
    outputs = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    labels = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    sums, counts = row_losses(outputs, labels), row_targets(labels)
    assert sums.tolist() == [12.5, 2.0]
    assert counts.tolist() == [1, 1]


def test_vectors_without_weight_cost_nothing_and_pull_nowhere():
    outputs = drawn(4, 3).requires_grad_()
    labels = torch.zeros(4, 3, dtype=torch.float64)
    labels[1] = weightless(labels)
    labels[2, 0] = weightless(labels)  # one entry: the others count
    sums, counts = row_losses(outputs, labels), row_targets(labels)
    assert counts.tolist() == [1, 0, 1, 1]
    assert sums[1].item() == 0
    assert sums[2].item() == pytest.approx(outputs[2, 1:].square().sum().item() / 2)
    (gradient,) = torch.autograd.grad(sums.sum(), outputs)
    known = torch.where(labels.isnan(), 0, outputs.detach())
    torch.testing.assert_close(gradient, known, rtol=0, atol=0)


def test_an_output_that_is_no_number_is_not_hidden():
    outputs = torch.tensor([[math.nan, 1.0], [0.0, 1.0]])
    sums = row_losses(outputs, torch.zeros(2, 2))
    assert sums[0].isnan()
    assert sums[1].item() == 0.5


def test_each_client_has_the_mean_over_its_own_vectors():
    outputs, labels = drawn(6, 3), drawn(6, 3) + 1
    labels[[1, 4, 5]] = math.nan
    losses = client_losses(outputs, labels, client_targets(labels, 3))
    each = (outputs - labels).square().sum(1) / 2
    torch.testing.assert_close(losses[0], each[0])
    torch.testing.assert_close(losses[1], (each[2] + each[3]) / 2)
    assert losses[2].item() == 0


def test_distances_are_taken_in_the_finer_precision():
    fine = drawn(3, 2)
    assert row_losses(fine, fine).dtype == torch.float64
    assert row_losses(fine.float(), fine.float()).dtype == torch.float32
    assert row_losses(fine.bfloat16(), fine.bfloat16()).dtype == torch.float32


def test_what_has_no_weight_depends_on_the_kind_of_label():
    assert weightless(torch.tensor([2])) == IGNORE
    assert math.isnan(weightless(torch.zeros(1, 2)))
