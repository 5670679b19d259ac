"""Which client a node is."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

log = logging.getLogger(__name__)


class Online(NamedTuple):
    """The connected nodes in order of their clients."""

    clients: Sequence[int]
    nodes: Sequence[int]  # of each of ``clients``


class Registry:
    """Numbers nodes at first sight, those seen together in rising order, and never again.

    A node that joins later or comes back does so without changing anybody's number. A range of
    nodes, as a simulation has, is numbered as it stands and costs nothing, as long as no others
    come and none of it goes.
    """

    def __init__(self, nodes: list[int]) -> None:
        """Know ``nodes`` as clients 0, 1, ...; the list grows with every new node."""
        self.nodes = nodes
        self._clients = {node: client for client, node in enumerate(nodes)}
        self._range = range(0)  # while ``nodes`` is empty: all that have been seen

    def __len__(self) -> int:
        """Return the number of clients ever seen."""
        return len(self.nodes or self._range)

    def online(self, connected: Sequence[int]) -> Online:
        """Return who is connected, after numbering the nodes that are new."""
        if isinstance(connected, range) and not self.nodes and self._range in (range(0), connected):
            self._range = connected
            return Online(range(len(connected)), connected)
        self._number(self._range)
        self._number(connected)
        clients = sorted(self._clients[node] for node in connected)
        return Online(clients, [self.nodes[client] for client in clients])

    def pick(self, clients: Iterable[int], online: Online) -> dict[int, int]:
        """Return the node of each of ``clients`` that is connected."""
        if isinstance(online.clients, range):
            return {client: online.nodes[client] for client in clients}
        here = dict(zip(online.clients, online.nodes, strict=True))
        return {client: here[client] for client in clients if client in here}

    def _number(self, seen: Iterable[int]) -> None:
        for node in sorted(set(seen) - self._clients.keys()):
            self._clients[node] = len(self.nodes)
            self.nodes.append(node)


class Seats(Registry):
    """Numbers nodes as they say themselves, which is by their partition of the data.

    So client n holds the same rows and has the same random numbers on every engine. A seat is its
    node's as long as that is connected; whoever claims it meanwhile is not asked to train.
    """

    def __init__(
        self,
        nodes: list[int],
        num_clients: int,
        ask: Callable[[list[int]], Mapping[int, int]],
    ) -> None:
        """Give ``num_clients`` seats to whom ``ask`` says; ``nodes`` hold theirs, 0 is nobody.

        ``ask(nodes)`` returns the partitions of those that answer.
        """
        super().__init__(nodes + [0] * (num_clients - len(nodes)))
        self._clients.pop(0, None)
        self._ask = ask
        self._claims: dict[int, int] = {}  # of nodes without a seat

    def online(self, connected: Sequence[int]) -> Online:
        """Return who is connected and has a seat, after asking the nodes that are new."""
        here = set(connected)
        self._claims = {node: seat for node, seat in self._claims.items() if node in here}
        if strangers := sorted(here - self._clients.keys() - self._claims.keys()):
            self._claims |= self._ask(strangers)
        for node in sorted(here & self._claims.keys()):
            self._seat(node, here)
        clients = [client for client, node in enumerate(self.nodes) if node in here]
        return Online(clients, [self.nodes[client] for client in clients])

    def _seat(self, node: int, here: set[int]) -> None:
        seat = self._claims[node]
        if not 0 <= seat < len(self.nodes):
            log.warning("node %d says it is client %d of %d", node, seat, len(self.nodes))
        elif (holder := self.nodes[seat]) in here:
            log.warning("node %d says it is client %d, and so is node %d", node, seat, holder)
        else:
            self._clients.pop(holder, None)
            del self._claims[node]
            self.nodes[seat], self._clients[node] = node, seat
