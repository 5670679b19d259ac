"""How many clients train together."""

import math

import torch
from torch import nn

from fedsys.data.examples import Examples
from fedsys.federation import Federation
from fedsys.memory import available, kept

POSITIONS = 4096  # of work in a step that keep a core busy: rows times tokens
LARGEST_CHUNK = 100  # clients
COPIES = 6  # of a client's trainable tensors: weights, gradients twice, two of an optimizer, result


def chunk_size(federation: Federation) -> int:
    """Return how many clients train together: ``engine.chunk``, or by the size of the work.

    Where memory is short it is by what a pass of one client was seen to take.
    """
    experiment = federation.experiment
    if experiment.engine.chunk is not None:
        return int(experiment.engine.chunk)
    limit = min(_largest_chunk(federation), LARGEST_CHUNK)
    if federation.device.type != "cuda":  # that is the better used the larger its work
        positions = federation.site.training.batch_size * _positions(federation.dataset.train)
        limit = min(limit, int(POSITIONS / positions))
    limit = max(1, limit)
    # Even chunks: 20 clients by 16 are 10 and 10, in less memory than 16 and 4.
    cohort = getattr(experiment.participation, "cohort", None) or len(federation.shards)
    return math.ceil(cohort / math.ceil(cohort / limit))


def _positions(examples: Examples) -> float:
    """Return the positions of work that a row is on average."""
    lengths = examples.lengths(torch.arange(len(examples)))
    return examples.positions if lengths is None else max(1.0, lengths.double().mean().item())


def _largest_chunk(federation: Federation) -> int:
    """Return how many clients fit into half of the memory that there is."""
    model, training = federation.model, federation.site.training
    left = available(federation.device)
    if left is None:
        return LARGEST_CHUNK
    examples = federation.dataset.train
    rows = torch.arange(len(examples))
    if (lengths := examples.lengths(rows)) is not None:  # the longest, which take the most
        rows = lengths.argsort(descending=True)
    batch = examples.batch(rows[torch.arange(training.batch_size) % len(rows)])
    inputs = {n: v.to(federation.device) for n, v in batch.items() if n != "labels"}
    leaves = model.layout.unpack(model.initial[None].to(federation.device))
    model.bind({name: nn.Parameter(value) for name, value in leaves.items()})
    activations = kept(model, inputs)
    return left // 2 // (activations + COPIES * model.initial.nbytes)
