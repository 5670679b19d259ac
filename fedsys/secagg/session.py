"""Secure aggregation in a run under way: a round whose updates reach the server as one sum.

    d = sum_{n in U} Delta_n / |U|          U: whose updates the sum is of
    d = (sum + N(0, (z D)^2 I)) / m         where clients are protected, D = Quantiser.longest

D, and not C, is what a client moves the sum by: rounding to whole numbers makes an update longer.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedsys.engines.base import exchange
from fedsys.errors import ClientFailure
from fedsys.params import Layout, Params
from fedsys.privacy.account import ClientAccount
from fedsys.rounds import Round
from fedsys.secagg.rounds import SECAGG, SecureRound
from fedsys.secagg.server import SecAggError, Sum
from fedsys.secagg.settings import FEWEST, SecureAggregation
from fedsys.update import Update

if TYPE_CHECKING:
    from fedsys.session import Session

log = logging.getLogger(__name__)


class Sums:
    """The sums of a session, one a round: ``open``, let clients train, take the ``direction``."""

    def __init__(self, session: "Session", settings: SecureAggregation, params: Params) -> None:
        """Ask nobody yet; updates are of the shapes of ``params``."""
        self._session = session
        self._settings = settings
        self._layout = session.strategy.layout or Layout.of(params)
        self._secure: SecureRound
        self._told = False  # that updates are clipped

    def open(self) -> dict[int, ConfigRecord]:
        """Return who is to train, with the record that goes with it; {} where no sum can be."""
        current = self._session.round
        self._secure = SecureRound(self._settings, self._layout.size, self._ask, self._exclude)
        if len(current.nodes) < FEWEST:
            if current.nodes:
                current.discard(f"a sum of {len(current.nodes)} clients shows too much of each")
            current.nodes = {}
            return {}
        try:
            records = self._secure.open(current.nodes)
        except SecAggError as error:
            current.discard(str(error))
            records = {}
        current.excuse(current.nodes.keys() - records.keys())
        return records

    @staticmethod
    def enclosed(
        records: Mapping[int, ConfigRecord], contents: Iterable[tuple[int, RecordDict]]
    ) -> Iterator[tuple[int, RecordDict]]:
        """Yield ``contents`` with the clients' ``records``."""
        for client, content in contents:
            own = content.copy()  # the arrays stay one object, by which cohorts are told
            own[SECAGG] = records[client]
            yield client, own

    def direction(self, replies: Iterable[Message]) -> Params:
        """Return what the masked ``replies`` come to; {} where they come to nothing."""
        total = self._sum(replies)
        session, account = self._session, self._session.strategy.account
        if isinstance(account, ClientAccount):
            if not account.releases(session.round.nodes):
                return {}
            values = np.zeros(self._layout.size) if total is None else total.values
            bound = self._settings.quantiser.longest(self._layout.size)
            direction, costs = account.release(
                self._unpacked(values), bound, session.round.nodes, session.round.index
            )
            session.charge(costs)
            return direction
        if total is None:
            return {}
        self._tell(total)
        return session.merge([Update(-1, self._unpacked(total.values / len(total.clients)), 1)])

    def _sum(self, replies: Iterable[Message]) -> Sum | None:
        current = self._session.round
        current.masked(replies, self._secure.take, self._session.excluded)
        if current.discarded or not current.nodes:
            return None
        try:
            return self._secure.close()
        except SecAggError as error:
            current.discard(str(error))
            return None

    def _tell(self, total: Sum) -> None:
        """Warn of clipped updates, once a run."""
        if total.clipped and not self._told:
            self._told = True
            log.warning(
                "%d of %d updates were longer than secagg.clipping_norm=%g, and were scaled down"
                " to it; a larger one keeps them as they are",
                total.clipped,
                len(total.clients),
                self._settings.clipping_norm,
            )

    def _unpacked(self, values: np.ndarray) -> Params:
        return self._layout.unpack(torch.from_numpy(values))

    def _ask(
        self, action: str, contents: Mapping[int, RecordDict]
    ) -> Iterator[tuple[int, RecordDict]]:
        session, current = self._session, self._session.round
        phase = Round(current.index, {c: current.nodes[c] for c in contents}, current.sent)
        outgoing = phase.address(f"train.{action}", contents.items())
        replies = exchange(session.grid, outgoing, session.timeout)
        yield from phase.contents(replies, session.excluded)
        phase.close(session.excluded)
        current.absorb(phase)

    def _exclude(self, failure: ClientFailure) -> None:
        self._session.round.exclude(failure, self._session.excluded)
