"""The whole state of a run between two rounds."""

from dataclasses import dataclass, field
from typing import Any

from fedsys.params import Params

State = Any  # a tree (tuples, dicts) of tensors


@dataclass
class Snapshot:
    """What a checkpoint holds: random numbers are named, so they need no place here."""

    round: int  # the last finished round; 0 before the first
    params: Params  # x_t
    state: State  # the strategy's
    participation: State
    frozen: Params = field(default_factory=dict)  # factors shared by all clients
    informed: set[int] = field(default_factory=set)  # clients that hold ``frozen``
