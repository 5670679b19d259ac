"""Secure aggregation as messages over a grid."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys import messages
from fedsys.engines.base import exchange
from fedsys.engines.local import FIRST_NODE, LocalGrid
from fedsys.errors import ClientFailure
from fedsys.rounds import Round
from fedsys.secagg import (
    SecureAggregation,
    SecureRound,
    Sum,
    TooFewClients,
    replies,
)
from fedsys.secagg.client import Client
from fedsys.secagg.parts import Keys, Request, Roster, Shares
from fedsys.secagg.rounds import MASKED, SECAGG
from tests.secagg import FIVE, rng, table, travelled, vectors_of

# ---- as messages

OPTIONS = SecureAggregation(clipping_norm=1.0, bits=20)
SIZE = 30


class Serialising(LocalGrid):
    """Every message travels as bytes, there and back, and so does what a client keeps."""

    def _run_one(self, message: Message) -> Message:
        message.content = travelled(message.content)
        reply = super()._run_one(message)
        if reply.has_content():
            reply.content = travelled(reply.content)
        self.states = {client: travelled(state) for client, state in self.states.items()}
        return reply


def app_of(deltas: np.ndarray, options: SecureAggregation = OPTIONS) -> ClientApp:
    """Return clients that send rows of ``deltas`` to sums."""
    app = ClientApp()

    def answers(action: str):
        def answer(message: Message, context: Context) -> Message:
            content = replies.reply(action, message.content, context.state, options)
            return Message(content, reply_to=message)

        return answer

    for action in replies.ACTIONS:
        app.train(action)(answers(action))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        delta = torch.from_numpy(deltas[client])
        arrays = replies.mask(delta, message.content, context.state, options, rng(client))
        return Message(RecordDict({"arrays": messages.encode(arrays)}), reply_to=message)

    return app


@dataclass
class Exchanged:
    """A round over a grid."""

    grid: LocalGrid
    clients: list[int]
    failures: list[ClientFailure] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    phases: int = 0

    def ask(self, action: str, contents):
        yield from self.send(f"train.{action}", contents)

    def send(self, kind: str, contents):
        """Yield (client, content), as a session does over the rounds it keeps."""
        self.phases += 1
        nodes = {client: client + FIRST_NODE for client in contents}
        phase = Round(1, nodes, ArrayRecord())
        outgoing = phase.address(kind, contents.items())
        self.kinds += [message.metadata.message_type for message in outgoing[:1]]
        for client, reply in phase._arrivals(exchange(self.grid, outgoing, 1.0), self.excluded):
            if reply.has_content():
                yield client, reply.content
            else:
                self.excluded(ClientFailure(client, reply.error.reason))

    def excluded(self, failure: ClientFailure) -> None:
        self.failures.append(failure)

    def run(self, options: SecureAggregation = OPTIONS, size: int = SIZE) -> Sum:
        secure = SecureRound(options, size, self.ask, self.excluded)
        records = secure.open(self.clients)
        contents = {c: RecordDict({SECAGG: record}) for c, record in records.items()}
        for client, content in self.send("train", contents):
            secure.take(client, content)
        return secure.close()


@pytest.mark.parametrize("grid", [LocalGrid, Serialising])
@pytest.mark.parametrize(
    "lost",
    [
        {},
        {1: "train"},
        {0: "train.secagg_keys", 5: "train.secagg_secrets"},
        {2: "train.secagg_shares", 3: "train"},
    ],
)
def test_a_round_of_messages_gives_the_plain_sum(grid, lost: dict[int, str]) -> None:
    deltas = vectors_of(7, SIZE, norm=0.9)
    gone = lambda m: lost.get(m.metadata.dst_node_id - FIRST_NODE) == m.metadata.message_type  # noqa: E731
    made = grid(app_of(deltas), 7, lost=gone)
    exchanged = Exchanged(made, list(range(7)))
    total = exchanged.run()
    want = [c for c in range(7) if lost.get(c) in (None, "train.secagg_secrets")]
    assert total.clients == want
    plain = deltas[want].sum(0)
    assert np.abs(total.values - plain).max() < OPTIONS.quantiser.error(len(want))
    assert exchanged.kinds == [
        "train.secagg_keys",
        "train.secagg_shares",
        "train",
        "train.secagg_secrets",
    ]
    assert {c for c, state in made.states.items() if SECAGG in state} <= lost.keys()


def test_clients_clip_and_the_server_learns_how_many_did() -> None:
    deltas = vectors_of(5, SIZE, norm=0.5)
    deltas[1] *= 10
    deltas[3] *= 1000
    total = Exchanged(LocalGrid(app_of(deltas), 5), [0, 1, 2, 3, 4]).run()
    assert total.clipped == 2
    deltas[1] /= 5
    deltas[3] /= 500
    assert np.abs(total.values - deltas.sum(0)).max() < OPTIONS.quantiser.error(5)


def test_a_client_whose_update_is_not_finite_is_lost_to_the_sum_and_no_more() -> None:
    deltas = vectors_of(5, SIZE, norm=0.5)
    deltas[2, 3] = np.nan
    exchanged = Exchanged(LocalGrid(app_of(deltas), 5), [0, 1, 2, 3, 4])
    total = exchanged.run()
    assert total.clients == [0, 1, 3, 4]
    assert [f.client for f in exchanged.failures] == [2]
    assert "NaN or Inf" in str(exchanged.failures[0])
    assert np.abs(total.values - deltas[[0, 1, 3, 4]].sum(0)).max() < OPTIONS.quantiser.error(4)


def test_rounds_follow_each_other_with_new_keys() -> None:
    deltas = vectors_of(4, SIZE, norm=0.5)
    grid = LocalGrid(app_of(deltas), 4)
    first = Exchanged(grid, [0, 1, 2, 3]).run()
    second = Exchanged(grid, [0, 1, 2, 3]).run()
    np.testing.assert_array_equal(first.values, second.values)


def test_too_few_clients_are_told_as_such() -> None:
    grid = LocalGrid(app_of(vectors_of(5, SIZE)), 5, offline=(1, 2, 3))
    with pytest.raises(TooFewClients, match="2 clients sent keys"):
        Exchanged(grid, [0, 1, 2, 3, 4]).run()


def test_a_train_message_without_a_sum_is_not_answered() -> None:
    state = RecordDict()
    with pytest.raises(ValueError, match="sends its update to a sum only"):
        replies.mask(torch.zeros(3), RecordDict(), state, OPTIONS, rng())
    with pytest.raises(ValueError, match="sends its update to a sum only"):
        replies.reply("secagg_keys", RecordDict(), state, OPTIONS)


def asked(**values) -> RecordDict:
    return RecordDict({SECAGG: ConfigRecord(values)})


def test_messages_of_another_round_or_out_of_order_are_refused() -> None:
    state, session = RecordDict(), bytes(16)
    with pytest.raises(ValueError, match="no secure aggregation is under way"):
        replies.reply("secagg_secrets", asked(session=session), state, OPTIONS)
    replies.reply("secagg_keys", asked(session=session, client=3), state, OPTIONS)
    with pytest.raises(ValueError, match="another secure aggregation"):
        replies.reply("secagg_shares", asked(session=b"1" * 16, members=5), state, OPTIONS)
    with pytest.raises(ValueError, match="0 neighbours among 5 members"):
        replies.reply("secagg_shares", asked(session=session, members=5), state, OPTIONS)
    with pytest.raises(ValueError, match="has begun cannot be masked"):
        replies.mask(torch.zeros(3), asked(session=session), state, OPTIONS, rng())


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"client": 3}, "session must be bytes"),
        ({"session": b"", "client": -1}, "client must be a whole number from 0"),
        ({"session": b"", "client": True}, "client must be a whole number from 0"),
        ({"session": b""}, "client must be a whole number from 0"),
    ],
)
def test_records_that_do_not_say_what_they_should(values, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replies.reply("secagg_keys", asked(**values), RecordDict(), OPTIONS)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"keys-of": [1, 1], "keys": [b"", b""]}, "name a client twice"),
        ({"keys-of": [-1], "keys": [b""]}, "no list of whole numbers"),
        ({"keys-of": ["a"], "keys": [b""]}, "no list of whole numbers"),
        ({"keys-of": [True], "keys": [b""]}, "no list of whole numbers"),
        ({"keys-of": 3, "keys": [b""]}, "no list of whole numbers"),
        ({"keys-of": [1], "keys": [b"", b""]}, "2 keys are those of 1 clients"),
        ({"keys-of": [1], "keys": ["a"]}, "no list of bytes"),
        ({"keys-of": [1], "keys": b"a"}, "no list of bytes"),
        ({"keys-of": [1], "keys": [b"a"]}, "keys are 96 bytes, got 1"),
        ({"keys-of": [1], "keys": [bytes(96)], "members": 2.0}, "members must be a whole number"),
    ],
)
def test_rosters_that_are_not_written_as_such(values, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Roster.of(ConfigRecord({"members": 5, **values}))


byte_maps = st.dictionaries(st.integers(0, 2**40), st.binary(max_size=40), max_size=6)


@given(byte_maps, byte_maps, st.lists(st.integers(0, 2**40), unique=True))
@settings(deadline=None)
def test_parts_come_out_of_a_record_as_they_went_in(seeds, masks, names) -> None:
    parts = [
        Shares(seeds, masks),
        Request(names[::2], names[1::2]),
        Roster(7, {c: Keys(bytes([i] * 32), bytes(32), b"x" * 32) for i, c in enumerate(masks)}),
    ]
    for part in parts:
        record = ConfigRecord()
        part.write(record)
        assert type(part).of(travelled(RecordDict({SECAGG: record}))[SECAGG]) == part


def test_a_client_survives_between_messages_whatever_its_step() -> None:
    for phase in range(4):
        for client in table(phase).clients.values():
            again = Client.load(FIVE, travelled(RecordDict({SECAGG: client.dump()}))[SECAGG])
            assert again == client
            assert "_seed" not in repr(client)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (RecordDict(), "no arrays called 'arrays'"),
        (RecordDict({"arrays": ArrayRecord()}), "expected one array 'masked'"),
        (RecordDict({"arrays": messages.encode({"w": torch.zeros(3)})}), "expected one array"),
        (RecordDict({"arrays": messages.encode({MASKED: torch.zeros(3)})}), "expected uint8"),
    ],
)
def test_replies_without_masked_numbers_are_left_out(content: RecordDict, match: str) -> None:
    exchanged = Exchanged(LocalGrid(app_of(vectors_of(3, SIZE, norm=0.5)), 3), [0, 1, 2])
    secure = SecureRound(OPTIONS, SIZE, exchanged.ask, exchanged.excluded)
    secure.open([0, 1, 2])
    assert secure.take(1, content) is False
    assert match in str(exchanged.failures[0])
