"""The tokens of many rows, kept from one process to the next and mapped into memory.

Every process that loads a table would tokenise it anew: each point of a sweep, each worker of Ray
and on a device each message. What is kept says as much as the text.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from fedsys import cache
from fedsys.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LEAST = 4096  # rows; fewer are tokenised in less than a second
MOST = 4 << 30  # bytes of all that is kept
_RECIPE = 1  # part of the name: goes up whenever the same text would give other tokens
_KIND = "tokens"


def made_once(
    make: Callable[[], Params],
    tokenizer: "PreTrainedTokenizerBase",
    columns: Sequence[Sequence[str]],
    settings: dict[str, Any],
) -> Params:
    """Return what ``make`` makes of ``columns`` of text, made by this process or another before.

    It has ``tokens`` and the ``offsets`` of its rows, and depends on nothing but the tokenizer, the
    columns and ``settings``, which JSON can say. That is known of transformers' own tokenizers;
    nothing is kept of others.
    """
    own = type(tokenizer).__module__.startswith("transformers.")
    if len(columns[0]) < LEAST or not own or not getattr(tokenizer, "is_fast", False):
        return make()
    texts = [_digest(column) for column in columns]
    name = cache.name_of(_KIND, _RECIPE, settings, texts, _identity(tokenizer))
    if (found := cache.read(name)) is not None:
        tensors, _ = found
        if _fits(tensors, len(columns[0])):
            return tensors
        log.warning("%s in the cache is damaged and is built again", name)
    made = make()
    cache.write(name, made, {})
    cache.prune(_KIND, MOST)
    return made


def _digest(column: Sequence[str]) -> str:
    state = hashlib.blake2b(repr([len(text) for text in column]).encode())
    for text in column:
        state.update(text.encode(errors="surrogatepass"))
    return state.hexdigest()


def _identity(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """Return all that decides how text becomes tokens."""
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()  # left from the last call; each sets it anew
    backend.no_padding()
    rules = hashlib.blake2b(backend.to_str().encode()).hexdigest()
    libraries = [version("transformers"), version("tokenizers")]
    said = (
        tokenizer.special_tokens_map,
        tokenizer.split_special_tokens,
        tokenizer.truncation_side,
        tokenizer.model_input_names,
    )
    return [type(tokenizer).__qualname__, rules, libraries, str(said)]


def _fits(tensors: Params, rows: int) -> bool:
    """Return whether ``tensors`` are whole, as far as can be told without reading all of them."""
    tokens, offsets = tensors.get("tokens"), tensors.get("offsets")
    return (
        tokens is not None
        and offsets is not None
        and tokens.dtype == torch.int32
        and offsets.shape == (rows + 1,)
        and int(offsets[-1]) == len(tokens)
    )
