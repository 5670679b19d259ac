"""What an engine may offer beyond Flower's Grid."""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid


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
