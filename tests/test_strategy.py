import gc
import logging
import weakref

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy as FlowerStrategy

import fedsys.engines.base as engines
from fedsys import messages
from fedsys.engines.local import LocalGrid
from fedsys.errors import ClientFailure, RunError
from fedsys.params import Layout, digest
from fedsys.participation import Bernoulli, Uniform
from fedsys.strategy import Strategy
from strategies import FedAdam, FedAvg
from tests.stock_app.toy import (
    Batch,
    Notes,
    app_of,
    arrays_of,
    client_of,
    close,
    drift,
    final,
    reply_of,
    same,
    state_of,
)


def run(answer=drift, clients=5, rounds=2, grid=None, notes=None, strategy=None, **settings):
    settings = {"fraction_evaluate": 0.0, **settings}
    strategy = strategy or FedAvg(**settings)
    grid = grid or LocalGrid(app_of(answer), clients)
    return strategy.start(grid, arrays_of(), rounds, recorder=notes)


# ---- averaging


def test_one_round_is_the_weighted_mean_of_the_clients():
    start = {name: value.double() for name, value in state_of().items()}
    total = sum(range(1, 6))
    expected = {
        name: value + sum((n + 1) / total * 0.1 * (n + 1) * torch.sin(value + n) for n in range(5))
        for name, value in start.items()
    }
    assert close(final(run(rounds=1)), expected, 1e-6)


def test_uniform_weighting_ignores_examples():
    start = {name: value.double() for name, value in state_of().items()}
    expected = {
        name: value + sum(0.02 * (n + 1) * torch.sin(value + n) for n in range(5))
        for name, value in start.items()
    }
    assert close(final(run(rounds=1, weighting="uniform")), expected, 1e-6)


def test_packed_and_named_arrays_give_the_same_model():
    layout = Layout.of(state_of())

    def packed(message, context):
        start = messages.decode(message.content["arrays"], layout)
        assert list(message.content["arrays"]) == ["packed"]
        client = client_of(message)
        moved = {n: v + 0.1 * (client + 1) * torch.sin(v + client) for n, v in start.items()}
        content = RecordDict({"arrays": messages.encode(moved, layout)})
        content["metrics"] = MetricRecord({"num-examples": client + 1})
        return content

    strategy = FedAvg(layout=layout, fraction_evaluate=0.0)
    result = strategy.start(LocalGrid(app_of(packed), 5), arrays_of(), 3)
    assert same(messages.decode(result.arrays, layout), final(run(rounds=3)))


def test_server_lr_scales_the_step():
    start, once, twice = state_of(), final(run(rounds=1)), final(run(rounds=1, server_lr=2.0))
    assert close(twice, {n: start[n] + 2 * (once[n] - start[n]) for n in start}, 1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"server_lr": 0.0},
        {"server_lr": -1.0},
        {"server_lr": float("nan")},
        {"weighting": "size"},
        {"fraction_evaluate": 1.1},
        {"fraction_evaluate": -0.1},
        {"min_clients": 0},
        {"on_client_error": "ignore"},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FedAvg(**bad)


# ---- bad clients

GOOD = drift


def broken(kind):
    """An answer like ``drift``, but for client 2, which is bad in one way."""

    def answer(message, context):
        content = drift(message, context)
        if client_of(message) != 2:
            return content
        arrays, metrics = content["arrays"], content["metrics"]
        if kind == "raises":
            raise RuntimeError("out of memory")
        if kind == "nan":
            arrays["w"] = Array(torch.full((3, 2), torch.nan).numpy())
        elif kind == "shape":
            arrays["w"] = Array(torch.zeros(2, 3).numpy())
        elif kind == "dtype":
            arrays["w"] = Array(torch.zeros(3, 2, dtype=torch.float64).numpy())
        elif kind == "missing":
            del arrays["w"]
        elif kind == "extra":
            arrays["v"] = Array(torch.zeros(1).numpy())
        elif kind == "examples":
            metrics["num-examples"] = 0
        elif kind == "garbage":
            arrays["w"] = Array("float32", (3, 2), "numpy.ndarray", b"garbage")
        elif kind == "basis":
            content["reply"] = ConfigRecord({"basis": "feed"})
        elif kind == "loss":
            metrics["train_loss"] = float("nan")
        return content

    return answer


KINDS = ["raises", "nan", "shape", "dtype", "missing", "extra"]
KINDS += ["examples", "garbage", "basis", "loss"]


class FourOfFive:
    """Everyone but client 2."""

    def init(self, num_clients):
        return ()

    def draw(self, round, num_clients, state, rng):
        return [0, 1, 3, 4], state


@pytest.fixture(scope="module")
def without_client_2():
    return final(run(participation=FourOfFive(), rounds=3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_reply_is_as_if_the_client_had_not_taken_part(kind, without_client_2):
    notes = Notes()
    result = run(broken(kind), rounds=3, notes=notes)
    assert same(final(result), without_client_2)
    assert [client for client, _ in notes.failures] == [2, 2, 2]
    assert all(reason for _, reason in notes.failures)
    assert [(r.clients, r.failures) for r in notes.records] == [(4, 1)] * 3
    assert notes.records[0].train_loss == pytest.approx((0 * 1 + 1 * 2 + 3 * 4 + 4 * 5) / 12)


def test_a_reply_of_nothing_is_as_if_the_client_had_not_taken_part(without_client_2):
    app = ClientApp()

    @app.train()
    def train(message, context):
        return None if client_of(message) == 2 else Message(drift(message, 0), reply_to=message)

    notes = Notes()
    assert same(final(run(grid=LocalGrid(app, 5), rounds=3, notes=notes)), without_client_2)
    assert "NoneType" in notes.failures[0][1]


def lose(replies):
    return [r for r in replies if r.metadata.src_node_id != 4]


def double(replies):
    again = [
        Message(reply_of({n: v + 9 for n, v in state_of().items()}), reply_to=_asked(r))
        for r in replies
    ]
    return lose(replies) + [a for a in again if a.metadata.src_node_id != 4]


def reverse(replies):
    return lose(replies)[::-1]


def strangers(replies):
    odd = [Message(RecordDict(r.content), reply_to=_asked(r, 77)) for r in replies]
    return odd + lose(replies)


def _asked(reply, node=None):
    """The request that ``reply`` answers, as far as metadata goes."""
    node = node or reply.metadata.src_node_id
    message = Message(RecordDict(), node, "train", group_id=reply.metadata.group_id)
    message.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return message


@pytest.mark.parametrize("change", [lose, double, reverse, strangers])
def test_lost_doubled_reordered_and_strange_replies(change, without_client_2):
    result = run(grid=Batch(app_of(drift), 5, change), rounds=3)
    assert same(final(result), without_client_2)


def test_a_late_reply_is_not_taken_for_that_of_the_round(without_client_2):
    late = []

    def change(replies):
        old, late[:] = list(late), [r for r in replies if r.metadata.src_node_id == 4]
        return old + lose(replies)

    notes = Notes()
    result = run(grid=Batch(app_of(drift), 5, change), rounds=3, notes=notes)
    assert same(final(result), without_client_2)
    assert (2, "answered round '1' in round 2") in notes.failures


@pytest.mark.parametrize("kind", KINDS)
def test_on_client_error_fail_stops_the_run_with_client_and_reason(kind):
    with pytest.raises(ClientFailure) as caught:
        run(broken(kind), on_client_error="fail")
    assert caught.value.client == 2


def test_on_client_error_fail_minds_a_lost_reply():
    with pytest.raises(ClientFailure, match="no reply"):
        run(grid=Batch(app_of(drift), 5, lose), on_client_error="fail")


def failing_in(bad_rounds):
    def answer(message, context):
        if message.content["config"]["server-round"] in bad_rounds:
            raise RuntimeError("no space")
        return drift(message, context)

    return answer


def test_a_run_in_which_everyone_fails_three_times_in_a_row_stops():
    notes = Notes()
    with pytest.raises(RunError, match=r"every client failed in round 4.*no space"):
        run(failing_in({2, 3, 4}), rounds=10, notes=notes)
    assert [r.clients for r in notes.records] == [5, 0, 0]


def test_a_run_whose_last_round_fails_stops():
    with pytest.raises(RunError, match="every client failed in round 3"):
        run(failing_in({3}), rounds=3)


def test_fruitless_rounds_in_between_leave_the_model_as_it_is():
    three = final(run(rounds=3))
    assert same(final(run(failing_in({2, 3, 5}), rounds=6)), three)


# ---- participation


def test_empty_rounds_leave_the_model_as_it_is():
    notes = Notes()
    result = run(clients=3, rounds=12, participation=Bernoulli(rate=0.2), notes=notes)
    sizes = [r.clients for r in notes.records]
    assert 0 in sizes
    assert max(sizes) > 0
    assert [r.round for r in notes.records] == list(range(1, 13))
    assert not notes.failures
    assert set(result.train_metrics_clientapp) == {t + 1 for t, n in enumerate(sizes) if n}
    assert all(n.isfinite().all() for n in final(result).values())


def test_a_run_of_empty_rounds_only_changes_nothing():
    class Nobody(FourOfFive):
        def draw(self, round, num_clients, state, rng):
            return [], state

    assert same(final(run(participation=Nobody(), rounds=4)), state_of())


def test_participation_state_goes_from_round_to_round():
    class Cyclic(FourOfFive):
        def init(self, num_clients):
            return torch.tensor(0)

        def draw(self, round, num_clients, state, rng):
            return [int(state)], (state + 1) % num_clients

    seen = []

    def answer(message, context):
        seen.append(client_of(message))
        return drift(message, context)

    run(answer, clients=3, rounds=5, participation=Cyclic())
    assert seen == [0, 1, 2, 0, 1]


# ---- determinism


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    settings = {"participation": Uniform(2), "rounds": 4, "clients": 9}
    assert same(final(run(**settings)), final(run(**settings)))
    assert not same(final(run(**settings)), final(run(**settings, seed=1)))


def test_the_global_generators_do_not_matter():
    def noisy(message, context):
        torch.manual_seed(client_of(message))
        torch.rand(3)
        return drift(message, context)

    settings = {"participation": Bernoulli(rate=0.5), "rounds": 4, "clients": 9}
    assert same(final(run(**settings)), final(run(noisy, **settings)))


def test_a_strategy_may_be_started_twice():
    strategy = FedAdam(fraction_evaluate=0.0)
    first = final(run(strategy=strategy))
    assert same(final(run(strategy=strategy)), first)


def test_flowers_loop_may_be_started_twice_and_a_failed_round_does_not_reset_the_state():
    def driven(strategy, answer=drift, rounds=3):
        grid = LocalGrid(app_of(answer), 4)
        return FlowerStrategy.start(strategy, grid, arrays_of(), rounds)

    def fresh():
        return FedAdam(fraction_evaluate=0.0)

    strategy = fresh()
    first = final(driven(strategy))
    assert same(first, final(run(strategy=fresh(), clients=4, rounds=3)))
    assert same(final(driven(strategy)), first)
    assert same(final(driven(fresh(), failing_in({1, 3}), 5)), first)


def test_evaluation_before_training_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="comes first"):
        FedAvg().aggregate_evaluate(1, [])


# ---- evaluation and records


def test_clients_evaluate_by_fraction():
    for fraction, expected in ((0.0, 0), (0.5, 10), (1.0, 20)):
        seen = []

        class Counting(LocalGrid):
            def stream(self, outgoing, timeout=0.0, seen=seen):
                outgoing = list(outgoing)
                seen += [m for m in outgoing if m.metadata.message_type == "evaluate"]
                return super().stream(outgoing, timeout)

        result = run(grid=Counting(app_of(drift), 20), rounds=1, fraction_evaluate=fraction)
        assert len(seen) == expected
        assert bool(result.evaluate_metrics_clientapp) == bool(expected)
    accuracy = result.evaluate_metrics_clientapp[1]
    assert accuracy["eval_accuracy"] == pytest.approx(0.095)
    assert accuracy["eval_accuracy_worst_decile"] == pytest.approx(0.005)


def test_the_server_evaluates_before_round_1_and_after_each():
    seen = []

    def evaluate(server_round, arrays):
        seen.append((server_round, arrays.to_torch_state_dict()))
        return MetricRecord({"eval_loss": float(server_round)})

    notes = Notes()
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(
        LocalGrid(app_of(drift), 3), arrays_of(), 2, evaluate_fn=evaluate, recorder=notes
    )
    assert [t for t, _ in seen] == [0, 1, 2] == list(result.evaluate_metrics_serverapp)
    assert same(dict(seen[0][1]), state_of())
    assert same(dict(seen[2][1]), final(result))
    assert [r.eval_loss for r in notes.records] == [1.0, 2.0]
    assert notes.events == ["restore", "prepared", "finished 1", "finished 2"]


def test_configs_reach_the_clients_and_stay_the_callers():
    seen = []

    def answer(message, context):
        seen.append(dict(message.content["config"]))
        return drift(message, context)

    config = ConfigRecord({"lr": 0.5})
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(LocalGrid(app_of(answer), 1), arrays_of(), 2, train_config=config)
    assert [(c["lr"], c["server-round"]) for c in seen] == [(0.5, 1), (0.5, 2)]
    assert dict(config) == {"lr": 0.5}


# ---- frozen factors


class Frozen(Strategy):
    """Sums what the clients send before round 1 into factors that all share."""

    def prepare(self, params, ask):
        total = torch.zeros(3)
        for client, sums in ask("gradient", {"g": (3,)}):
            self.asked.append(client)
            total = total + sums["g"]
        return params, {"A": total}


def frozen_app(holds, log):
    """Clients that keep the factors in ``holds`` and note in ``log`` who was sent them."""
    app = app_of(lambda message, context: answer(message))

    @app.train("gradient")
    def gradient(message, context):
        client = client_of(message)
        value = torch.full((3,), torch.nan if client == 1 else float(client))
        return Message(reply_of({"g": value}), reply_to=message)

    def answer(message):
        client = client_of(message)
        server_round = message.content["config"]["server-round"]
        if "frozen" in message.content:
            log.append((server_round, client))
            holds[client] = messages.decode(message.content["frozen"])
        if client not in holds:
            raise RuntimeError("no factors")
        if (server_round, client) == (2, 0):
            del holds[0]
            raise RuntimeError("restarted and forgot")
        content = drift(message, None)
        content["reply"] = ConfigRecord({"basis": digest(holds[client])})
        return content

    return app


def test_factors_go_to_each_client_once_and_again_after_a_failure():
    holds, log, notes = {}, [], Notes()
    strategy = Frozen(fraction_evaluate=0.0)
    strategy.asked = []
    grid = LocalGrid(frozen_app(holds, log), 4)
    strategy.start(grid, arrays_of(), 4, recorder=notes)
    assert strategy.asked == [0, 2, 3]  # client 1 sends NaN
    assert torch.equal(holds[3]["A"], torch.full((3,), 5.0))
    assert log == [(1, 0), (1, 1), (1, 2), (1, 3), (3, 0)]
    assert [client for client, _ in notes.failures] == [1, 0]
    assert notes.init_bytes > 0
    size = messages.wire_bytes(RecordDict({"frozen": messages.encode(holds[3])}))
    assert [r.bytes_init for r in notes.records] == [4 * size, 0, size, 0]


def test_clients_with_other_factors_are_left_out():
    holds = {}

    class Forgetful(dict):
        def __setitem__(self, client, factors):
            wrong = {"A": factors["A"] + 1}
            super().__setitem__(client, wrong if client == 2 else factors)

    holds, notes = Forgetful(), Notes()
    strategy = Frozen(fraction_evaluate=0.0)
    strategy.asked = []
    strategy.start(LocalGrid(frozen_app(holds, []), 4), arrays_of(), 1, recorder=notes)
    assert notes.failures[-1][0] == 2
    assert "frozen factors" in notes.failures[-1][1]


def test_phase_0_waits_for_a_cohort_that_is_not_empty():
    for seed in range(8):
        notes = Notes()
        strategy = Frozen(fraction_evaluate=0.0, participation=Bernoulli(rate=0.05), seed=seed)
        strategy.asked = []
        strategy.start(LocalGrid(frozen_app({}, []), 4), arrays_of(), 0, recorder=notes)
        # Client 1 is asked in vain, as it sends NaN.
        assert strategy.asked or [client for client, _ in notes.failures] == [1]


# ---- waiting for clients


class Slow(LocalGrid):
    """One more client is connected at every look."""

    looks = 0

    def get_node_ids(self):
        self.looks += 1
        return list(super().get_node_ids())[: self.looks - 1]


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by sleeping."""
    now = [100.0]
    monkeypatch.setattr(engines.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(engines.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    return now


def test_a_run_waits_for_its_clients(clock):
    result = run(grid=Slow(app_of(drift), 5), min_clients=5, patience=60.0, rounds=1)
    assert same(final(result), final(run(rounds=1)))


def test_waiting_has_a_deadline_and_says_what_it_waits_for(clock, caplog):
    class Nobody(LocalGrid):
        def get_node_ids(self):
            return []

    with (
        caplog.at_level(logging.WARNING, "fedsys"),
        pytest.raises(RunError, match="0 of the 2 clients needed are connected after 35 s"),
    ):
        run(grid=Nobody(app_of(drift), 5), min_clients=2, patience=35.0)
    assert clock[0] == pytest.approx(135.0)
    said = [r.getMessage() for r in caplog.records]
    assert said == [
        f"0 of the 2 clients needed are connected; giving up in {left} s"
        for left in (35, 25, 15, 5)
    ]


# ---- memory


def alive_updates(clients, chunk, tensors=1000):
    """The most reply tensors and deltas alive at any moment of a round."""
    alive, most = weakref.WeakSet(), [0]

    class Tracked(Strategy):
        def combine(self, updates, state):
            def watched():
                for update in updates:
                    for value in update.delta.values():
                        alive.add(value)
                    most[0] = max(most[0], len(alive))
                    yield update
                    del update

            return super().combine(watched(), state)

    def answer(message, context):
        value = messages.decode(message.content["arrays"])["x"] + 1
        alive.add(value)
        most[0] = max(most[0], len(alive))
        content = RecordDict({"arrays": messages.encode({"x": value})})
        content["metrics"] = MetricRecord({"num-examples": 1})
        return content

    strategy = Tracked(fraction_evaluate=0.0)
    grid = LocalGrid(app_of(answer), clients, chunk=chunk)
    strategy.start(grid, ArrayRecord({"x": torch.zeros(tensors)}), 2)
    return most[0]


@pytest.mark.parametrize("clients", [5, 50])
def test_the_server_holds_three_updates_whatever_the_cohort(clients):
    gc.collect()
    gc.disable()  # what lives must live by reference, not by luck
    try:
        assert alive_updates(clients, chunk=1) <= 3
    finally:
        gc.enable()


def growth(rounds):
    """Return how many Python objects the second half of a run of a trivial model adds."""
    seen = {}

    class Count(Notes):
        def finished(self, snapshot, record):
            if record.round in (rounds // 2, rounds):
                gc.collect()
                seen[record.round] = len(gc.get_objects())

    def answer(message, context):
        return reply_of(message.content["arrays"].to_torch_state_dict(), 1)

    strategy = FedAvg(fraction_evaluate=0.0, participation=Uniform(2))
    strategy.start(
        LocalGrid(app_of(answer), 1000),
        ArrayRecord({"x": torch.zeros(1)}),
        rounds,
        recorder=Count(),
    )
    return seen[rounds] - seen[rounds // 2]


def test_nothing_grows_over_2000_rounds():
    # Flower's result keeps a MetricRecord a round, and Notes a record.
    assert growth(2000) <= 3 * 1000


@pytest.mark.slow
def test_memory_is_bounded_over_10000_rounds():
    import psutil

    process = psutil.Process()
    growth(500)
    before = process.memory_info().rss
    growth(10_000)
    assert process.memory_info().rss - before < 40e6


@pytest.mark.parametrize("registered", [1_000, 100_000, 1_000_000])
def test_a_round_costs_the_cohort_and_not_the_registered(registered, monkeypatch):
    from fedsys.engines import local

    made = []
    original = local.Context
    monkeypatch.setattr(local, "Context", lambda **k: made.append(1) or original(**k))
    grid = LocalGrid(app_of(drift), registered)
    assert isinstance(grid.get_node_ids(), range)
    calls = [0]

    def count(frame, event, arg):
        calls[0] += event == "call"

    import sys

    sys.setprofile(count)
    try:
        run(grid=grid, participation=Uniform(100), rounds=1)
    finally:
        sys.setprofile(None)
    assert len(made) == 100
    assert not grid.states
    assert calls[0] < 60_000


def test_an_error_reply_over_a_list_grid_is_reported():
    def change(replies):
        return [
            Message(Error(2, "boom"), reply_to=_asked(r)) if r.metadata.src_node_id == 4 else r
            for r in replies
        ]

    notes = Notes()
    run(grid=Batch(app_of(drift), 5, change), notes=notes)
    assert notes.failures == [(2, "boom"), (2, "boom")]


def test_a_combine_that_stops_early_hides_no_failure():
    class First(Strategy):
        def combine(self, updates, state):
            return next(iter(updates)).delta, state

    notes = Notes()
    run(broken("nan"), strategy=First(fraction_evaluate=0.0), rounds=1, notes=notes)
    assert [client for client, _ in notes.failures] == [2]
    assert notes.records[0].clients == 4
    assert notes.records[0].train_loss == pytest.approx(34 / 12)


def test_what_comes_before_round_1_survives_a_failed_round_in_flowers_loop():
    class Shifted(Strategy):
        def prepare(self, params, ask):
            return {name: value + 1 for name, value in params.items()}, {}

    def driven(answer, rounds):
        strategy = Shifted(fraction_evaluate=0.0)
        return FlowerStrategy.start(strategy, LocalGrid(app_of(answer), 5), arrays_of(), rounds)

    expected = final(run(strategy=Shifted(fraction_evaluate=0.0), rounds=1))
    assert same(final(driven(drift, 1)), expected)
    assert same(final(driven(failing_in({1}), 2)), expected)


def test_the_order_in_which_a_grid_lists_its_nodes_does_not_matter():
    class Shuffled(LocalGrid):
        def get_node_ids(self):
            nodes = list(super().get_node_ids())
            return nodes[3:] + nodes[:3]

    settings = {"participation": Uniform(2), "rounds": 3}
    expected = final(run(**settings))
    assert same(final(run(grid=Shuffled(app_of(drift), 5), **settings)), expected)
