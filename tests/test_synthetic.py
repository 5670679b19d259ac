import pytest
import torch

from fedsys.data import RandomTokens, TokenExamples
from fedsys.errors import DataError

SPECIAL = 2  # the first ids


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", *(f"w{index}" for index in range(50))]
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )


def tokens(**changes: int) -> RandomTokens:
    return RandomTokens(**{"rows": 300, "length": 12, "num_classes": 4, "eval_rows": 40, **changes})


def matrix(examples: TokenExamples) -> torch.Tensor:
    return examples.batch(torch.arange(len(examples)))["input_ids"]


def test_rows_are_ordinary_tokens_of_one_length(tokenizer) -> None:
    data = tokens().load(tokenizer, 0, [])
    assert data.num_classes == 4
    assert data.train.positions == 12
    assert matrix(data.train).shape == (300, 12)
    assert matrix(data.evaluation).shape == (40, 12)
    assert matrix(data.train).min() >= SPECIAL
    assert matrix(data.train).unique().tolist() == list(range(SPECIAL, len(tokenizer)))
    assert data.train.batch(torch.arange(3))["attention_mask"].all()


def test_the_first_eight_tokens_tell_the_class_and_the_others_do_not(tokenizer) -> None:
    data = tokens().load(tokenizer, 0, [])
    signs = {}
    for examples in (data.train, data.evaluation):
        for row, label in zip(matrix(examples), examples.labels.tolist(), strict=True):
            assert len(row[:8].unique()) == 1
            assert signs.setdefault(label, int(row[0])) == int(row[0])
    assert sorted(signs) == [0, 1, 2, 3]
    assert len(set(signs.values())) == 4
    random = matrix(data.train)[:, 8:]
    for label in range(4):
        assert len(random[data.train.labels == label].unique()) > 40


def test_lengths_are_uniform_in_their_logarithm(tokenizer) -> None:
    data = tokens(rows=4000, length=64, shortest=8).load(tokenizer, 0, [])
    lengths = data.train.lengths(torch.arange(4000))
    assert (int(lengths.min()), int(lengths.max())) == (8, 64)
    assert data.train.positions == 64
    for share, length in ((1 / 3, 16), (2 / 3, 32)):  # 8 -> 64 is doubled three times
        below = (lengths <= length).double().mean().item()
        assert below == pytest.approx(share, abs=0.03)
    short = int(lengths.argmin())
    batch = data.train.batch(torch.tensor([short, int(lengths.argmax())]))
    assert batch["attention_mask"].sum(1).tolist() == [8, 64]
    assert len(batch["input_ids"][0, :8].unique()) == 1


def test_the_seed_alone_decides(tokenizer) -> None:
    first, again, other = (tokens().load(tokenizer, seed, []) for seed in (3, 3, 4))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert not torch.equal(matrix(first.train)[:40], matrix(first.evaluation))


def test_the_label_can_be_kept_as_a_column(tokenizer) -> None:
    data = tokens().load(tokenizer, 0, ["label"])
    assert data.columns["label"].tolist() == data.train.labels.tolist()
    with pytest.raises(DataError, match="author"):
        tokens().load(tokenizer, 0, ["author"])


@pytest.mark.parametrize(
    ("name", "value"), [("rows", 0), ("length", 7), ("num_classes", 1), ("eval_rows", 0)]
)
def test_ranges(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        tokens(**{name: value})


@pytest.mark.parametrize("shortest", [7, 13])
def test_the_shortest_row_holds_the_sign_and_is_no_longer_than_the_longest(shortest: int) -> None:
    with pytest.raises(ValueError, match=f"shortest must be from 8 to length=12, got {shortest}"):
        tokens(shortest=shortest)


@pytest.mark.parametrize(("name", "value"), [("length", 65), ("num_classes", 51)])
def test_what_the_model_cannot_take(tokenizer, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} .*at most .*, got {value}"):
        tokens(**{name: value}).load(tokenizer, 0, [])


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="model=hf_classifier"):
        tokens().load(None, 0, [])
