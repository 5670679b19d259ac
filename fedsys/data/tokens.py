"""From texts to token examples, each text tokenised once."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsys.data.examples import TokenExamples
from fedsys.data.token_cache import made_once
from fedsys.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 4096  # rows a call, so that few Python lists of integers are alive at once


def classification_examples(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[list[str]],
    labels: Tensor,
    max_length: int,
) -> TokenExamples:
    """Return examples of one text a row, or of a pair; ``texts`` holds one or two columns."""
    made = made_once(
        lambda: _classified(tokenizer, texts, max_length),
        tokenizer,
        texts,
        {"task": "classification", "max_length": max_length},
    )
    return TokenExamples(**made, pad_id=_pad_id(tokenizer), labels=labels)


def _classified(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[list[str]], max_length: int
) -> Params:
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    paired = len(texts) == 2 and "token_type_ids" in tokenizer.model_input_names
    pad = _pad_id(tokenizer)
    for start in range(0, len(texts[0]), _CHUNK):
        columns = [column[start : start + _CHUNK] for column in texts]
        encoded = tokenizer(
            *columns, truncation=True, max_length=max_length, return_token_type_ids=paired
        )
        # A row without any token would have nothing to attend to.
        rows = [row or [pad] for row in encoded["input_ids"]]
        ids.append(_flat(rows, np.int32))
        lengths += map(len, rows)
        if paired:
            types.append(_flat((row or [0] for row in encoded["token_type_ids"]), np.uint8))
    made = {"tokens": torch.from_numpy(np.concatenate(ids)), "offsets": _offsets(lengths)}
    if paired:
        made["token_types"] = torch.from_numpy(np.concatenate(types))
    return made


def causal_examples(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str] | None,
    texts: list[str],
    max_length: int,
) -> TokenExamples:
    """Return examples for language modelling: all of ``texts`` carries loss, no prompt does.

    A row ends with the tokenizer's end-of-sequence token, if there is one, unless it is cut at
    ``max_length``. A prompt that leaves its response less than half of that loses its beginning.
    """
    made = made_once(
        lambda: _continued(tokenizer, prompts, texts, max_length),
        tokenizer,
        [texts] if prompts is None else [texts, prompts],
        {"task": "continuation", "max_length": max_length},
    )
    return TokenExamples(**made, pad_id=_pad_id(tokenizer))


def _continued(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str] | None,
    texts: list[str],
    max_length: int,
) -> Params:
    first = _first_token(tokenizer)
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    heads = _plain(tokenizer, prompts) if prompts is not None else None
    rows: list[list[int]] = []
    lengths: list[int] = []
    for body in _plain(tokenizer, texts):
        head = next(heads) if heads is not None else []
        room = max_length - len(first)
        response = (body + last)[: max(room - len(head), room // 2 if head else room)]
        kept = min(len(head), room - len(response))
        rows.append((first + head[len(head) - kept :] + response) or [_pad_id(tokenizer)])
        lengths.append(len(first) + kept if heads is not None else 0)
    tokens = torch.from_numpy(_flat(rows, np.int32))
    made = {"tokens": tokens, "offsets": _offsets([len(row) for row in rows])}
    if heads is not None:
        made["prompt_lengths"] = torch.tensor(lengths)
    return made


def _plain(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _CHUNK):
        yield from tokenizer(
            texts[start : start + _CHUNK],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # long texts are cut by us
        )["input_ids"]


def _first_token(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that the tokenizer itself puts before a text, if any."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("")["input_ids"][:1] == [start] else []


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    # Padding is masked, so any token of the vocabulary will do where there is none for it.
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _flat(rows: Iterable[list[int]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
