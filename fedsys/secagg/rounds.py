"""Secure aggregation as messages: what the server asks in a round, in which order.

    train.secagg_keys     down  secagg: session, client            up  secagg: keys
    train.secagg_shares   down  secagg: session, members, keys     up  secagg: parcels
    train                 down  what it always is, and             up  arrays: masked (d + 1, width)
                                secagg: session, parcels               uint8
    train.secagg_secrets  down  secagg: session, survivors, lost   up  secagg: seeds, masks

``secagg`` is one ConfigRecord; ``fedsys.secagg.parts`` says what its values look like. The client's
half is ``fedsys.secagg.replies``.
"""

from collections.abc import Callable, Iterable, Mapping

from flwr.app import ConfigRecord, RecordDict

from fedsys.arrays import tensor_of
from fedsys.errors import ClientFailure
from fedsys.messages import arrays_of
from fedsys.secagg.parts import CLIENT, KEYS, PARCELS, SESSION, Keys, Shares, put, raw, take
from fedsys.secagg.server import Server, Sum
from fedsys.secagg.settings import SecureAggregation

ASK_KEYS, ASK_SHARES, ASK_SECRETS = "secagg_keys", "secagg_shares", "secagg_secrets"
SECAGG, MASKED = "secagg", "masked"

# Sends each client its content as ``train.<action>``; yields (client, content) of the replies.
Ask = Callable[[str, Mapping[int, RecordDict]], Iterable[tuple[int, RecordDict]]]
Excluded = Callable[[ClientFailure], None]


class SecureRound:
    """One round, which sums vectors of ``size`` numbers.

    ``open`` before the train messages, ``take`` for each reply to them, ``close`` after. A client
    whose reply cannot be used is told to ``excluded`` and counts as lost from then on.
    """

    def __init__(
        self, settings: SecureAggregation, size: int, ask: Ask, excluded: Excluded
    ) -> None:
        """Ask nobody yet."""
        self._server = Server(settings, size)
        self._ask = ask
        self._excluded = excluded

    def open(self, clients: Iterable[int]) -> dict[int, ConfigRecord]:
        """Return who may train, with the record ``secagg`` of its train message.

        Raises ``TooFewClients`` when too many are lost before that.
        """
        server = self._server
        records = self._records(clients)
        for client, record in records.items():
            record[CLIENT] = client
        self._phase(ASK_KEYS, records, lambda c, r: server.keys(c, Keys.of(raw(r, KEYS))))
        rosters = server.rosters()
        records = self._records(rosters)
        for client, record in records.items():
            rosters[client].write(record)
        self._phase(ASK_SHARES, records, lambda c, r: server.shared(c, take(r, PARCELS)))
        parcels = server.parcels()
        records = self._records(parcels)
        for client, record in records.items():
            put(record, PARCELS, parcels[client])
        return records

    def take(self, client: int, content: RecordDict) -> bool:
        """Add the masked update in the reply ``content``; return whether it could be used."""

        def masked(client: int, content: RecordDict) -> None:
            arrays = arrays_of(content)
            if list(arrays) != [MASKED]:
                raise ValueError(f"expected one array {MASKED!r} in the reply, got {list(arrays)}")
            self._server.masked(client, tensor_of(arrays[MASKED]).cpu().numpy())

        return self._use(client, masked, content)

    def close(self) -> Sum:
        """Return the sum; raises ``SecAggError``, of which ``TooFewClients`` is one."""
        server = self._server
        requests = server.requests()
        records = self._records(requests)
        for client, record in records.items():
            requests[client].write(record)
        self._phase(ASK_SECRETS, records, lambda c, r: server.revealed(c, Shares.of(r)))
        return server.sum()

    def _records(self, clients: Iterable[int]) -> dict[int, ConfigRecord]:
        return {client: ConfigRecord({SESSION: self._server.session}) for client in clients}

    def _phase(
        self,
        action: str,
        records: Mapping[int, ConfigRecord],
        use: Callable[[int, ConfigRecord], None],
    ) -> None:
        """Send ``records``, and ``use`` the record of every reply."""

        def record_of(client: int, content: RecordDict) -> None:
            record = content.get(SECAGG)
            if not isinstance(record, ConfigRecord):
                raise ValueError(f"its reply has no record {SECAGG!r}")
            use(client, record)

        contents = {client: RecordDict({SECAGG: record}) for client, record in records.items()}
        for client, content in self._ask(action, contents):
            self._use(client, record_of, content)

    def _use(
        self, client: int, use: Callable[[int, RecordDict], None], content: RecordDict
    ) -> bool:
        try:
            use(client, content)
        except ValueError as error:
            self._excluded(ClientFailure(client, str(error)))
            return False
        return True
