"""The whole state of a run between two rounds."""

from dataclasses import dataclass, field
from typing import Any

from fedsys.params import Params
from fedsys.privacy.release import Spent

State = Any  # a tree (tuples, dicts) of tensors


@dataclass
class Snapshot:
    """What a checkpoint holds: random numbers are named, so they need no place here."""

    round: int  # the last finished round; 0 before the first
    params: Params  # x_t
    state: State  # the strategy's
    participation: State
    memory: Params = field(default_factory=dict)  # the codec's at the server, such as EControl's h
    frozen: Params = field(default_factory=dict)  # factors shared by all clients
    base: Params = field(default_factory=dict)  # W_t, where the strategy moves the frozen base
    moves: Params = field(default_factory=dict)  # factors of W_t - W_{t-1}
    version: int = 0  # how often the base has moved
    basis: str = ""  # digest of all that is frozen and shared
    informed: dict[int, int] = field(default_factory=dict)  # client -> version that it holds
    accepted: dict[int, int] = field(default_factory=dict)  # client -> last round it was used in
    spent: dict[int, Spent] = field(default_factory=dict)  # client -> all that it has released
    shield: Params = field(default_factory=dict)  # of a server that protects its clients
    anchor: dict[str, Any] = field(default_factory=dict)  # where the ledger of this process ended
    nodes: list[int] = field(default_factory=list)  # node of each client; [] where it follows
