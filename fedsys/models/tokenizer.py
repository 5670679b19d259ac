"""Reading tokenizers, and giving them the padding token that batches need."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsys.models.hub import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PADDING = ("[PAD]", "<pad>", "<|pad|>")
_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|im_end|>")


def load_tokenizer(place: str, revision: str | None, key: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer at ``place``, with a padding token; ``key`` is what the user set."""
    with reading(key, place, revision) as (source, options):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        found: PreTrainedTokenizerBase
        try:
            if Path(source).is_file():
                found = PreTrainedTokenizerFast(tokenizer_file=source)
                # A bare file does not say which of its tokens ends a text.
                found.eos_token = _first(_ENDS, found)
            else:
                found = AutoTokenizer.from_pretrained(source, **options)
        except Exception as error:
            if type(error) is Exception:  # as tokenizers raises for a malformed file
                raise ValueError(str(error)) from None
            raise
    _ensure_padding(found)
    return found


def _ensure_padding(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give the tokenizer a padding token: what it has, else its end, else a new one."""
    if tokenizer.pad_token_id is not None:
        return
    padding = tokenizer.eos_token or _first(_PADDING, tokenizer)
    if padding is not None:
        tokenizer.pad_token = padding
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def _first(tokens: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> str | None:
    vocabulary = tokenizer.get_vocab()
    return next((token for token in tokens if token in vocabulary), None)
