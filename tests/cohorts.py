"""What tests of cohorts share: small models and data, and a plain PyTorch loop to agree with."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.cohort import LocalGradient, Task, train_cohort
from clients.training import LocalTraining
from fedsys.adapters.lowrank import LowRank
from fedsys.cohort import CohortModel
from fedsys.data import Dataset, TensorExamples, TokenExamples
from fedsys.data.examples import Batch, Examples
from fedsys.models import CNN, MLP, ViT
from fedsys.models.huggingface import Logits
from fedsys.params import Params, subtract
from fedsys.strategy import Strategy
from fedsys.update import Update

CPU = torch.device("cpu")
SIZES = (1, 7, 20, 33)  # rows of the clients: of 2, 2, 6 and 10 steps in two epochs of batches of 8
CLASSES = 3
VOCABULARY = 29
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class DoubleExamples(TensorExamples):
    """Rows in float64."""

    def batch(self, rows: Tensor) -> Batch:
        batch = super().batch(rows)
        return batch | {"x": batch["x"].double()}


def vectors(rows: int, dtype: torch.dtype = torch.float32) -> TensorExamples:
    draw = torch.Generator().manual_seed(0)
    kind = DoubleExamples if dtype == torch.float64 else TensorExamples
    x = torch.randn(rows, 1, 8, 8, generator=draw)
    return kind(x, torch.randint(CLASSES, (rows,), generator=draw))


def texts(rows: int, labelled: bool) -> TokenExamples:
    """Return rows of 2 to 9 tokens, with classes or, for language modelling, with prompts."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 10, (rows,), generator=draw)
    total = int(lengths.sum())
    return TokenExamples(
        tokens=torch.randint(1, VOCABULARY, (total,), generator=draw, dtype=torch.int32),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        pad_id=0,
        labels=torch.randint(CLASSES, (rows,), generator=draw) if labelled else None,
        prompt_lengths=None if labelled else torch.randint(0, 2, (rows,), generator=draw),
    )


def network(name: str) -> nn.Module:
    """Return a small model in float64, drawn from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = _text_model(name) if name in _TEXT else _image_model(name)
    return model.double()


def _image_model(name: str) -> nn.Module:
    kinds = {
        "mlp": MLP(hidden=[12, 10]),
        "cnn": CNN(width=16),  # with 8, a group is a channel and a bias before it is without effect
        "vit": ViT(patch=2, dim=8, depth=1, attention_heads=2),
    }
    data = Dataset(
        train=vectors(1), evaluation=vectors(1), num_classes=CLASSES, input_shape=(1, 8, 8)
    )
    return kinds[name].build(data, 1)


_TEXT = ("bert", "llama", "gpt2")


def _text_model(name: str) -> nn.Module:
    import transformers as hf

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
    }
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    if name == "bert":
        config = hf.BertConfig(**sizes, **none, num_labels=CLASSES)
        return Logits(
            hf.BertForSequenceClassification(config), "auto", heads=("backbone.classifier",)
        )
    if name == "llama":
        return Logits(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=1)), "auto")
    return Logits(hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, **off)), "auto")


def examples_of(name: str, rows: int, dtype: torch.dtype = torch.float32) -> Examples:
    return texts(rows, labelled=name == "bert") if name in _TEXT else vectors(rows, dtype)


class Dense(nn.Module):
    """An adapted layer written out: W + scaling B R A is made, then applied."""

    def __init__(self, layer: LowRank) -> None:
        super().__init__()
        self.base, self.scaling = layer.base, layer.scaling
        self.A, self.B, self.R = layer.A, layer.B, layer.R

    def forward(self, x: Tensor) -> Tensor:
        low = self.A.weight if isinstance(self.R, nn.Identity) else self.R.weight @ self.A.weight
        update = self.scaling * self.B.weight @ low
        weight = self.base.weight
        if type(self.base) is not nn.Linear:  # Conv1D
            return x @ (weight + update.T) + self.base.bias
        return F.linear(x, weight + update, self.base.bias)


def written_out(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that holds none of fedsys's adapter modules."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRank):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Dense(module))
    return model


Optimize = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Plain:
    """One client after another, as anybody would write it."""

    model: nn.Module
    examples: Examples
    optimizer: Optimize
    mu: float = 0.0  # of a proximal term

    def train(self, batches: Tensor, lrs: Sequence[float] | None = None) -> tuple[Params, float]:
        """Return the trained tensors and the mean loss; ``lrs`` is the step size of every step."""
        model = written_out(self.model)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        start = {n: p.detach().clone() for n, p in named.items()}
        optimizer = self.optimizer(list(named.values()))
        losses = []
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups if lrs is not None else ():
                group["lr"] = lrs[step]
            loss = self.loss(model, rows[rows >= 0])
            losses.append(loss.item())
            for name, p in named.items() if self.mu else ():
                loss = loss + self.mu / 2 * (p - start[name]).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {n: p.detach() for n, p in named.items()}, sum(losses) / len(losses)

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        batch = self.examples.batch(rows)
        labels = batch.pop("labels")
        logits = model(**batch)
        if labels.dim() == 2:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, labels, ignore_index=-100)


def nothing(params: Params, start: Params) -> Params:
    return {}


def together(
    model: nn.Module,
    examples: Examples,
    training: LocalTraining,
    batches: list[Tensor],
    lr: float | None = None,
    local_gradient: LocalGradient = nothing,
) -> tuple[list[Params], Tensor]:
    """Return the clients' trained tensors and losses, from one call of ``train_cohort``."""
    cohort = CohortModel(copy.deepcopy(model))
    task = Task(cohort, examples, training, local_gradient, CPU)
    rate = training.lr if lr is None else lr
    trained, losses = train_cohort(task, cohort.initial, batches, rate)
    return [cohort.layout.unpack(row) for row in trained], losses


def plan(training: LocalTraining, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    """Return the batches of clients that hold one range of rows after the other."""
    ends = torch.tensor(sizes).cumsum(0)
    return [
        training.batches(torch.arange(int(end) - size, int(end)), 0, 1, client)
        for client, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def distance(found: Params, expected: Params, start: Params) -> float:
    """Return ||found - expected|| relative to ||expected - start||, over all tensors."""
    assert found.keys() == expected.keys()
    error = sum((found[n] - expected[n]).double().square().sum() for n in expected)
    moved = sum((expected[n] - start[n]).double().square().sum() for n in expected)
    assert moved > 0
    return float((error / moved).sqrt())


def trainable(model: nn.Module) -> Params:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@dataclass
class Federation:
    """Rounds of a strategy without messages: every client takes part in each."""

    strategy: Strategy
    model: nn.Module
    examples: Examples
    training: LocalTraining
    shards: list[Tensor]  # rows of each client

    def run(self, rounds: int = 1) -> list[Params]:
        """Return the global params after each round."""
        params, history = trainable(self.model), []
        state = self.strategy.init(params, len(self.shards))
        for number in range(1, rounds + 1):
            direction, state = self.strategy.combine(iter(self.updates(params, number)), state)
            params, state = self.strategy.step(params, direction, state)
            history.append(params)
        return history

    def updates(self, params: Params, number: int = 1) -> list[Update]:
        """Return what the clients that start from ``params`` send in a round."""
        cohort = CohortModel(copy.deepcopy(self.model))
        task = Task(cohort, self.examples, self.training, self.strategy.local_gradient, CPU)
        batches = [
            self.training.batches(rows, 0, number, client)
            for client, rows in enumerate(self.shards)
        ]
        start = cohort.layout.pack(params)
        trained, _ = train_cohort(task, start, batches, self.training.lr)
        return [
            Update(client, subtract(cohort.layout.unpack(row), params), len(rows))
            for client, (row, rows) in enumerate(zip(trained, self.shards, strict=True))
        ]
