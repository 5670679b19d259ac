"""Who is asked: the cohort of a round, an adversary's accomplices, a sample for evaluation."""

import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsys import checks
from fedsys.engines.base import connected
from fedsys.errors import RunError
from fedsys.privacy.account import ClientAccount
from fedsys.privacy.release import Spent
from fedsys.registry import Online, Registry, Seats
from fedsys.seeds import numpy_generator
from fedsys.snapshot import State

if TYPE_CHECKING:
    from fedsys.strategy import Strategy

log = logging.getLogger(__name__)

ATTEMPTS = 1000  # to draw a cohort that may be used
_ROLL_CALL = 60.0  # seconds for nodes to say who they are
_ROLL_CALL_LEAST = 15.0  # when time is short: a device polls every 3 s and starts a process
_ASK_AGAIN = 30.0  # seconds, where they have not; else every round would wait for them
_POLICY = "policy:"  # so begins what a device says that does not take part

Cohort = dict[int, int]  # client -> its node


class Invitations:
    """Draws from the clients that are connected; what it draws depends on names, not on order."""

    def __init__(self, strategy: "Strategy", grid: Grid) -> None:
        """Wait until enough clients are connected, and number them."""
        self._strategy, self._grid = strategy, grid
        self._reasons: dict[int, str] = {}  # of nodes that do not say who they are
        self._silent: dict[int, float] = {}  # nodes that did not say who they are, until when
        self._deadline = 0.0  # of who is waited for
        self.resume([])

    def online(self) -> Online:
        """Return who is connected, as soon as enough are; raises ``RunError`` when they are not."""
        strategy = self._strategy
        self._deadline = deadline = time.monotonic() + strategy.patience
        while True:
            left = max(0.0, deadline - time.monotonic())
            nodes = connected(self._grid, strategy.min_clients, left)
            online = self.registry.online(nodes)
            if len(online.clients) >= strategy.min_clients:
                return online
            reasons = [self._reasons.get(node, "") for node in nodes]
            refused = Counter(reason for reason in reasons if reason.startswith(_POLICY))
            possible = (strategy.seats or len(nodes)) - refused.total()
            if time.monotonic() >= deadline or possible < strategy.min_clients:
                said = "".join(f"; {count} of them: {reason}" for reason, count in refused.items())
                raise RunError(
                    f"{len(nodes)} nodes are connected, and of the {strategy.min_clients} clients"
                    f" needed {len(online.clients)} take part{said}"
                )
            time.sleep(1.0)

    def resume(self, nodes: list[int]) -> None:
        """Go on with the clients that an earlier process has numbered."""
        seats = self._strategy.seats
        self.registry = Seats(nodes, seats, self._roll_call) if seats else Registry(nodes)
        self.online()

    def draw(self, drawn: State, server_round: int, *attempt: int) -> tuple[Cohort, State]:
        """Return a cohort, and the participation's state after ``drawn``."""
        online = self.online()
        rng = self._generator(server_round, *attempt)
        participation = self._strategy.participation
        if getattr(participation, "exchangeable", False):  # as good among those connected as of all
            places, state = participation.draw(server_round, len(online.clients), (), rng)
            return {online.clients[place]: online.nodes[place] for place in places}, state
        clients, state = participation.draw(server_round, len(self.registry), drawn, rng)
        return self.registry.pick(clients, online), state

    def cohort(
        self, drawn: State, spent: Mapping[int, Spent], server_round: int
    ) -> tuple[Cohort, State]:
        """Return a cohort in which an attack has not its way, and who can pay for a round."""
        strategy = self._strategy
        attack, account = strategy.attack, strategy.account
        for attempt in range(ATTEMPTS):
            cohort, state = self.draw(drawn, server_round, *([attempt] if attempt else []))
            if attack is None or attack.accepts(cohort, len(self.registry)):
                break
        else:
            log.warning("round %d: no cohort has an honest majority", server_round)
        if isinstance(account, ClientAccount):
            cohort = account.admitted(cohort, spent)
        return cohort, state

    def accomplices(self, server_round: int, cohort: Collection[int]) -> Cohort:
        """Return the clients outside ``cohort`` that train for the adversary."""
        attack = self._strategy.attack
        if attack is None:
            return {}
        rng = numpy_generator(self._strategy.seed, "accomplices", server_round)
        asked = attack.extra(cohort, len(self.registry), rng)
        return self.registry.pick(asked, self.online()) if asked else {}

    def sample(self, fraction: float, server_round: int) -> Cohort:
        """Return ``fraction`` of the connected clients, drawn for evaluation."""
        if not fraction:
            return {}
        clients, nodes = self.online()
        rng = numpy_generator(self._strategy.seed, "evaluation", server_round)
        count = round(fraction * len(clients))
        places = sorted(rng.choice(len(clients), count, replace=False, shuffle=False).tolist())
        return {clients[place]: nodes[place] for place in places}

    def _roll_call(self, nodes: list[int]) -> dict[int, int]:
        """Return which partition each of ``nodes`` says it holds, of those that say it."""
        due = [n for n in nodes if time.monotonic() >= self._silent.get(n, -math.inf)]
        if not due:
            return {}
        calls = [Message(RecordDict(), node, "query.whoami") for node in due]
        claims: dict[int, int] = {}
        left = self._deadline - time.monotonic()
        patience = min(_ROLL_CALL, max(left, _ROLL_CALL_LEAST))
        replies = list(self._grid.send_and_receive(calls, timeout=patience))
        # An error may come from the server in a node's stead.
        asked = {call.metadata.message_id: call.metadata.dst_node_id for call in calls}
        for reply in replies:
            node = asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            try:
                claims[node] = _partition(reply)
                self._reasons.pop(node, None)
            except ValueError as reason:
                if self._reasons.get(node) != str(reason):
                    log.warning("node %d does not say who it is: %s", node, reason)
                self._reasons[node] = str(reason)
        again = time.monotonic() + _ASK_AGAIN
        self._silent |= {node: again for node in due if node not in claims}
        return claims

    def _generator(self, server_round: int, *attempt: int) -> np.random.Generator:
        account = self._strategy.account
        if isinstance(account, ClientAccount) and account.hides_cohorts:
            return np.random.default_rng(secrets.randbits(128))  # the seed is in the run's settings
        return numpy_generator(self._strategy.seed, "participation", server_round, *attempt)


def _partition(reply: Message) -> int:
    """Return what a node says it holds; raises ``ValueError`` when it does not."""
    metrics = next(iter(checks.content_of(reply).metric_records.values()), MetricRecord())
    found = metrics.get("partition-id")
    if not isinstance(found, int):
        raise ValueError(f"its partition-id is {found!r:.40}")
    return found
