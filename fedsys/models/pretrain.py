"""A base model trained centrally on ``dataset.source``, once, and kept in a cache."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedsys import cache
from fedsys.params import Params, digest
from fedsys.seeds import generator

if TYPE_CHECKING:
    from fedsys.data import Examples

_RECIPE = 1  # part of the cache key: goes up whenever train() changes
_EPOCHS = 40
_BATCH_SIZE = 64
_LR = 3e-3

_log = logging.getLogger(__name__)


def pretrain(model: nn.Module, source: "Examples", seed: int, recipe: dict[str, Any]) -> None:
    """Load the weights of ``model`` trained on ``source``, or train and keep them.

    ``recipe`` is JSON-able and, with the source and the seed, determines the untrained model.
    """
    name = cache.name_of("base", _RECIPE, recipe, source.fingerprint(), seed)
    expected = model.state_dict()
    state = _read(name, expected)
    if state is None:
        train(model, source, seed)
        state = model.state_dict()
        cache.write(name, state, {"digest": digest(state)})
    else:
        model.load_state_dict(state)


def train(model: nn.Module, source: "Examples", seed: int) -> None:
    """Train ``model`` in place on the rows of ``source``: AdamW with a linearly falling rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01)
    steps = _EPOCHS * -(-len(source) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum, and so the bits, would depend on their number
    try:
        for epoch in range(_EPOCHS):
            order = torch.randperm(len(source), generator=generator(seed, "pretrain", epoch))
            for start in range(0, len(order), _BATCH_SIZE):
                batch = source.batch(order[start : start + _BATCH_SIZE])
                labels = batch.pop("labels")
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(**batch), labels).backward()
                optimizer.step()
                schedule.step()
    finally:
        torch.set_num_threads(threads)
    model.zero_grad()  # a gradient left behind would be added to the first one taken later


def _read(name: str, expected: Params) -> Params | None:
    """Return the cached tensors, or None where there are none that fit and are whole."""
    found = cache.read(name)
    if found is None:
        return None
    state, said = found
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}
    if shapes != {key: (t.shape, t.dtype) for key, t in expected.items()} or (
        said.get("digest") != digest(state)
    ):
        _log.warning("the cached base model %s is damaged and is built again", name)
        return None
    return state
