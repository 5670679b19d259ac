"""What an engine may offer beyond Flower's Grid, and how a strategy talks to any of them."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from fedsys.errors import RunError

log = logging.getLogger(__name__)

_POLL = 1.0  # seconds between two looks at who is connected
_REPORT = 10.0  # seconds between two lines about it


@runtime_checkable
class StreamingGrid(Protocol):
    """A grid that hands over replies while later clients still train."""

    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Yield replies in the order of ``messages``."""
        ...


def exchange(grid: Grid, outgoing: list[Message], timeout: float) -> Iterable[Message]:
    """Send ``outgoing`` and return the replies: a stream in their order, or a list in any."""
    if isinstance(grid, StreamingGrid):
        return grid.stream(outgoing, timeout)
    return list(grid.send_and_receive(outgoing, timeout=timeout))


def connected(grid: Grid, at_least: int, patience: float) -> range | list[int]:
    """Return the nodes in order, as soon as ``at_least`` are connected.

    Raises ``RunError`` when after ``patience`` seconds they still are not.
    """
    deadline = time.monotonic() + patience
    report = 0.0
    while True:
        nodes = grid.get_node_ids()
        known = nodes if isinstance(nodes, range) else sorted(nodes)
        if len(known) >= at_least:
            return known
        now = time.monotonic()
        waiting = f"{len(known)} of the {at_least} clients needed are connected"
        if now >= deadline:
            raise RunError(f"{waiting} after {patience:.0f} s")
        if now >= report:
            log.warning("%s; giving up in %.0f s", waiting, deadline - now)
            report = now + _REPORT
        time.sleep(min(_POLL, deadline - now))
