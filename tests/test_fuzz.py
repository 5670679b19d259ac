"""Replies spoiled in a hundred thousand ways: each is refused, and the mean is of the others."""

import random
import resource
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsys import checks, messages
from fedsys.arrays import TensorArray, tensor_of
from fedsys.compression import Blocks
from fedsys.engines.local import LocalGrid
from fedsys.errors import ClientFailure, RunError
from fedsys.params import Params
from fedsys.privacy.release import Release
from fedsys.protection import protected
from fedsys.rounds import Round, summarise
from fedsys.session import Session
from fedsys.update import Update
from strategies import FedAvg
from tests.fuzzing import (
    COARSE,
    Judged,
    Numbers,
    Read,
    Scene,
    Spoiler,
    count_of,
    fresh,
    loaded,
    speakable,
)
from tests.runs import Tampering, app_of, client_of, federation_of, play
from tests.secagg import travelled
from tests.stock_app.toy import app_of as toy_app
from tests.stock_app.toy import reply_of

MEGABYTES = 50  # of memory that malformed replies of a few kilobytes may take, whatever they claim
LocalGrid(ClientApp(), 1)  # Flower refuses to make messages outside an engine


class Witness(LocalGrid):
    """Keeps the last replies of each kind, as they arrive over a wire."""

    def __init__(self, app: ClientApp, num_clients: int) -> None:
        super().__init__(app, num_clients)
        self.seen: dict[str, dict[int, Message]] = {}

    def stream(self, messages: Iterable[Message], timeout: float = 0.0) -> Iterator[Message]:
        for reply in super().stream(messages, timeout):
            reply.content = travelled(reply.content)
            self.seen.setdefault(reply.metadata.message_type, {})[client_of(reply)] = reply
            yield reply


@dataclass
class Stage:
    """A scene, and the server's side of it."""

    scene: Scene
    begin: Callable[[], Round]
    combine: Callable[[list[Update]], Params]
    expect: Callable[[list[Judged]], Numbers]  # the direction of what the judge lets through
    shapes: dict[str, tuple[int, ...]]  # of the direction
    whole: bool = False  # numbers, which come as int64
    spent: dict[int, Any] = field(default_factory=dict)
    seen: dict[str, list[Message]] = field(default_factory=dict)  # replies by type


def stage_of(name: str, *overrides: str, read: Callable[[Session], Read]) -> Stage:
    """Play two rounds and keep what the server had and got in the second."""
    federation = federation_of(Path(mkdtemp()), *overrides)
    grid = Witness(app_of(federation), 5)
    session = (
        play_private(federation, grid)
        if "privacy=sample" in overrides
        else play(federation, grid).session
    )
    return staged(name, session, grid, read(session))


def play_private(federation: Any, grid: LocalGrid) -> Session:
    with protected(federation, clients_here=True):
        return play(federation, grid).session


def staged(name: str, session: Session, grid: Witness, read: Read) -> Stage:
    now, strategy, codec = session.round, session.strategy, session.codec
    private = now.spent is not None
    replies = list(grid.seen["train"].values())
    nodes = {node: client for client, node in now.nodes.items()}
    names = tuple(replies[0].content["arrays"])
    scene = Scene(name, now.index, nodes, replies, read, now.basis, private, names)
    spent: dict[int, Any] = {}

    def begin() -> Round:
        spent.clear()
        box = spent if private else None
        return Round(now.index, now.nodes, now.sent, now.layout, now.basis, now.decode, (), box)

    def combine(updates: list[Update]) -> Params:
        if codec is not None and codec.merges:
            return codec.merge(updates, codec.start(session.now.params, 5), 5)[0]
        return strategy.combine(iter(updates), session.now.state)[0]

    def expect(judged: list[Judged]) -> Numbers:
        total = sum(weight(j) * j.delta.astype(np.float64) for j in judged)
        if codec is not None and codec.merges:
            return total / 5
        return total if whole else total / sum(map(weight, judged))

    def weight(judged: Judged) -> float:
        return float(judged.examples) if strategy.weighting == "examples" else 1.0

    whole = type(strategy).__name__ == "FRL"
    shapes = {n: tuple(p.shape) for n, p in session.now.params.items()}
    seen = {kind: list(replies.values()) for kind, replies in grid.seen.items()}
    return Stage(scene, begin, combine, expect, shapes, whole, spent, seen)


# ---- what replies mean, read by hand


def packed_of(session: Session) -> Read:
    """One vector, of which x_t is subtracted."""
    start = tensor_of(session.round.sent["packed"]).numpy()

    def read(arrays: dict[str, Numbers]) -> Numbers | None:
        value = arrays.get("packed")
        if list(arrays) != ["packed"] or value.shape != start.shape or value.dtype != start.dtype:
            return None
        return value - start

    return read


def named_of(session: Session) -> Read:
    """Arrays by name; whole numbers differ in float64."""
    start = {name: tensor_of(array).numpy() for name, array in session.round.sent.items()}

    def read(arrays: dict[str, Numbers]) -> Numbers | None:
        if arrays.keys() != start.keys():
            return None
        parts = []
        for name, begin in start.items():
            value = arrays[name]
            if value.shape != begin.shape or value.dtype != begin.dtype:
                return None
            if value.dtype.kind != "f":
                value, begin = value.astype(np.float64), begin.astype(np.float64)
            parts.append((value - begin).reshape(-1).astype(np.float64))
        return np.concatenate(parts)

    return read


def blocks_of(session: Session) -> list[int]:
    blocks: Blocks = session.codec._blocks  # type: ignore[union-attr]
    return list(blocks.sizes)


def bits_of(data: Numbers, bits: int, count: int) -> list[int] | None:
    """Return ``count`` numbers of ``bits`` bits, most significant first."""
    if data.dtype != np.uint8 or data.shape != (-(-count * bits // 8),):
        return None
    number, total = int.from_bytes(data.tobytes(), "big"), 8 * len(data)
    return [(number >> (total - (k + 1) * bits)) & ((1 << bits) - 1) for k in range(count)]


def topk_of(session: Session) -> Read:
    """K values of each tensor, and their rising places."""
    sizes = blocks_of(session)
    d, counts = sum(sizes), [max(1, round(0.1 * size)) for size in sizes]
    ends = np.cumsum(sizes).tolist()

    def read(arrays: dict[str, Numbers]) -> Numbers | None:
        if arrays.keys() != {"values", "indices"}:
            return None
        values, places = (
            arrays["values"],
            bits_of(arrays["indices"], (d - 1).bit_length(), sum(counts)),
        )
        if places is None or values.dtype != np.float32 or values.shape != (sum(counts),):
            return None
        if any(b <= a for a, b in pairwise(places)) or places[-1] >= d:
            return None
        below = [sum(place < end for place in places) for end in ends]
        if below != np.cumsum(counts).tolist():
            return None
        delta = np.zeros(d, np.float32)
        delta[places] = values
        return delta

    return read


def int8_of(session: Session) -> Read:
    """Whole steps, and the step of each tensor."""
    sizes = blocks_of(session)

    def read(arrays: dict[str, Numbers]) -> Numbers | None:
        if arrays.keys() != {"codes", "scales"}:
            return None
        codes, scales = arrays["codes"], arrays["scales"]
        if codes.dtype != np.int8 or codes.shape != (sum(sizes),) or (codes == -128).any():
            return None
        if scales.dtype != np.float32 or scales.shape != (len(sizes),) or (scales < 0).any():
            return None
        return codes * scales.repeat(sizes)

    return read


def ranking_of(session: Session) -> Read:
    """The ids of each layer's edges, least important first; the update is their places."""
    edges = [p.numel() for p in session.now.params.values()]
    sizes = [-(-n * (n - 1).bit_length() // 8) for n in edges]

    def read(arrays: dict[str, Numbers]) -> Numbers | None:
        data = arrays.get("rankings")
        if list(arrays) != ["rankings"] or data.dtype != np.uint8 or data.shape != (sum(sizes),):
            return None
        places, at = [], 0
        for n, size in zip(edges, sizes, strict=True):
            ids = bits_of(data[at : at + size], (n - 1).bit_length(), n)
            at += size
            if sorted(ids) != list(range(n)):
                return None
            places.append(np.argsort(ids))
        return np.concatenate(places)

    return read


# ---- the stages

FEDAVG = ("strategy=fedavg", "evaluate.clients=true")
ECONTROL = ("strategy=econtrol", "adapter=full", "compression=topk_econtrol")
PRIVATE = (
    "privacy=sample",
    "privacy.noise_multiplier=1",
    "strategy=fedavg",
    "data.public_fraction=0",
)
STAGES: dict[str, Callable[[], Stage]] = {
    "fedavg": lambda: stage_of("fedavg", *FEDAVG, read=packed_of),
    "fed_sb": lambda: stage_of("fed_sb", "adapter.rank=3", read=packed_of),
    "econtrol": lambda: stage_of("econtrol", *ECONTROL, read=topk_of),
    "int8": lambda: stage_of("int8", "strategy=fedavg", "compression=int8", read=int8_of),
    "frl": lambda: stage_of("frl", "strategy=frl", "adapter=supermask", read=ranking_of),
    "private": lambda: stage_of("private", *PRIVATE, read=packed_of),
    "foreign": lambda: foreign(),
}


@cache
def stage(name: str) -> Stage:
    return STAGES[name]()


def foreign() -> Stage:
    """Arrays of every dtype, by name, of an app that knows nothing of fedsys."""
    start = {
        "w": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
        "double": torch.linspace(-1, 1, 5, dtype=torch.float64),
        "half": torch.linspace(-1, 1, 4).half(),
        "steps": torch.tensor(7),
        "codes": torch.arange(6, dtype=torch.uint8),
        "mask": torch.tensor([True, False, True]),
    }

    def answer(message: Message, context: Context) -> RecordDict:
        client = client_of_asked(message)
        state = message.content["arrays"].to_torch_state_dict()
        moved = {n: v + client if v.is_floating_point() else v for n, v in state.items()}
        return reply_of(moved, client + 1, train_loss=float(client))

    grid, strategy = Witness(toy_app(answer), 5), FedAvg()
    strategy.start(grid, messages.encode(start), 2)
    session = strategy._session
    assert session is not None
    return staged("foreign", session, grid, named_of(session))


def client_of_asked(message: Message) -> int:
    return message.metadata.dst_node_id - 2


# ---- a round of spoiled replies


def fuzz(it: Stage, count: int, seed: str) -> Spoiler:
    """Send ``count`` spoiled replies through rounds of five, and check each round."""
    rng = random.Random(f"fuzz/{it.scene.name}/{seed}")
    spoiler = Spoiler(it.scene, rng)
    while count > 0:
        spoiled = set(rng.sample(range(5), rng.randint(1, 5)))
        count -= len(spoiled)
        arrived = [
            spoiler.spoil(reply) if n in spoiled else reply
            for n, reply in enumerate(it.scene.replies)
        ]
        if rng.random() < 0.05:
            arrived.append(fresh(rng.choice(arrived)))
        rng.shuffle(arrived)
        check_round(it, arrived)
    return spoiler


def check_round(it: Stage, arrived: list[Message]) -> None:
    current, failures = it.begin(), list[ClientFailure]()
    updates = list(current.updates(arrived, failures.append))
    current.close(failures.append)
    judged = judge(it.scene, arrived)
    used = {update.client for update in updates}
    must = {client for client, j in judged.items() if j.delta is not None and j.certain}
    may = {client for client, j in judged.items() if j.delta is not None}
    assert must <= used <= may
    assert [u.client for u in updates] == sorted(used) == current.answered
    for update in updates:
        assert update.num_examples == judged[update.client].examples
    assert all(speakable(f.reason) for f in failures if f.client >= 0)
    assert {f.client for f in failures} >= set(it.scene.clients.values()) - used
    check_totals(current)
    if it.scene.private:
        assert used <= it.spent.keys()
    if updates:
        check_direction(it, it.combine(updates), [judged[client] for client in sorted(used)])


def judge(scene: Scene, arrived: list[Message]) -> dict[int, Judged]:
    """Judge the first reply of each client that is of this round."""
    judged: dict[int, Judged] = {}
    for reply in arrived:
        client = scene.clients.get(reply.metadata.src_node_id)
        if client is None or reply.metadata.group_id not in (str(scene.round), ""):
            continue
        if client not in judged:
            judged[client] = scene.judge(reply)
    return judged


def check_totals(current: Round) -> None:
    """The means of the metrics are finite, and the bytes a count."""
    if current.answered:
        means = {n: v for n, v in current.train_metrics().items() if n != "num-examples"}
        assert all(-checks.LARGEST <= value <= checks.LARGEST for value in means.values())
    assert current.bytes_up >= 0


def check_direction(it: Stage, direction: Params, judged: list[Judged]) -> None:
    assert {n: tuple(v.shape) for n, v in direction.items()} == it.shapes
    wanted_dtype = torch.int64 if it.whole else torch.float64
    assert {v.dtype for v in direction.values()} == {wanted_dtype}
    flat = torch.cat([v.reshape(-1) for v in direction.values()]).numpy()
    assert np.isfinite(flat).all()
    largest = max(float(np.abs(j.delta.astype(np.float64)).max()) for j in judged)
    np.testing.assert_allclose(flat, it.expect(judged), rtol=1e-9, atol=1e-12 * largest)


@pytest.mark.parametrize("name", STAGES)
def test_the_judge_reads_what_clients_really_send(name: str) -> None:
    it = stage(name)
    assert len(it.scene.replies) == 5
    assert all(it.scene.judge(reply).delta is not None for reply in it.scene.replies)
    check_round(it, it.scene.replies)


@pytest.mark.parametrize("name", STAGES)
def test_spoiled_replies_are_refused_and_the_others_count(name: str) -> None:
    spoiler = fuzz(stage(name), 250, "fast")
    assert len(spoiler.counts) >= 15


@pytest.mark.parametrize("name", ["fedavg", "econtrol", "frl"])
def test_claims_are_not_believed_before_they_are_checked(name: str) -> None:
    it = stage(name)
    fuzz(it, 5, "warm")
    tracemalloc.start()
    try:
        fuzz(it, 60, "traced")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTES * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_hundred_thousand_spoiled_replies(name: str) -> None:
    it = stage(name)
    fuzz(it, 100, "warm")
    with in_little_memory():
        fuzz(it, 13_000, "slow")


@contextmanager
def in_little_memory() -> Iterator[None]:
    """Check that the block takes no more than MEGABYTES besides what the process has.

    Memory that is asked for and never touched counts as well: there is a limit on it.
    """
    Path("/proc/self/clear_refs").write_text("5")  # begins to look for the peak anew
    before, limits = status("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 2**28, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert status("VmHWM") - before < MEGABYTES * 2**20


def status(name: str) -> int:
    """Return bytes that the kernel has counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# ---- evaluation, and the phase before round 1


def fuzz_evaluation(count: int, seed: str) -> None:
    """Compare the metrics that are used with those that the judge lets through."""
    it = stage("fedavg")
    replies = it.seen["evaluate"]
    rng = random.Random(f"fuzz/evaluation/{seed}")
    spoiler = Spoiler(it.scene, rng)
    for _ in range(-(-count // 4)):
        arrived = [*(spoiler.spoil(reply) for reply in replies[:4]), replies[4]]
        current, failures = it.begin(), list[ClientFailure]()
        metrics = list(current.metrics(arrived, failures.append))
        wanted = []
        for reply in sorted(first_of_each(it.scene, arrived), key=lambda r: r.metadata.src_node_id):
            found = records(reply, MetricRecord)
            if len(found) == 1 and count_of(found[0]):
                numbers = {n: v for n, v in found[0].items() if isinstance(v, int | float)}
                examples = int(numbers.pop("num-examples"))
                wanted.append((examples, {n: float(v) for n, v in numbers.items()}))
        assert metrics == wanted
        summary = summarise(metrics)
        assert summary is None or all(np.isfinite(value) for value in summary.values())
        assert all(speakable(f.reason) for f in failures if f.client >= 0)


def fuzz_gradients(count: int, seed: str) -> None:
    """Compare the sums that are used with those that the judge lets through."""
    it = stage("fed_sb")
    replies = it.seen["train.gradient"]
    shapes = {n: tuple(a.shape) for n, a in replies[0].content["arrays"].items()}
    rng = random.Random(f"fuzz/gradients/{seed}")
    scene = replace(it.scene, round=0, names=tuple(shapes))
    spoiler = Spoiler(scene, rng)
    for _ in range(-(-count // 4)):
        arrived = [*(spoiler.spoil(reply) for reply in replies[:4]), replies[4]]
        current = Round(0, {client: node for node, client in scene.clients.items()}, ArrayRecord())
        failures = list[ClientFailure]()
        sums = dict(current.arrays(arrived, shapes, failures.append))
        for reply in first_of_each(scene, arrived):
            client = scene.clients[reply.metadata.src_node_id]
            wanted, certain = gradients(reply, shapes)
            assert client not in sums if wanted is None else client in sums or not certain
            for name, value in sums.get(client, {}).items():
                assert np.array_equal(value.numpy(), wanted[name])
        assert all(speakable(f.reason) for f in failures if f.client >= 0)


def gradients(
    reply: Message, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Numbers] | None, bool]:
    """Return the finite floats of ``shapes`` in a reply, and whether their framing is NumPy's."""
    found = records(reply, ArrayRecord)
    if len(found) != 1 or not all(count_of(r) for r in records(reply, MetricRecord)):
        return None, True
    arrays = {name: loaded(array) for name, array in found[0].items()}
    for value, _ in arrays.values():
        if value is None or value.dtype.kind != "f" or value.dtype.itemsize > 8:
            return None, True
        with np.errstate(all="ignore"):  # of a NaN that signals
            if not (np.abs(value.astype(np.float64)) <= checks.LARGEST).all():
                return None, True
    if {name: value.shape for name, (value, _) in arrays.items()} != shapes:
        return None, True
    values = {name: value for name, (value, _) in arrays.items()}
    return values, all(certain for _, certain in arrays.values())


def records(reply: Message, kind: type) -> list[Any]:
    return [r for r in reply.content.values() if isinstance(r, kind)] if reply.has_content() else []


def first_of_each(scene: Scene, arrived: list[Message]) -> list[Message]:
    """Return the first reply of each client that is of this round."""
    first: dict[int, Message] = {}
    for reply in arrived:
        node, group = reply.metadata.src_node_id, reply.metadata.group_id
        if node in scene.clients and group in (str(scene.round), ""):
            first.setdefault(node, reply)
    return list(first.values())


@pytest.mark.parametrize("fuzzed", [fuzz_evaluation, fuzz_gradients])
def test_other_replies_are_checked_as_well(fuzzed: Callable[[int, str], None]) -> None:
    fuzzed(200, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("fuzzed", [fuzz_evaluation, fuzz_gradients])
def test_thousands_of_other_replies(fuzzed: Callable[[int, str], None]) -> None:
    fuzzed(100, "warm")
    with in_little_memory():
        fuzzed(4_000, "slow")


# ---- secure aggregation

UNIFORM = ("strategy=fedavg", "strategy.weighting=uniform", "rounds=1")


@cache
def deltas() -> tuple[Params, dict[int, Params]]:
    """Return x_0, and what each client adds to it in round 1, of a run without sums."""
    federation = federation_of(Path(mkdtemp()), *UNIFORM)
    grid = Witness(app_of(federation), 5)
    play(federation, grid)
    layout, start = federation.model.layout, federation.model.initial
    sent = {c: tensor_of(r.content["arrays"]["packed"]) for c, r in grid.seen["train"].items()}
    return layout.unpack(start), {c: layout.unpack(x - start) for c, x in sent.items()}


def fuzz_sums(count: int, seed: str) -> None:
    """Play rounds whose replies are spoiled in some phase; the sum is of those who are left."""
    rng = random.Random(f"fuzz/sums/{seed}")
    words = (*UNIFORM, "secagg=true", "secagg.clipping_norm=100")
    federation = federation_of(Path(mkdtemp()), *words)
    step = federation.experiment.secagg.quantiser.step
    scene = Scene("sums", 1, {n + 2: n for n in range(5)}, [], lambda _: None)
    spoiler = Spoiler(scene, rng, COARSE)
    while sum(spoiler.counts.values()) < count:

        def change(reply: Message, share: float = rng.choice((0.05, 0.15, 0.4))) -> list[Message]:
            if reply.has_error():  # as of a client whose neighbours are gone
                return [reply]
            reply.content = travelled(reply.content)
            return [spoiler.spoil(reply) if rng.random() < share else reply]

        grid = Tampering(app_of(federation), 5, change)
        with suppress(RunError):  # when nobody is left
            check_sum(play(replace(federation), grid).session, step)


def check_sum(session: Session, step: float) -> None:
    start, parts = deltas()
    answered = session.round.answered
    assert len(answered) != 1
    for name, value in session.now.params.items():
        moved = sum(parts[c][name].double() for c in answered) / max(len(answered), 1)
        assert ((value - start[name]).double() - moved).abs().max() < step + 1e-6
    assert all(speakable(f.reason) for f in session.round.failures if f.client >= 0)


def test_spoiled_replies_are_lost_to_a_secure_sum() -> None:
    fuzz_sums(100, "fast")


@pytest.mark.slow
def test_thousands_of_spoiled_replies_are_lost_to_secure_sums() -> None:
    fuzz_sums(3_000, "slow")


# ---- what fuzzing has found


def spent_of(*numbers: Any) -> Message:
    reply = fresh(stage("private").scene.replies[0])
    record = ConfigRecord()
    record.__dict__["_data"]["spent"] = list(numbers)
    reply.content["reply"] = record
    return reply


def test_a_ledger_only_grows() -> None:
    before = checks.read_spent(spent_of(1.0, 0.5, 3.0, 2.0, 0.1, 7.0), 4)
    assert before == (Release(1.0, 0.5, 3), Release(2.0, 0.1, 7))
    for more in ((1.0, 0.5, 3.0), (1.0, 0.5, 4.0)):
        grown = checks.read_spent(spent_of(*more, 2.0, 0.1, 7.0), 4, before)
        assert grown[0].steps == more[2]
    for less in (
        (1.0, 0.5, 3.0),
        (1.0, 0.5, 2.0, 2.0, 0.1, 8.0),
        (1.0, 1.0, 0.0),
        (3.0, 0.5, 99.0),
    ):
        with pytest.raises(ClientFailure, match="client 4: the client says it has spent less"):
            checks.read_spent(spent_of(*less), 4, before)


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((1.0, 0.5, 10**400), "too large"),
        ((1.0, 0.5, 1e6 + 1), "steps must be a whole number up to 1000000"),
        ((1.0, 0.5, 6e5, 1.0, 0.4, 6e5), "more than 1000000 steps"),
        ((0.051, 1e-300, 1.0), "sample_rate must be at least 1e-09, got 1e-300"),
        (("1", "1", "1"), "told in numbers"),
        ((b"1", b"1", b"1"), "told in numbers"),
        ((True, True, True), "told in numbers"),
        ((1.0, 0.5, 1.0) * 257, "more than 256 mechanisms"),
    ],
)
def test_spending_that_would_take_hours_to_account_for_is_refused(numbers, reason) -> None:
    with pytest.raises(ClientFailure, match=reason):
        checks.read_spent(spent_of(*numbers), 0)


def read_first(name: str, change: Callable[[RecordDict], None]) -> Update:
    it = stage(name)
    reply = fresh(it.scene.replies[0])
    change(reply.content)
    current, failures = it.begin(), list[ClientFailure]()
    updates = list(current.updates([reply], failures.append))
    if failures:
        raise failures[0]
    return updates[0]


@pytest.mark.parametrize("value", [1e39, 1.7e308, 2**200])
def test_metrics_whose_sum_would_be_infinite_are_refused(value: float) -> None:
    def change(content: RecordDict) -> None:
        content["metrics"]["train_loss"] = value

    with pytest.raises(ClientFailure, match="train_loss is NaN, Inf or too large"):
        read_first("fedavg", change)


def test_numbers_that_only_float64_holds_are_refused() -> None:
    def change(content: RecordDict) -> None:
        content["arrays"]["double"] = TensorArray(torch.full((5,), 1e300, dtype=torch.float64))

    with pytest.raises(ClientFailure, match="double holds NaN or Inf, or numbers beyond"):
        read_first("foreign", change)


def test_true_is_no_number_of_examples() -> None:
    def change(content: RecordDict) -> None:
        content["metrics"].__dict__["_data"]["num-examples"] = True

    with pytest.raises(ClientFailure, match="num-examples must be a whole number"):
        read_first("fedavg", change)


def test_reasons_can_be_shown_and_written_whatever_a_client_calls_its_arrays() -> None:
    def change(content: RecordDict) -> None:
        arrays = content["arrays"]
        for name in ("\ud800", "\x1b]0;title\x07", "a\nb", "x" * 10**6):
            arrays[name] = arrays["packed"]
        del arrays["packed"]

    with pytest.raises(ClientFailure, match="tensor names differ") as caught:
        read_first("fedavg", change)
    assert speakable(caught.value.reason)
