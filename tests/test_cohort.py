"""K clients in one pass are K clients one by one."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from clients import cohort as local
from clients.cohort import Task, train_cohort
from clients.passes import Passes, by_column, by_row
from clients.training import LocalTraining
from fedsys.adapters import FFA, Adapter, Full, LoRA, LoRASB, LoRAXS
from fedsys.cohort import CohortModel
from fedsys.data import TokenExamples
from fedsys.losses import IGNORE, client_losses, client_targets
from strategies import FedProx
from tests.cohorts import (
    CLASSES,
    CPU,
    SIZES,
    TOLERANCE,
    VOCABULARY,
    Plain,
    distance,
    examples_of,
    network,
    plan,
    texts,
    together,
    trainable,
    vectors,
)

DTYPES = [torch.float32, torch.float64]


class Head:
    """Only the output layer is trained."""

    def attach(self, model: nn.Module, seed: int) -> None:
        model.requires_grad_(False)
        for name in ("head", "backbone.classifier", "backbone.lm_head"):
            if name in dict(model.named_modules()):
                model.get_submodule(name).requires_grad_(True)


ADAPTERS: dict[str, Adapter] = {
    "full": Full(),
    "lora": LoRA(rank=2, alpha=4),
    "ffa": FFA(rank=2, alpha=4),
    "lora_sb": LoRASB(rank=2),
    "lora_xs": LoRAXS(rank=2),
    "head": Head(),
}
# What torch takes, in the words of torch.
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}),
}


def training_of(name: str, **more: object) -> LocalTraining:
    kind, words = OPTIMIZERS[name]
    ours = dict(words)
    if "betas" in ours:
        ours["beta1"], ours["beta2"] = ours.pop("betas")
    return LocalTraining(optimizer=kind.__name__.lower(), batch_size=8, **(ours | more))


def attached(model: str, adapter: str, dtype: torch.dtype) -> nn.Module:
    built = network(model)
    ADAPTERS[adapter].attach(built, seed=3)
    return built.to(dtype)


def check(model: str, adapter: str, optimizer: str, dtype: torch.dtype, **more: object) -> None:
    """Compare one pass, passes of one client each, and the plain loop."""
    built, training = attached(model, adapter, dtype), training_of(optimizer, **more)
    examples, batches = examples_of(model, sum(SIZES), dtype), plan(training)
    kind, words = OPTIMIZERS[optimizer]
    plain = Plain(built, examples, lambda params: kind(params, **words))
    start, found = trainable(built), together(built, examples, training, batches)
    for client, own in enumerate(batches):
        expected, loss = plain.train(own)
        (alone,), alone_loss = together(built, examples, training, [own])
        assert distance(alone, expected, start) <= TOLERANCE[dtype]
        assert distance(found[0][client], expected, start) <= TOLERANCE[dtype]
        assert found[1][client].item() == pytest.approx(loss, rel=1e-5)
        assert alone_loss.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_mlp(adapter: str, optimizer: str, dtype: torch.dtype):
    check("mlp", adapter, optimizer, dtype, epochs=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        *[("cnn", a) for a in ("full", "head")],
        *[(m, a) for m in ("vit", "bert", "llama", "gpt2") for a in ADAPTERS],
    ],
)
def test_every_model(model: str, adapter: str, optimizer: str, dtype: torch.dtype):
    check(model, adapter, optimizer, dtype, epochs=1)


@pytest.mark.parametrize("steps", [1, 3, 9])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_number_of_steps_instead_of_epochs(model: str, steps: int):
    check(model, "full", "momentum", torch.float64, steps=steps)


def test_clients_keep_their_places_whatever_their_sizes():
    built, training = attached("mlp", "full", torch.float64), training_of("momentum")
    examples, batches = vectors(61, torch.float64), plan(training)
    found, losses = together(built, examples, training, batches)
    order = [2, 0, 3, 1]
    again, again_losses = together(built, examples, training, [batches[k] for k in order])
    for place, client in enumerate(order):
        assert all(torch.equal(again[place][n], found[client][n]) for n in found[client])
        assert again_losses[place] == losses[client]


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_client_that_has_finished_stands_still(optimizer: str):
    # The first client takes one step. Whoever trains on beside it, for however long, it stays.
    built, training = attached("mlp", "full", torch.float64), training_of(optimizer)
    examples, batches = vectors(60, torch.float64), plan(training, (8, 52))
    (short, _), _ = together(built, examples, training, batches)
    (same, _), _ = together(built, examples, training, [batches[0], batches[1][:1]])
    start = trainable(built)
    assert distance(short, same, start) <= 1e-10


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_any_chunk_of_a_hundred_clients(chunk: int):
    built, training = attached("mlp", "lora_sb", torch.float64), training_of("adam", epochs=2)
    sizes = [1 + (7 * client) % 23 for client in range(100)]
    examples, batches = vectors(sum(sizes), torch.float64), plan(training, sizes)
    plain = Plain(built, examples, lambda p: torch.optim.Adam(p, **OPTIMIZERS["adam"][1]))
    start, found = trainable(built), []
    for first in range(0, 100, chunk):
        found += together(built, examples, training, batches[first : first + chunk])[0]
    for client in range(0, 100, 9):
        assert distance(found[client], plain.train(batches[client])[0], start) <= 1e-10


# ---- step sizes that vary


def factors_of(schedule: str, warmup: float, steps: int) -> list[float]:
    """Return lr's factors: rising evenly to 1, which the next step has, then along the curve."""
    rising = int(warmup * steps)
    left = steps - rising
    curve = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1 - t / left,
        "cosine": lambda t: (1 + math.cos(math.pi * t / left)) / 2,
    }[schedule]
    return [(t + 1) / (rising + 1) for t in range(rising)] + [curve(t) for t in range(left)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("schedule", "warmup"), [("linear", 0.0), ("cosine", 0.0), ("constant", 0.5), ("cosine", 0.3)]
)
def test_schedule_within_a_round(schedule: str, warmup: float, optimizer: str):
    # Clients of 2 and of 10 steps share a pass, and each has its own step size in it.
    training = training_of(optimizer, epochs=2, schedule=schedule, warmup=warmup)
    built = attached("mlp", "full", torch.float64)
    examples, batches = vectors(sum(SIZES), torch.float64), plan(training)
    kind, words = OPTIMIZERS[optimizer]
    plain = Plain(built, examples, lambda params: kind(params, **words))
    found, _ = together(built, examples, training, batches, lr=0.7 * training.lr)
    for client, own in enumerate(batches):
        lrs = [0.7 * training.lr * f for f in factors_of(schedule, warmup, len(own))]
        assert distance(found[client], plain.train(own, lrs)[0], trainable(built)) <= 1e-10


# ---- gradients of an algorithm's own


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_proximal_term(adapter: str, optimizer: str):
    built, training = attached("mlp", adapter, torch.float64), training_of(optimizer, epochs=2)
    examples, batches = vectors(sum(SIZES), torch.float64), plan(training)
    kind, words = OPTIMIZERS[optimizer]
    plain = Plain(built, examples, lambda params: kind(params, **words), mu=0.8)
    prox = FedProx(mu=0.8)
    found, losses = together(built, examples, training, batches, local_gradient=prox.local_gradient)
    for client, own in enumerate(batches):
        expected, loss = plain.train(own)
        assert distance(found[client], expected, trainable(built)) <= 1e-10
        assert losses[client].item() == pytest.approx(loss, rel=1e-5)  # without the term


# ---- rows that fill up


def test_rows_without_targets_have_no_influence():
    built = attached("bert", "full", torch.float64)
    cohort, examples = CohortModel(built), texts(8, labelled=True)
    batch = examples.batch(torch.tensor([0, 1, 2, 3, 4, 5]))
    labels = batch.pop("labels")
    labels[[2, 5]] = IGNORE

    def gradients(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        flat = cohort.initial.repeat(2, 1).requires_grad_()
        cohort.bind(cohort.layout.unpack(flat))
        losses = client_losses(cohort(**inputs), labels, client_targets(labels, 2))
        return torch.autograd.grad(losses.sum(), flat)[0]

    found = gradients(batch, labels)
    other = {name: value.clone() for name, value in batch.items()}
    other["input_ids"][[2, 5]] = 7
    assert torch.equal(gradients(other, labels), found)
    kept = torch.tensor([0, 1, 3, 4])
    fewer = gradients({name: value[kept] for name, value in batch.items()}, labels[kept])
    torch.testing.assert_close(fewer, found, rtol=0, atol=1e-14)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_client_is_filled_up_with_its_own_rows(broken: int):
    # What is broken in one client's data breaks no other client.
    built, training = attached("mlp", "full", torch.float64), training_of("sgd")
    examples, batches = vectors(20, torch.float64), plan(training, (2, 5, 13))
    expected, _ = together(built, examples, training, batches)
    examples.x[batches[broken][batches[broken] >= 0]] = float("nan")
    found, _ = together(built, examples, training, batches)
    for client in range(3):
        for name, value in found[client].items():
            assert value.isnan().any() if client == broken else value.equal(expected[client][name])


def test_filling_up_makes_no_row_longer():
    examples = texts(20, labelled=True)
    lengths = examples.offsets.diff()
    short = (lengths <= 3).nonzero().flatten()
    rows = torch.stack([short[:2], torch.tensor([short[2], -1])])
    ((filled, absent),) = by_column(examples, rows, CPU).parts
    assert absent.sum() == 1
    assert lengths[filled].max() == lengths[short[:3]].max()


# ---- steps in many passes


@pytest.fixture(params=["by_column", "by_row"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let passes cost nothing, and have them go one way wherever that can be."""
    monkeypatch.setattr("clients.passes.OVERHEAD", {"cpu": 0})
    monkeypatch.setattr("fedsys.cohort.COPYING", 0.0 if request.param == "by_row" else 1e9)
    return str(request.param)


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("adapter", ["lora_sb", "full"])
def test_a_step_in_many_passes_is_the_step_in_one(
    model: str, adapter: str, way: str, monkeypatch: pytest.MonkeyPatch
):
    counts: list[int] = []
    kind = local.by_column if way == "by_column" else local.by_row

    def counted(*args: Any) -> Any:
        found = kind(*args)
        counts.append(len(found.parts))
        return found

    ours = mock.Mock(wraps=local._gradients_by_row)
    monkeypatch.setattr(f"clients.cohort.{way}", counted)
    monkeypatch.setattr("clients.cohort._gradients_by_row", ours)
    check(model, adapter, "adam", torch.float64)
    assert max(counts) >= 4
    assert ours.called == (way == "by_row")


@pytest.mark.parametrize("first", [0, 1])
def test_steps_may_go_either_way(first: int, monkeypatch: pytest.MonkeyPatch):
    calls = itertools.count(first)

    def every_other(*args: Any) -> Passes:
        found = by_row(*args)
        return found if next(calls) % 2 == 0 else Passes(found.parts)  # of no known cost

    monkeypatch.setattr("clients.passes.OVERHEAD", {"cpu": 0})
    monkeypatch.setattr("fedsys.cohort.COPYING", 0.0)
    monkeypatch.setattr("clients.cohort.by_row", every_other)
    check("bert", "lora_sb", "momentum", torch.float64, epochs=3)
    assert next(calls) >= 6


@pytest.mark.usefixtures("way")
def test_labels_are_flipped_in_every_pass_and_of_the_malicious_alone():
    built, training = attached("bert", "lora_sb", torch.float64), training_of("sgd")
    examples, batches = texts(sum(SIZES), labelled=True), plan(training)
    flipped = torch.tensor([True, False, True, False])
    labels = examples.labels.clone()
    for rows in (batches[0], batches[2]):
        own = rows[rows >= 0].unique()
        labels[own] = CLASSES - 1 - labels[own]
    expected, _ = together(built, replace(examples, labels=labels), training, batches)
    cohort = CohortModel(copy.deepcopy(built))
    task = Task(cohort, examples, training, lambda w, x: {}, CPU, flipped, CLASSES)
    trained, _ = train_cohort(task, cohort.initial, batches, training.lr)
    for found, right in zip(map(cohort.layout.unpack, trained), expected, strict=True):
        assert distance(found, right, trainable(built)) <= 1e-10


@pytest.mark.usefixtures("way")
def test_a_token_that_is_broken_breaks_its_own_client_only():
    built, training = attached("bert", "lora_sb", torch.float64), training_of("sgd")
    examples, batches = texts(sum(SIZES), labelled=True), plan(training)
    broken = VOCABULARY - 1
    tokens = examples.tokens.clamp(max=broken - 1)
    expected, _ = together(built, replace(examples, tokens=tokens), training, batches)
    tokens[0] = broken  # in the only row of the first client
    built.get_submodule("backbone.bert.embeddings.word_embeddings").weight.data[broken] = math.nan
    found, _ = together(built, replace(examples, tokens=tokens), training, batches)
    assert all(value.isnan().any() for value in found[0].values())
    for client in (1, 2, 3):
        assert distance(found[client], expected[client], trainable(built)) <= 1e-10


class Scale(nn.Module):
    """A factor on what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Scaled(nn.Module):
    """A frozen model whose logits have a trained factor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model.requires_grad_(False), Scale()

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.scale(self.model(**inputs))
        return logits


@pytest.mark.usefixtures("way")
def test_a_number_by_itself_is_trained_as_well():
    built, training = Scaled(network("bert")), training_of("sgd")
    examples, batches = texts(sum(SIZES), labelled=True), plan(training)
    found, _ = together(built, examples, training, batches)
    for client, batch in enumerate(batches):
        ((alone,), _) = together(built, examples, training, [batch])
        assert distance(found[client], alone, trainable(built)) <= 1e-10


def test_a_row_of_one_token_has_nothing_to_predict():
    training = training_of("momentum")
    built = attached("llama", "lora", torch.float64)
    examples = TokenExamples(
        tokens=torch.tensor([3, 4, 5, 6], dtype=torch.int32),
        offsets=torch.tensor([0, 1, 4]),
        pad_id=0,
    )
    found, losses = together(built, examples, training, plan(training, (1, 1)))
    start = trainable(built)
    assert losses[0] == 0
    assert losses[1] > 0
    assert all(torch.equal(found[0][n], start[n]) for n in start)


# ---- which inputs have rows


class Table(nn.Module):
    """One matrix a position, handed out without any input."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.randn(tokens, 2, 3))

    def forward(self) -> Tensor:
        return self.entries


class Positions(nn.Module):
    """Adds what it has learned of positions, in the ways that models do."""

    def __init__(self, form: str, tokens: int = 4) -> None:
        super().__init__()
        self.form, self.tokens = form, tokens
        self.embed = nn.Linear(64 // tokens, 6)
        self.position = nn.Embedding(tokens, 6)
        self.place = nn.Linear(6, 6)
        self.table = Table(tokens)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1).unflatten(1, (self.tokens, -1)))
        places = torch.arange(self.tokens)
        if self.form == "batched":
            places = places[None]
        elif self.form == "by row":
            places = places.expand(len(x), -1)
        elif self.form == "table":
            x = (x.unflatten(-1, (2, 3)) + self.table()).flatten(-2)
        elif self.form == "keyword":
            return self.head((x + self.position(input=places)).tanh().mean(1))
        position = self.position(places)
        if self.form == "projected":
            position = self.place(position)
        return self.head((x + position).tanh().mean(1))


@pytest.mark.parametrize("tokens", [2, 4, 8, 16])
@pytest.mark.parametrize("form", ["flat", "batched", "by row", "keyword", "table"])
def test_as_many_positions_as_rows(form: str, tokens: int):
    # Positions are as many as rows of the pass, or of a client, or as clients.
    torch.manual_seed(0)
    built = Positions(form, tokens).double().requires_grad_()
    built.place.requires_grad_(False)
    for size, clients in [(4, 1), (4, 2), (4, 4), (8, 2), (2, 2), (1, 4), (16, 3)]:
        training = LocalTraining(lr=0.1, batch_size=size)
        examples = vectors(size * clients, torch.float64)
        batches = plan(training, [size] * clients)
        plain = Plain(built, examples, lambda params: torch.optim.SGD(params, lr=0.1))
        found, _ = together(built, examples, training, batches)
        for own, result in zip(batches, found, strict=True):
            assert distance(result, plain.train(own)[0], trainable(built)) <= 1e-10


@pytest.mark.parametrize("form", ["flat", "table"])
def test_a_single_entry_for_all_rows_serves_one_client_only(form: str):
    # (1, D) may be a position of each row or a row for all positions.
    built, training = Positions(form, 1).double(), LocalTraining(lr=0.1, batch_size=8)
    examples, batches = vectors(16, torch.float64), plan(training, (8, 8))
    with pytest.raises(ValueError, match=r"clients cannot share a pass"):
        together(built, examples, training, batches)
    together(built, examples, training, batches[:1])


def test_a_linear_layer_without_rows_serves_one_client_only():
    # As many positions as rows: cut into clients' parts, they would be wrong without a word.
    built, training = Positions("projected", 16).double(), LocalTraining(lr=0.1, batch_size=8)
    examples, batches = vectors(16, torch.float64), plan(training, (8, 8))
    with pytest.raises(ValueError, match=r"place.*clients cannot share a pass"):
        together(built, examples, training, batches)
    plain = Plain(built, examples, lambda params: torch.optim.SGD(params, lr=0.1))
    (alone,), _ = together(built, examples, training, batches[:1])
    assert distance(alone, plain.train(batches[0])[0], trainable(built)) <= 1e-10


class Tokens(nn.Module):
    """Treats every token as a row; ``route`` sends to a layer those tokens only that it selects."""

    def __init__(self, route: bool) -> None:
        super().__init__()
        self.route = route
        self.fc = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 8)
        if self.route:
            chosen = tokens[:, 0] > 0
            tokens = tokens.masked_scatter(chosen[:, None], self.fc(tokens[chosen]))
        else:
            tokens = self.norm(self.fc(tokens))
        return self.head(tokens.view(len(x), 8, 8).tanh().mean(1))


def test_tokens_as_rows():
    built, training = Tokens(route=False).double(), LocalTraining(lr=0.1, batch_size=8)
    examples, batches = vectors(30, torch.float64), plan(training, (3, 19, 8))
    plain = Plain(built, examples, lambda params: torch.optim.SGD(params, lr=0.1))
    found, _ = together(built, examples, training, batches)
    for own, result in zip(batches, found, strict=True):
        assert distance(result, plain.train(own)[0], trainable(built)) <= 1e-10


def test_rows_sent_to_a_layer_by_their_content_serve_one_client_only():
    built, training = Tokens(route=True).double(), LocalTraining(lr=0.1, batch_size=8)
    with pytest.raises(ValueError, match=r"fc.*clients cannot share a pass"):
        together(built, vectors(16, torch.float64), training, plan(training, (8, 8)))


class Some(nn.Module):
    """Sends through a layer those rows only whose first number is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        chosen = x[:, 0] > 0
        return x[:, :CLASSES].masked_scatter(chosen[:, None], self.fc(x[chosen]))


def test_rows_left_out_later_are_noticed():
    # The first rows, by which the layer is judged, all go through it; 6 of 8 do in the whole pass,
    # which two clients could share alike, but the third and fourth of the second do not.
    examples = vectors(8, torch.float64)
    examples.x[:, 0, 0, 0] = torch.tensor([1.0, 1, 1, 1, 1, 1, -1, -1])
    batches = [torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4, 5, 6, 7]])]
    with pytest.raises(ValueError, match=r"fc.*clients cannot share a pass"):
        together(Some().double(), examples, LocalTraining(lr=0.1, batch_size=4), batches)


# ---- models of other shapes


class Shared(nn.Module):
    """The same layers in two places, and the same weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.chain = nn.Sequential(self.fc, self.norm, nn.Tanh(), self.fc, self.norm)
        self.also = self.norm
        self.tied = nn.Linear(64, 64, bias=False)
        self.tied.weight = self.fc.weight
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.also(self.tied(self.chain(x.flatten(1)))))


class OwnTensor(nn.Module):
    """Holds tensors itself, one of them a single number, and attention beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.attention.out_proj.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(1, 2)], 1)
        x, _ = self.attention(x, x, x)
        return self.scale * self.head(self.twin(x[:, 0]).tanh())


@pytest.mark.parametrize("kind", [Shared, OwnTensor])
def test_layers_of_other_kinds(kind: type[nn.Module]):
    torch.manual_seed(0)
    built, training = kind().double(), LocalTraining(lr=0.1, momentum=0.9, batch_size=8)
    examples, batches = vectors(sum(SIZES), torch.float64), plan(training)
    plain = Plain(built, examples, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    found, _ = together(built, examples, training, batches)
    for own, result in zip(batches, found, strict=True):
        assert distance(result, plain.train(own)[0], trainable(built)) <= 1e-10


def test_the_number_of_clients_may_change_from_pass_to_pass():
    torch.manual_seed(0)
    cohort = CohortModel(network("vit"))
    x = torch.randn(12, 1, 8, 8, dtype=torch.float64)
    params = torch.randn(4, cohort.layout.size, dtype=torch.float64)

    def logits(clients: list[int]) -> Tensor:
        cohort.bind(cohort.layout.unpack(params[clients]))
        return cohort(x=torch.cat([x[3 * k : 3 * k + 3] for k in clients])).view(-1, 3, CLASSES)

    alone = {k: logits([k])[0] for k in (0, 1, 2, 3)}
    for clients in ([0, 1, 2, 3], [2], [3, 1], [0, 2, 1]):
        expected = torch.stack([alone[k] for k in clients])
        torch.testing.assert_close(logits(clients), expected, rtol=0, atol=1e-12)


def test_frozen_base_in_bfloat16():
    built = attached("bert", "lora", torch.float32)
    for p in built.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    training = training_of("adamw", epochs=2)
    base = {n: p.clone() for n, p in built.named_parameters() if not p.requires_grad}
    found, losses = together(built, texts(sum(SIZES), True), training, plan(training))
    assert base
    assert losses.isfinite().all()
    for result in found:
        assert {value.dtype for value in result.values()} == {torch.float32}
        assert distance(result, trainable(built), {n: 0 * v for n, v in result.items()}) > 1e-3


def test_frozen_tensors_inside_a_layer_move_with_the_model():
    built = Positions("flat")
    built.position.register_buffer("offset", torch.zeros(1))
    inner = built.position
    CohortModel(built).to(torch.float64)
    assert inner.offset.dtype == torch.float64


def test_batch_norm_is_refused():
    built = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="normalises each row by the others"):
        CohortModel(built)


def test_a_model_without_trainable_tensors_is_refused():
    with pytest.raises(ValueError, match=r"no trainable tensor: check adapter\.targets"):
        CohortModel(nn.Linear(2, 2).requires_grad_(False))


def test_gradient_checkpointing():
    built, training = attached("llama", "lora", torch.float64), training_of("adamw")
    examples, batches = texts(sum(SIZES), False), plan(training)
    expected, _ = together(built, examples, training, batches)
    backbone = built.backbone.train()  # checkpoints in training mode only
    enable = getattr(backbone, "activation_checkpointing_enable", None)
    (enable or backbone.gradient_checkpointing_enable)()
    found, _ = together(built, examples, training, batches)
    for mine, other in zip(found, expected, strict=True):
        assert distance(mine, other, trainable(built)) <= 1e-10
