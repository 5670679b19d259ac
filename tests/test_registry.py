"""Nodes keep their numbers, and what is remembered of a client follows its node."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

import strategies
from fedsys.checkpoint import Checkpoints
from fedsys.console import Record, Silent
from fedsys.engines.local import LocalGrid
from fedsys.params import Params
from fedsys.participation import Markov, Uniform
from fedsys.records import NoRecorder, RoundRecord
from fedsys.registry import Registry, Seats
from fedsys.snapshot import Snapshot
from fedsys.strategy import Strategy
from tests.runs import (
    Cohorts,
    Scattered,
    app_of,
    attended_by,
    federation_of,
    play,
    same,
    start,
)
from tests.stock_app.toy import app_of as toy_app
from tests.stock_app.toy import reply_of
from tests.test_fedau import Client

# ---- numbers

NODES = st.integers(2, 2**64 - 1)


def test_nodes_are_numbered_as_they_come_and_those_seen_together_in_rising_order() -> None:
    registry = Registry([])
    assert registry.online([50, 7, 90]) == ([0, 1, 2], [7, 50, 90])
    assert registry.online([3, 90]) == ([2, 3], [90, 3])
    assert registry.online([]) == ([], [])
    assert registry.online([90, 50, 8, 3, 7, 1]) == ([0, 1, 2, 3, 4, 5], [7, 50, 90, 3, 1, 8])
    assert len(registry) == 6


@given(st.lists(st.lists(NODES, unique=True, max_size=8), max_size=8))
def test_a_number_is_for_ever(looks: list[list[int]]) -> None:
    registry, known = Registry([]), dict[int, int]()
    for connected in looks:
        clients, nodes = registry.online(connected)
        assert sorted(nodes) == sorted(connected)
        assert list(clients) == sorted(clients)
        for client, node in zip(clients, nodes, strict=True):
            assert known.setdefault(node, client) == client
        assert sorted(known.values()) == list(range(len(known))), "no gaps, none twice"
        assert len(registry) == len(known)


@given(st.lists(NODES, unique=True, min_size=1), st.data())
def test_the_order_in_which_a_grid_lists_its_nodes_is_all_the_same(
    nodes: list[int], data: st.DataObject
) -> None:
    other = data.draw(st.permutations(nodes))
    assert Registry([]).online(nodes) == Registry([]).online(other)


@given(
    st.lists(st.lists(st.integers(2, 12), unique=True), max_size=4),
    st.lists(st.integers(2, 12), unique=True),
)
def test_a_registry_goes_on_from_the_nodes_of_a_checkpoint(
    looks: list[list[int]], last: list[int]
) -> None:
    registry = Registry([])
    for connected in looks:
        registry.online(connected)
    resumed = Registry(list(registry.nodes))
    assert resumed.online(last) == registry.online(last)
    assert resumed.nodes == registry.nodes


LOOKS = st.one_of(
    st.builds(range, st.integers(2, 4), st.integers(4, 9)),
    st.lists(st.integers(2, 9), unique=True),
)


@given(st.lists(LOOKS, min_size=1, max_size=6))
def test_a_range_is_numbered_like_the_list_of_its_nodes(looks: list[Sequence[int]]) -> None:
    ranges, lists = Registry([]), Registry([])
    for connected in looks:
        one, other = ranges.online(connected), lists.online(list(connected))
        assert [list(part) for part in one] == [list(part) for part in other]
        assert len(ranges) == len(lists)
        asked = list(range(0, len(lists), 2))
        assert ranges.pick([c for c in asked if c in one.clients], one) == lists.pick(asked, other)


def test_a_range_that_stays_is_never_written_out() -> None:
    registry = Registry([])
    for _ in range(3):
        clients, nodes = registry.online(range(2, 10**9))
        assert isinstance(clients, range)
        assert nodes == range(2, 10**9)
    assert registry.nodes == []
    assert len(registry) == 10**9 - 2
    online = registry.online(range(2, 10**9))
    assert registry.pick([5, 10**8], online) == {5: 7, 10**8: 10**8 + 2}


def test_who_is_not_connected_cannot_be_picked() -> None:
    registry = Registry([])
    registry.online([50, 7, 90])
    online = registry.online([90, 7])
    assert registry.pick([0, 1, 2], online) == {0: 7, 2: 90}
    assert registry.pick([], online) == {}


# ---- FedAU, and others that remember clients at the server

HUGE = {3: 2**63 + 11, 1: 2**40, 0: 5, 2: 2**64 - 1}  # place in ``w`` -> node


class Schedule(LocalGrid):
    """Nodes of any number that are connected in some rounds."""

    def __init__(self, app: Any, connected: Sequence[Sequence[int]], finished: int = 0) -> None:
        """Go on after ``finished`` rounds."""
        super().__init__(app, 1)
        self.connected, self.rounds = connected, finished

    def get_node_ids(self) -> Sequence[int]:
        return [HUGE[place] for place in self.connected[min(self.rounds, len(self.connected) - 1)]]

    def _shared_work(self, message: Message) -> tuple[str, int, bool]:
        return message.metadata.message_type, 0, True

    def stream(self, messages: Any, timeout: float = 0.0) -> Any:
        yield from super().stream(messages, timeout)
        self.rounds += 1


def ones(message: Message, context: Context) -> RecordDict:
    """Move the node's own place in ``w`` by 1."""
    state = message.content["arrays"].to_torch_state_dict()
    (place,) = (place for place, node in HUGE.items() if node == context.node_id)
    state["w"][place] += 1.0
    return reply_of(state)


class Kept(NoRecorder):
    """Writes a checkpoint after round ``last``, and goes on from one."""

    def __init__(self, folder: Path, last: int = 0) -> None:
        self.checkpoints, self.last = Checkpoints(folder), last
        self.records: list[RoundRecord] = []

    def restore(self, like: Snapshot) -> Snapshot | None:
        found = self.checkpoints.load(like)
        return found[0] if found else None

    def finished(self, snapshot: Snapshot, record: RoundRecord) -> None:
        self.records.append(record)
        if snapshot.round == self.last:
            self.checkpoints.save(snapshot, {})


COMINGS = [[3, 1], [1], [3, 0, 1], [0], [1, 0, 3, 2], [2, 3], [1, 2], [0, 1, 2, 3], [3], [2, 1]]


def end(strategy: Strategy, grid: Schedule, rounds: int, recorder: Kept) -> Snapshot:
    arrays = ArrayRecord({"w": torch.zeros(4, dtype=torch.float64)})
    start(strategy, grid, arrays, rounds, recorder)
    assert all(record.failures == 0 for record in recorder.records)
    assert strategy._session is not None
    return strategy._session.now


def leaves(tree: Any) -> list[torch.Tensor]:
    return list(_pytree.tree_leaves(tree))


def make(name: str) -> Strategy:
    words: dict[str, Any] = {"FedAU": {"cutoff": 3}}.get(name, {})
    if name.endswith("markov"):
        words["participation"] = Markov(rate=0.6, activation=0.5)
    elif name.endswith("uniform"):
        words["participation"] = Uniform(cohort=2)
    strategy: Strategy = getattr(strategies, name.split()[0])(fraction_evaluate=0.0, **words)
    return strategy


def test_the_weights_of_fedau_follow_the_nodes(tmp_path: Path) -> None:
    now = end(make("FedAU"), Schedule(toy_app(ones), COMINGS), len(COMINGS), Kept(tmp_path))
    expected, clients = torch.zeros(4, dtype=torch.float64), dict[int, Client]()
    for places in COMINGS:
        for place in places:
            clients.setdefault(place, Client(3))
        for place, client in clients.items():
            if place in places:
                expected[place] += client.used() / len(clients)
            client.lived(place in places)
    assert (now.params["w"] - expected).abs().max() < 1e-12
    # 1 and 3 were seen together, then 0, then 2.
    assert now.nodes == [HUGE[1], HUGE[3], HUGE[0], HUGE[2]]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        *[("FedAU", 1), ("FedAU", 2), ("FedAU", 4), ("FedAU", 8), ("FedAU markov", 2)],
        *[("FedAU markov", 4), ("FedAU uniform", 3), ("MIFA", 2), ("MIFA markov", 4)],
        *[("FedVARP", 3), ("AverageAll", 4)],
    ],
)
def test_a_resumed_run_knows_its_nodes_again_and_those_that_came_since(
    name: str, last: int, tmp_path: Path
) -> None:
    rounds = len(COMINGS)
    whole = end(make(name), Schedule(toy_app(ones), COMINGS), rounds, Kept(tmp_path / "whole"))
    folder = tmp_path / "stopped"
    stopped = end(make(name), Schedule(toy_app(ones), COMINGS), last, Kept(folder, last))
    joined = set(whole.nodes) - set(stopped.nodes)
    assert (last > 4) == (not joined), "in round 3 and 5 there are new nodes"
    resumed = end(make(name), Schedule(toy_app(ones), COMINGS, last), rounds, Kept(folder))
    assert resumed.nodes == whole.nodes
    assert same(resumed.params, whole.params)
    for part in ("state", "participation"):
        mine, other = (leaves(getattr(now, part)) for now in (resumed, whole))
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_a_node_that_comes_while_the_server_is_away_gets_the_next_number(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    end(make("FedAU"), Schedule(toy_app(ones), [[3, 1]]), 2, Kept(folder, 2))
    now = end(make("FedAU"), Schedule(toy_app(ones), [[0, 1]], 2), 4, Kept(folder, 4))
    assert now.nodes == [HUGE[1], HUGE[3], HUGE[0]], "though 5 is the lowest of all"
    now = end(make("FedAU"), Schedule(toy_app(ones), [[2, 0, 1, 3]], 4), 5, Kept(folder))
    assert now.nodes == [HUGE[1], HUGE[3], HUGE[0], HUGE[2]]
    # Alone since round 2, as the two of round 5 who were new to it have a weight of 1.
    shares = [2 / 2 + 2 / 3 + 1 / 4, 2 / 3 + 1 / 4, 2 / 2 + 1 / 4, 1 / 4]
    expected = dict(zip([1, 0, 3, 2], shares, strict=True))
    assert now.params["w"].tolist() == pytest.approx([expected[place] for place in range(4)])


# ---- our own clients

PARTITIONS = {2**63 + 5: 2, 400: 0, 17: 4, 9000: 1, 2**33: 3}  # node -> the rows it holds
NUMBERS = [4, 0, 1, 3, 2]  # the rows that clients 0, 1, ... hold
REMEMBERING = ["rounds=6", "strategy=econtrol", "dtype=float64", "compression.feedback=econtrol"]


class Checked(Silent):
    """Compares, after every round, h at the server with what the clients have."""

    def __init__(self, federation: Any, grid: Scattered, connected: dict[int, list[int]]) -> None:
        self.federation, self.grid, self.connected = federation, grid, connected

    def round(self, record: Record, total: int) -> None:
        now, layout = self.federation.strategy._session.now, self.federation.model.layout
        h = torch.zeros(layout.size, dtype=torch.float64)
        for client, last in now.accepted.items():
            held = self.federation.site.store._read(self.grid.partitions[now.nodes[client]], last)
            h += held["h"]
        assert h.abs().max() > 0
        assert (layout.pack(now.memory) - h).abs().max() < 1e-14
        assert record["failures"] == 0
        self.grid.connected = self.connected.get(now.round + 1, self.grid.connected)


@pytest.mark.parametrize("compression", ["topk", "randk", "sign", "int8"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_the_memory_of_econtrol_follows_the_nodes(
    compression: str, chunk: int, tmp_path: Path
) -> None:
    """Rand-K, whose indices both ends draw by the client's number, needs more: the number."""
    federation = federation_of(tmp_path, *REMEMBERING, f"compression={compression}")
    federation.strategy.min_clients = 1
    grid = Scattered(app_of(federation), PARTITIONS, chunk=chunk)
    grid.connected = [2**63 + 5, 400, 17]
    comings = {2: [400], 3: [9000, 17, 400, 2**63 + 5], 5: [2**33, 17], 6: list(PARTITIONS)}
    run = play(federation, grid, Checked(federation, grid, comings))
    assert run.now.nodes == [17, 400, 2**63 + 5, 9000, 2**33]
    assert run.now.accepted == dict.fromkeys(range(5), 6)
    assert run.participants == [[0, 1, 2], [1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 4], [0, 1, 2, 3, 4]]


def test_a_resumed_run_of_econtrol_knows_its_nodes_again(tmp_path: Path) -> None:
    overrides = [*REMEMBERING, "compression=randk", "checkpoint.every=2"]
    comings = {1: [400, 17], 3: [400, 2**63 + 5], 5: [17, 9000, 400], 6: list(PARTITIONS)}

    def run(folder: Path, rounds: int, first: int = 1) -> Params:
        federation = federation_of(folder, *overrides)
        federation.strategy.min_clients = 1
        grid = Scattered(app_of(federation), PARTITIONS)
        grid.connected = comings[first]
        return play(federation, grid, Checked(federation, grid, comings), rounds).params

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "stopped", 4)
    assert same(run(tmp_path / "stopped", 6, first=5), whole)


def test_ranks_of_flora_go_by_the_numbers_of_the_server(tmp_path: Path) -> None:
    overrides = ["strategy=flora", "adapter.rank=4", "strategy.ranks=[1,2,4]", "model.hidden=[6,6]"]
    federation = federation_of(tmp_path, *overrides)
    run = play(federation, Scattered(app_of(federation), PARTITIONS))
    assert [line["failures"] for line in run.lines] == [0, 0]
    assert [len(run.now.moves["fc1.A.weight"])] == [1 + 2 + 4 + 1 + 2]


def test_clients_off_line_leave_the_indices_of_randk_right(tmp_path: Path) -> None:
    """Without client 0, the server numbers client 1 as its first."""
    overrides = ["strategy=fedavg", "strategy.weighting=uniform", "compression=randk", "rounds=1"]
    words = [*overrides, "compression.ratio=1.0", "compression.feedback=none", "dtype=float64"]
    dense = federation_of(tmp_path / "dense", *words)
    sparse = federation_of(tmp_path / "sparse", *words, "compression.ratio=0.5")
    moved = []
    for federation in (dense, sparse):
        federation.strategy.min_clients = 1
        federation = attended_by(federation, Cohorts(otherwise=[0]))
        run = play(federation, LocalGrid(app_of(federation), 5, offline={0}))
        initial = federation.model.layout.unpack(federation.model.initial)
        moved.append({name: run.params[name] - value for name, value in initial.items()})
    for name, all_of_it in moved[0].items():
        half = moved[1][name]
        kept = half != 0
        assert torch.equal(half[kept], all_of_it[kept])


@pytest.mark.parametrize("grid", ["scattered", "range"])
def test_who_flips_labels_is_malicious_to_the_server_too(grid: str, tmp_path: Path) -> None:
    """Of five, the first two are malicious; who that is, the numbers of the server say."""
    overrides = ["strategy=fedavg", "rounds=1"]
    attacked = federation_of(tmp_path / "a", *overrides, "attack=label_flip", "attack.fraction=0.4")
    by_hand = federation_of(tmp_path / "b", *overrides)
    labels = by_hand.dataset.train.labels
    assert labels is not None
    for partition in NUMBERS[:2] if grid == "scattered" else [0, 1]:
        rows = by_hand.shards.rows(partition)
        labels[rows] = 9 - labels[rows]
    runs = []
    for federation in (attacked, by_hand):
        app = app_of(federation)
        own = Scattered(app, PARTITIONS) if grid == "scattered" else LocalGrid(app, 5)
        runs.append(play(federation, own))
    assert same(runs[0].params, runs[1].params)
    assert runs[0].lines[0]["train_loss"] == runs[1].lines[0]["train_loss"]
    plain = federation_of(tmp_path / "c", *overrides)
    assert not same(play(plain).params, runs[0].params)


# ---- seats


def seats_of(claims: dict[int, int], size: int = 4) -> tuple[Seats, list[list[int]]]:
    """Return seats whose nodes claim what ``claims`` says, and who was asked, call by call."""
    asked: list[list[int]] = []

    def ask(nodes: list[int]) -> dict[int, int]:
        asked.append(nodes)
        return {node: claims[node] for node in nodes if node in claims}

    return Seats([], size, ask), asked


@given(st.permutations(range(4)), st.lists(st.sets(st.integers(0, 3)), max_size=5))
def test_a_node_is_the_client_that_it_says_whenever_it_comes(
    partitions: list[int], looks: list[set[int]]
) -> None:
    nodes = {100 * (place + 1): partition for place, partition in enumerate(partitions)}
    seats, asked = seats_of(nodes)
    assert len(seats) == 4, "who is not there yet has a place all the same"
    for look in looks:
        connected = [node for node, partition in nodes.items() if partition in look]
        online = seats.online(connected)
        assert list(online.clients) == sorted(look)
        assert [nodes[node] for node in online.nodes] == sorted(look)
    heard = [node for nodes in asked for node in nodes]
    assert len(heard) == len(set(heard)), "each is asked once"


def test_a_seat_that_is_taken_is_not_given_away_until_its_node_has_gone(caplog: Any) -> None:
    seats, _ = seats_of({10: 2, 20: 2})
    assert seats.online([20]) == ([2], [20])
    assert seats.online([10, 20]) == ([2], [20])
    assert "node 10 says it is client 2, and so is node 20" in caplog.text
    assert seats.online([10]) == ([2], [10])
    assert seats.online([10, 20]) == ([2], [10]), "who comes back finds it taken"


def test_a_node_that_comes_back_says_anew_who_it_is() -> None:
    claims = {10: 0, 20: 0}
    seats, _ = seats_of(claims)
    assert seats.online([10, 20]) == ([0], [10])
    claims[20] = 1  # its operator has corrected it, and starts it again
    assert seats.online([10]) == ([0], [10])
    assert seats.online([10, 20]) == ([0, 1], [10, 20])


def test_who_claims_no_seat_that_there_is_has_none(caplog: Any) -> None:
    seats, asked = seats_of({10: 4, 20: -1, 30: 0})
    assert seats.online([10, 20, 30, 40]) == ([0], [30])
    assert "node 10 says it is client 4 of 4" in caplog.text
    assert seats.online([10, 20, 30, 40]) == ([0], [30])
    assert asked == [[10, 20, 30, 40], [40]], "who has not answered is asked again"


def test_seats_go_on_from_the_nodes_of_a_checkpoint() -> None:
    seats, _ = seats_of({10: 3, 20: 1})
    seats.online([10, 20])
    assert seats.nodes == [0, 20, 0, 10]
    resumed = Seats(list(seats.nodes), 4, lambda nodes: pytest.fail(f"asked {nodes}"))
    assert resumed.online([10]) == ([3], [10])
    assert resumed.pick([1, 3], resumed.online([10, 20])) == {1: 20, 3: 10}
