"""Private training of a cohort: gradients by row, their clipping, their noise."""

import copy
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from clients import private
from clients.cohort import Task, train_cohort
from clients.private import Private, clipped_sums, private_gradients
from clients.training import LocalTraining
from fedsys.adapters import FFA, Adapter, Full, LoRA, LoRASB, LoRAXS
from fedsys.adapters.lora_sb import clipped_gradients, summed_gradients
from fedsys.adapters.lowrank import LowRank
from fedsys.cohort import CohortModel, row_gradients
from fedsys.data import TensorExamples
from fedsys.losses import client_losses, client_targets
from fedsys.params import Layout, norm
from fedsys.privacy.noise import SeededStream, grid
from tests.cohorts import CPU, examples_of, network, texts, vectors

SGD = LocalTraining(lr=0.5, batch_size=4)
ADAPTERS: dict[str, Adapter] = {
    "full": Full(),
    "lora": LoRA(rank=2, alpha=4),
    "ffa": FFA(rank=2, alpha=4),
    "lora_sb": LoRASB(rank=2),
    "lora_xs": LoRAXS(rank=2),
}
CASES = [
    *(("mlp", name) for name in ADAPTERS),
    *(("bert", name) for name in ADAPTERS),
    ("cnn", "full"),
    ("vit", "full"),
    ("vit", "lora"),
    ("llama", "lora_sb"),
    ("gpt2", "lora"),
]


def cohort_of(model: str, adapter: str) -> CohortModel:
    built = network(model)
    ADAPTERS[adapter].attach(built, 3)
    cohort = CohortModel(built.double())
    # Factors that begin at zero would hide half of the gradients.
    draw = torch.Generator().manual_seed(4)
    noise = torch.randn(cohort.layout.size, generator=draw, dtype=torch.float64)
    cohort.initial = cohort.initial + 0.1 * noise
    return cohort


def double_batch(model: str, rows: int):
    batch = examples_of(model, rows, torch.float64).batch(torch.arange(rows))
    return batch


def stub(rate: float = 1.0, lot: float = 1.0, z: float = 0.0, clip: float = 1.0, name: int = 0):
    return Private(clip, z, rate, lot, SeededStream(0, "test", name))


@pytest.mark.parametrize(("model", "adapter"), CASES)
def test_a_rows_gradient_is_that_of_the_row_alone(model, adapter):
    cohort = cohort_of(model, adapter)
    batch = double_batch(model, 5)
    labels = batch.pop("labels")
    _, gradients = row_gradients(cohort, cohort.initial.expand(5, -1), batch, labels)
    found = torch.cat(gradients, 1)
    for row in range(5):
        flat = cohort.initial[None].clone().requires_grad_()
        cohort.bind(cohort.layout.unpack(flat))
        inputs = {name: value[row : row + 1] for name, value in batch.items()}
        leaves = {n: nn.Parameter(p) for n, p in cohort.layout.unpack(flat.detach()).items()}
        cohort.bind(leaves)
        label = labels[row : row + 1]
        loss = client_losses(cohort(**inputs), label, client_targets(label, 1)).sum()
        alone = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        expected = torch.cat([gradient.flatten() for gradient in alone])
        assert expected.norm() > 0
        assert (found[row] - expected).norm() <= 1e-6 * expected.norm()


class Chain(nn.Module):
    """An adapted layer as modules that are called, which Opacus' hooks need."""

    def __init__(self, layer: LowRank) -> None:
        super().__init__()
        self.base, self.A, self.R, self.B = layer.base, layer.A, layer.R, layer.B
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.B(self.R(self.A(x)))


def chained(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRank):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Chain(module))
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus' own
@pytest.mark.parametrize("adapter", ["full", "lora_sb"])
def test_one_client_is_opacus_without_noise(adapter):
    """Several steps of Opacus' own optimizer over its own gradients by row, on the same lots."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    cohort, plain = cohort_of("mlp", adapter), network("mlp")
    ADAPTERS[adapter].attach(plain, 3)
    plain = chained(plain.double())
    state = cohort.layout.unpack(cohort.initial)
    plain.load_state_dict(dict(state), strict=False)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert list(trained) == list(state)
    sampled = GradSampleModule(plain, loss_reduction="sum")
    inner = torch.optim.SGD(list(trained.values()), lr=0.5, momentum=0.9)
    optimizer = DPOptimizer(
        inner, noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=4, loss_reduction="mean"
    )
    # Long gradients: Opacus adds 1e-6 to their norms before it divides by them.
    examples = replace(vectors(20, torch.float64), scale=torch.tensor(10.0))
    lots = [[0, 3, 4, 9], [5], [7, 8, 1, 2, 6, 10, 11], [19, 4]]
    plan = torch.full((len(lots), 7), -1)
    for step, lot in enumerate(lots):
        plan[step, : len(lot)] = torch.tensor(lot)
        batch = examples.batch(torch.tensor(lot))
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(sampled(batch["x"]), batch["labels"], reduction="sum")
        losses.backward()
        optimizer.step()
    training = replace(SGD, momentum=0.9)
    guarded = (stub(lot=4.0, clip=0.3),)
    task = Task(cohort, examples, training, lambda w, x: {}, CPU, private=guarded)
    found, _ = train_cohort(task, cohort.initial, [plan], 0.5)
    expected = torch.cat([p.detach().flatten() for p in trained.values()])
    moved = (expected - cohort.initial).norm()
    assert moved > 0
    assert (found[0] - expected).norm() <= 1e-6 * moved


def test_clients_together_are_clients_one_by_one():
    cohort, examples = cohort_of("mlp", "lora"), vectors(30, torch.float64)

    def trained(clients: list[int]) -> Tensor:
        guards = tuple(stub(0.4, 4.0, 0.7, name=k) for k in clients)
        shards = [torch.arange(10 * k, 10 * k + 10 - 2 * k) for k in clients]
        plans = [g.lots(rows, 3 + k) for g, rows, k in zip(guards, shards, clients, strict=True)]
        task = Task(cohort, examples, SGD, lambda w, x: {}, CPU, private=guards)
        return train_cohort(task, cohort.initial, plans, 0.5)[0]

    together = trained([0, 1, 2])
    for k in range(3):
        alone = trained([k])[0]
        moved = (alone - cohort.initial).norm()
        assert moved > 0
        assert (together[k] - alone).norm() <= 1e-10 * moved


def test_passes_of_few_rows_add_up():
    cohort, batch = cohort_of("mlp", "full"), double_batch("mlp", 9)
    owner, norms = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]), torch.tensor([0.1, 0.2, 0.3])
    params, cells = cohort.initial.repeat(3, 1), torch.zeros(3).double()

    def summed(*parts: slice) -> Tensor:
        batches = [({n: v[part] for n, v in batch.items()}, owner[part]) for part in parts]
        return clipped_sums(cohort, params, batches, norms.double(), cells)

    whole, parts = summed(slice(9)), summed(slice(2), slice(2, 2), slice(2, 9))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert whole.norm(dim=1).min() > 0


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_lot_in_passes_by_length_is_the_lot_in_one(model: str, monkeypatch: pytest.MonkeyPatch):
    cohort, examples = cohort_of(model, "lora_sb"), texts(24, labelled=model == "bert")
    guards = (stub(lot=8.0, clip=0.05), stub(lot=4.0, clip=0.1, name=1))
    task = Task(cohort, examples, SGD, lambda w, x: {}, CPU, private=guards)
    plans = [torch.arange(16).view(2, 8), torch.tensor([[16, 17, 18, -1], [-1, 19, 20, 21]])]

    def trained(overhead: int) -> Tensor:
        monkeypatch.setattr("clients.passes.OVERHEAD", {"cpu": overhead})
        return train_cohort(task, cohort.initial, plans, 0.5)[0]

    with mock.patch.object(private, "row_gradients", wraps=private.row_gradients) as ours:
        whole = trained(10**6)
        assert ours.call_count == 2  # of two steps
        parts = trained(0)
        assert ours.call_count > 6
    moved = (whole - cohort.initial).norm(dim=1)
    assert moved.min() > 0
    assert ((parts - whole).norm(dim=1) <= 1e-10 * moved).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_no_row_moves_the_sum_by_more_than_its_clipping_norm(dtype, scale):
    cohort = CohortModel(network("mlp").to(dtype))
    batch = vectors(8, dtype).batch(torch.arange(8))
    batch["x"] = (batch["x"] * scale).to(dtype)
    params = cohort.initial.to(dtype)[None]
    clip, cell = torch.tensor([0.25]).double(), torch.tensor([grid(0.25)]).double()
    sums = [
        clipped_sums(cohort, params, [({n: v[:k] for n, v in batch.items()}, owner)], clip, cell)
        for k, owner in ((k, torch.zeros(k, dtype=torch.int64)) for k in range(1, 9))
    ]
    before = torch.zeros_like(sums[0])
    for total in sums:
        assert (total - before).norm() <= 0.25 * (1 + 1e-12)
        before = total


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_row_among_very_many_moves_the_sum_by_no_more(kind):
    """Before many small rows, one more large one makes a sum in float32 move by twice its norm."""
    small, gradients = -0.00018, torch.ones(8193, 1)
    gradients[4097:] = small
    cohort = CohortModel(network("mlp"))
    cohort.layout = Layout({"w": torch.Size([1])}, kind)
    clip, cell = torch.tensor([1.0]).double(), torch.tensor([grid(1.0)]).double()

    def total(rows: Tensor) -> Tensor:
        batch = {"x": rows.to(kind), "labels": torch.zeros(len(rows), dtype=torch.int64)}
        owner = torch.zeros(len(rows), dtype=torch.int64)
        given = mock.patch.object(
            private, "row_gradients", lambda *args: (None, [args[2]["x"].clone()])
        )
        with given:
            return clipped_sums(cohort, torch.zeros(1, 1, dtype=kind), [(batch, owner)], clip, cell)

    owner = torch.zeros(len(gradients), dtype=torch.int64)
    naive = [torch.zeros(1).index_add_(0, owner[k:], gradients[k:, 0]).item() for k in (0, 1)]
    assert naive[0] - naive[1] == pytest.approx(2.0, abs=0.1)  # what is at stake
    assert (total(gradients) - total(gradients[1:])).item() == 1.0


def test_a_gradient_that_is_not_finite_counts_as_zero():
    cohort, batch = cohort_of("mlp", "full"), double_batch("mlp", 3)
    owner, clip = torch.zeros(3, dtype=torch.int64), torch.tensor([1.0]).double()
    others = {n: v[1:] for n, v in batch.items()}
    cell = torch.zeros(1).double()
    expected = clipped_sums(cohort, cohort.initial[None], [(others, owner[1:])], clip, cell)
    batch["x"][0] = math.nan
    found = clipped_sums(cohort, cohort.initial[None], [(batch, owner)], clip, cell)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def noise_of(z: float, name: int) -> Tensor:
    """Return the gradient of an empty lot of 100,000 and more numbers."""
    model = nn.Linear(400, 300).double()
    model.heads = ()
    cohort = CohortModel(model)
    empty = TensorExamples(torch.zeros(1, 400), torch.zeros(1, dtype=torch.int64))
    batch = empty.batch(torch.zeros(0, dtype=torch.int64))
    owner = torch.zeros(0, dtype=torch.int64)
    guards = [stub(lot=8.0, z=z, clip=0.5, name=name), stub(lot=2.0, z=z, name=name + 1)]
    return private_gradients(cohort, cohort.initial.repeat(2, 1), [(batch, owner)], guards)


def test_noise_has_its_standard_deviation_and_clients_their_own():
    noise = noise_of(1.5, 10)
    assert noise.shape[1] >= 100_000
    # std = z C / lot, within 1 %; correlation of independent numbers is 1 / sqrt(n) = .003
    assert noise[0].std().item() == pytest.approx(1.5 * 0.5 / 8, rel=0.01)
    assert noise[1].std().item() == pytest.approx(1.5 / 2, rel=0.01)
    assert abs(torch.corrcoef(noise)[0, 1].item()) < 0.015


def test_half_the_noise_would_be_noticed():
    assert noise_of(0.75, 20)[0].std().item() != pytest.approx(1.5 * 0.5 / 8, rel=0.01)


def test_an_empty_lot_is_a_step_of_noise_alone():
    cohort, examples = cohort_of("mlp", "lora"), vectors(3, torch.float64)
    plan = torch.full((2, 1), -1)
    task = Task(cohort, examples, SGD, lambda w, x: {}, CPU, private=(stub(lot=2.0, z=1.0),))
    moved, losses = train_cohort(task, cohort.initial, [plan], 0.5)
    assert losses.isnan().all()  # of private rows nothing is known
    expected = 0.5 / 2 * math.sqrt(2 * cohort.layout.size)  # two steps of lr z C / lot
    assert (moved[0] - cohort.initial).norm().item() == pytest.approx(expected, rel=0.3)
    silent = replace(task, private=(stub(lot=2.0),))
    torch.testing.assert_close(
        train_cohort(silent, cohort.initial, [plan], 0.5)[0][0], cohort.initial
    )


def test_what_a_strategy_adds_is_neither_clipped_nor_lost():
    cohort, examples = cohort_of("mlp", "lora"), vectors(3, torch.float64)
    pull = {
        name: torch.full_like(p, 7.0) for name, p in cohort.layout.unpack(cohort.initial).items()
    }
    plan = torch.full((1, 1), -1)
    guards = (stub(clip=0.01),)
    task = Task(cohort, examples, SGD, lambda w, x: {n: p[None] for n, p in pull.items()}, CPU)
    moved, _ = train_cohort(replace(task, private=guards), cohort.initial, [plan], 0.5)
    torch.testing.assert_close(moved[0], cohort.initial - 0.5 * 7.0)


def test_what_is_frozen_stays_as_it_was():
    cohort, examples = cohort_of("bert", "lora_sb"), examples_of("bert", 12)
    trainable = set(cohort.layout.shapes)
    frozen = {
        n: p.detach().clone() for n, p in cohort.model.named_parameters() if n not in trainable
    }
    guard = stub(0.5, 6.0, 1.0)
    plan = guard.lots(torch.arange(12), 3)
    train_cohort(
        Task(cohort, examples, SGD, lambda w, x: {}, CPU, private=(guard,)),
        cohort.initial,
        [plan],
        0.5,
    )
    now = dict(cohort.model.named_parameters())
    assert frozen
    assert all(torch.equal(value, now[name]) for name, value in frozen.items() if name in now)


def test_lots_are_poisson():
    rows = torch.arange(100, 140)
    lots = stub(0.1, name=5).lots(rows, 5_000)
    sizes = (lots >= 0).sum(1).double()
    # Binomial(40, .1): mean 4, variance 3.6; five standard errors of 5,000 lots
    assert sizes.mean().item() == pytest.approx(4.0, abs=5 * math.sqrt(3.6 / 5_000))
    assert sizes.var().item() == pytest.approx(3.6, rel=0.12)
    assert (sizes == 0).any()  # (.9)^40 = 1.5 %
    counts = torch.bincount(lots[lots >= 0], minlength=140)[100:].double()
    assert counts.sum() == sizes.sum()
    assert (counts - 500).abs().max() <= 5 * math.sqrt(450)
    assert all(len(set(own)) == len(own) for own in (lot[lot >= 0].tolist() for lot in lots[:50]))


def test_fixed_batches_would_be_noticed():
    lots = SGD.batches(torch.arange(40), 0, 1, 0)
    sizes = (lots >= 0).sum(1).double()
    assert sizes.var().item() != pytest.approx(3.6, rel=0.12)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_lot_of_everyone_is_all_rows(steps):
    rows = torch.tensor([4, 9, 2])
    assert stub(1.0).lots(rows, steps).tolist() == [rows.tolist()] * steps


def test_gradients_of_the_base_are_clipped_over_all_layers():
    cohort = cohort_of("mlp", "lora_sb")
    cohort.bind(cohort.layout.unpack(cohort.initial[None]))
    examples = vectors(6, torch.float64)
    rows = [examples.batch(torch.tensor([row])) for row in range(6)]
    alone = [summed_gradients(cohort, [copy.copy(row)]) for row in rows]
    clip = sorted(map(norm, alone))[2]  # three of six are longer
    found = clipped_gradients(cohort, rows, clip)
    for layer, total in found.items():
        expected = sum(g[layer] * min(1.0, clip / norm(g)) for g in alone)
        torch.testing.assert_close(total, expected)
