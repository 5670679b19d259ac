"""What the frozen blocks at the bottom of a model make of a row, computed once.

    logits(w, row) = upper(w, states(row)),     states fixed while the frozen weights are

Where adapters sit in upper blocks only, ``states`` is kept from step to step and from round to
round, and a pass begins at the lowest block that trains. The model itself stays as it is: during
such a pass, modules that return the states stand for the blocks below.

A row's states are those of its own tokens, (length, hidden), without padding: length * hidden
numbers in the dtype of the frozen base, so 48 KiB for 32 tokens of MiniLM in float32. Rows of one
length are computed together, and never with padding: what a row is computed with then changes no
bit on a CPU, whose matrix products treat row by row, from a few rows on. So a resumed run, whose
memory begins empty, is still the same run.

Not every model can be cut. Before states of a data set are used, its shortest and its longest row
are run whole and by their states; unless the logits agree, the model is run whole ever after.
"""

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedsys.data.examples import Batch, Examples
from fedsys.memory import is_shortage
from fedsys.models.stacks import Stack, lower, replaced, stacks

log = logging.getLogger(__name__)

STATES = "prefix_states"  # an input of a batch: the states (rows, length, hidden)
PASS = 4096  # tokens computed together
FEWEST = 16  # tokens from which on a matrix product does not depend on their number
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass
class _Rows:
    """The rows of a data set, which is held so that its id stays its own."""

    examples: Examples
    refusal: str  # why they have no states; ""
    states: dict[int, Tensor] = field(default_factory=dict)  # (length, hidden), by row


class Prefix:
    """The blocks of ``stack`` below number ``cut``, and what they made of rows so far."""

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        cut: int,
        trained: Collection[nn.Module],
        limit: int,
    ) -> None:
        """Keep at most ``limit`` bytes; ``trained`` are the modules of ``model`` that train.

        A data set has the states of all its rows kept or of none: so bits depend on settings only.
        """
        self.limit, self.held = limit, 0  # bytes
        self._model, self._stack, self._cut, self._trained = model, stack, cut, trained
        above = {m for top in (*list(stack)[cut:], *trained) for m in top.modules()}
        self._below = [m for m in model.modules() if m not in above]
        self._seen: dict[int, _Rows] = {}
        self._promised = 0  # bytes, of all rows of the data sets whose states are kept
        self._wrap: Callable[[Tensor], Any] = _plain  # how the block below the cut returns states
        self._weights: list[tuple[int, int]] = []

    def fill(self, examples: Examples, rows: Tensor) -> None:
        """Compute and keep the states of ``rows`` (n,), unless ``examples`` take too much memory.

        To be called before ``states``, with one client bound to the model.
        """
        self._forget_if_moved()
        if id(examples) not in self._seen:
            seen = self._seen[id(examples)] = _Rows(examples, self._reason(examples))
            if seen.refusal:
                log.info("the frozen blocks are run for every batch: %s", seen.refusal)
        seen = self._seen[id(examples)]
        if seen.refusal:
            return
        new = torch.tensor([row for row in rows.unique().tolist() if row not in seen.states])
        found = self._computed(examples, new[_lengths(examples, new) > 0]) if len(new) else {}
        seen.states.update(found)
        self.held += sum(states.nbytes for states in found.values())

    def states(self, examples: Examples, rows: Tensor) -> Batch:
        """Return ``{STATES: (b, L, hidden)}`` of ``rows`` (b,), zeros where the batch is padded.

        L is the length of the longest row. {} where the model must be run whole.
        """
        self._forget_if_moved()
        seen = self._seen.get(id(examples))
        kept, own = seen.states if seen is not None else {}, rows.tolist()
        # A row without tokens has no states, and a head may look at the padding in its place.
        if not own or not all(row in kept for row in own):
            return {}
        return {STATES: pad_sequence([kept[row] for row in own], batch_first=True)}

    def given(self, states: Tensor) -> AbstractContextManager[None]:
        """Let ``states`` stand for the blocks below the cut, for a time."""
        return replaced(self._stack, self._cut, self._wrap(states))

    def _reason(self, examples: Examples) -> str:
        """Return why the model must be run whole; "" if states may stand for the blocks."""
        lengths = examples.lengths(torch.arange(len(examples)))
        if lengths is None or not lengths.any():
            return "the rows have no tokens"
        shortest = lengths.masked_fill(lengths == 0, int(lengths.max())).argmin()
        rows = torch.stack([shortest, lengths.argmax()])
        batch = self._inputs(examples.batch(rows))
        early: list[nn.Module] = []
        hooks = [m.register_forward_pre_hook(lambda m, _: early.append(m)) for m in self._trained]
        try:
            found = self._computed(examples, rows)
        except _FAILURES as error:
            if is_shortage(error):
                raise
            return f"{type(error).__name__}: {error}"
        finally:
            for hook in hooks:
                hook.remove()
        if early:
            return "something below them is trained"
        parts = [found[row] for row in rows.tolist()]
        if any(x.dim() != 2 or len(x) != n for x, n in zip(parts, lengths[rows], strict=True)):
            return "their states are not those of a row's tokens"
        whole = int(lengths.sum()) * parts[0][0].nbytes
        if whole > self.limit - self._promised:
            return f"their states take {whole >> 20} MB, more than prefix_cache_mb leaves them"
        if reason := self._difference(batch, pad_sequence(parts, batch_first=True)):
            return reason
        self._promised += whole
        return ""

    @torch.no_grad()
    def _difference(self, batch: Batch, states: Tensor) -> str:
        """Return how the model differs that is run by ``states``; "" if it does not."""
        try:
            whole: Tensor = self._model(**batch)
            with self.given(states):
                cut: Tensor = self._model(**batch)
        except _FAILURES as error:
            if is_shortage(error):
                raise
            return f"{type(error).__name__}: {error}"
        if whole.dim() == 3:  # a token's logits; those of padding are nobody's
            real = batch["attention_mask"].bool()
            whole, cut = whole[real], cut[real]
        distance = (cut.double() - whole).norm()
        agrees = distance <= torch.finfo(states.dtype).eps ** 0.5 * whole.double().norm()
        return "" if agrees else "without them, the logits are others"  # NaN does not agree

    def _computed(self, examples: Examples, rows: Tensor) -> dict[int, Tensor]:
        """Return the states (length, hidden) of each of ``rows`` (n,), none of which is empty."""
        found: dict[int, Tensor] = {}
        lengths = _lengths(examples, rows)
        for length in lengths.unique().tolist():
            for part in rows[lengths == length].split(max(1, PASS // length)):
                count = max(len(part), -(-FEWEST // length))
                states = self._run(examples.batch(part[torch.arange(count) % len(part)]))
                states = states[: len(part)]
                if states.untyped_storage().nbytes() > states.nbytes:
                    states = states.clone()  # or memory beyond the limit would be held
                found.update(zip(part.tolist(), states, strict=True))
        return found

    @torch.no_grad()
    def _run(self, batch: Batch) -> Tensor:
        """Run the blocks below the cut and nothing above them."""
        output = lower(self._model, self._stack, self._cut, self._inputs(batch))
        if isinstance(output, tuple):
            nothing = (None,) * (len(output) - 1)
            self._wrap = lambda states: (states, *nothing)
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"a block returns {type(output).__name__}")
        return output

    def _inputs(self, batch: Batch) -> Batch:
        device = next(self._model.parameters()).device
        return {name: value.to(device) for name, value in batch.items() if name != "labels"}

    def _forget_if_moved(self) -> None:
        """Drop all states unless the frozen weights are where they were and as they were."""
        weights = [
            (tensor.data_ptr(), tensor._version)
            for module in self._below
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        if weights != self._weights:
            self._weights, self.held, self._promised = weights, 0, 0
            self._seen.clear()


def prefix_of(model: nn.Module, trained: Collection[nn.Module], limit: int) -> Prefix | None:
    """Return what lies below the lowest block of ``model`` that holds one of ``trained``.

    None if that is the lowest of all, or if ``limit`` (bytes) is 0.
    """
    for stack in stacks(model).values() if limit else ():
        blocks = enumerate(stack)
        cut = next((i for i, b in blocks if any(m in trained for m in b.modules())), 0)
        if cut:
            return Prefix(model, stack, cut, trained, limit)
    return None


def _lengths(examples: Examples, rows: Tensor) -> Tensor:
    """Return the tokens (n,) of rows that have any."""
    lengths = examples.lengths(rows)
    if lengths is None:
        raise ValueError("rows of one size have no tokens to count")
    return lengths


def _plain(states: Tensor) -> Any:
    return states
