import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from clients import CohortApp, LocalTraining, Site
from fedsys.adapters import Full
from fedsys.cohort import CohortModel
from fedsys.data import IID, Digits
from fedsys.engines.base import StreamingGrid, exchange
from fedsys.engines.local import LocalGrid, TrainsCohorts
from fedsys.messages import TensorReply, encode, encode_flat
from fedsys.models import MLP
from tests.stock_app.toy import app_of, arrays_of, client_of, drift, reply_of, same, state_of


def ask(grid, nodes, kind="train", group="7", **records):
    content = RecordDict({"arrays": arrays_of(), **records})
    return [Message(content, node, kind, group_id=group) for node in nodes]


def examples(replies):
    return [r.content["metrics"]["num-examples"] for r in replies]


# ---- Flower's Grid


def test_it_is_a_flower_grid_that_streams():
    grid = LocalGrid(app_of(drift), 4)
    assert isinstance(grid, Grid)
    assert isinstance(grid, StreamingGrid)
    assert list(grid.get_node_ids()) == [2, 3, 4, 5]


@pytest.mark.parametrize("way", ["send", "push", "stream", "exchange"])
def test_every_way_of_sending_gives_the_same_replies(way):
    grid = LocalGrid(app_of(drift), 4)
    sent = ask(grid, [4, 2, 5])
    if way == "send":
        replies = grid.send_and_receive(sent, timeout=1.0)
    elif way == "stream":
        replies = list(grid.stream(sent))
    elif way == "exchange":
        replies = list(exchange(grid, sent, 1.0))
    else:
        ids = list(grid.push_messages(sent))
        assert len(set(ids)) == 3
        replies = [*grid.pull_messages(ids[:1]), *grid.pull_messages([*ids, "unknown"])]
        assert list(grid.pull_messages(ids)) == []
    assert examples(replies) == [3, 1, 4]
    assert [r.metadata.src_node_id for r in replies] == [4, 2, 5]
    assert {r.metadata.group_id for r in replies} == {"7"}
    assert [r.metadata.reply_to_message_id for r in replies] == [
        m.metadata.message_id for m in sent
    ]


def test_create_message():
    message = LocalGrid(app_of(drift), 4).create_message(RecordDict(), "train", 3, "g", ttl=5.0)
    assert (message.metadata.dst_node_id, message.metadata.group_id) == (3, "g")
    assert message.metadata.ttl == 5.0


@pytest.mark.parametrize("bad", [{"num_clients": 0}, {"num_clients": 3, "chunk": 0}])
def test_sizes_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="need a client and a chunk"):
        LocalGrid(ClientApp(), **bad)


def test_a_stream_trains_when_asked():
    trained = []

    def answer(message, context):
        trained.append(client_of(message))
        return drift(message, context)

    grid = LocalGrid(app_of(answer), 4)
    stream = grid.stream(ask(grid, [2, 3, 4]))
    assert trained == []
    next(stream)
    assert trained == [0]


# ---- what clients know and keep


def test_a_client_knows_its_partition_and_the_run_config():
    seen = []

    def answer(message, context):
        seen.append((context.node_id, dict(context.node_config), dict(context.run_config)))
        context.run_config["lr"] = 9.0
        context.node_config["partition-id"] = 9
        return drift(message, context)

    grid = LocalGrid(app_of(answer), 4, run_config={"lr": 0.5})
    grid.send_and_receive(ask(grid, [2, 5, 2]))
    node = {"num-partitions": 4}
    expected = [(2, 0), (5, 3), (2, 0)]
    assert seen == [(n, {"partition-id": c, **node}, {"lr": 0.5}) for n, c in expected]


def counting(message, context):
    state = context.state
    if "count" not in state:
        state["count"] = MetricRecord({"n": 0})
    state["count"]["n"] += 1
    if state["count"]["n"] == 2 and client_of(message) == 1:
        raise RuntimeError("on the second call")
    return reply_of(state_of(), state["count"]["n"])


def test_memory_is_the_clients_own_and_survives_its_errors_as_it_was():
    grid = LocalGrid(app_of(counting), 4)
    first, second = (grid.send_and_receive(ask(grid, [2, 3])) for _ in range(2))
    assert examples(first) == [1, 1]
    assert examples(second[:1]) == [2]
    assert second[1].has_error()
    assert grid.states[1]["count"]["n"] == 1
    assert set(grid.states) == {0, 1}


def test_clients_without_memory_cost_nothing():
    grid = LocalGrid(app_of(drift), 1000)
    grid.send_and_receive(ask(grid, range(2, 500)))
    assert grid.states == {}


# ---- nobody changes what another one gets


def vandal(message, context):
    content = message.content
    if client_of(message) == 0:
        arrays = content["arrays"]
        arrays["w"].numpy()[:] = 9
        arrays.to_torch_state_dict()["b"].fill_(9)
        for name in list(arrays):
            array = arrays[name]
            for field, value in (("data", b""), ("shape", (9,)), ("dtype", "int8")):
                try:
                    setattr(array, field, value)
                except AttributeError:
                    continue
        del arrays["w"]
        arrays["x"] = arrays["b"]
        content["config"]["lr"] = 9.0
        del content["config"]
        message.metadata.group_id = "99"
        return reply_of(state_of())
    return drift(message, context)


@pytest.mark.parametrize("make", [encode, ArrayRecord])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_client_that_destroys_its_message_harms_nobody(make, chunk):
    grid = LocalGrid(app_of(vandal), 3, chunk=chunk)
    arrays, config = make(state_of()), ConfigRecord({"lr": 0.5})
    content = RecordDict({"arrays": arrays, "config": config})
    sent = [Message(content, node, "train", group_id="7") for node in (2, 3, 4)]
    replies = grid.send_and_receive(sent)
    good = LocalGrid(app_of(drift), 3).send_and_receive(ask(grid, [3, 4]))
    for reply, expected in zip(replies[1:], good, strict=True):
        assert same(
            reply.content["arrays"].to_torch_state_dict(),
            expected.content["arrays"].to_torch_state_dict(),
        )
    assert same(dict(arrays.to_torch_state_dict()), state_of())
    assert dict(content["config"]) == {"lr": 0.5}
    assert [m.metadata.group_id for m in sent] == ["7", "7", "7"]


# ---- what goes wrong


def test_errors_name_what_was_raised():
    def answer(message, context):
        if client_of(message) == 1:
            raise KeyError("no such column")
        return drift(message, context)

    grid = LocalGrid(app_of(answer), 3)
    replies = grid.send_and_receive(ask(grid, [2, 3, 4]))
    assert [r.has_error() for r in replies] == [False, True, False]
    assert replies[1].error.reason == "KeyError: 'no such column'"
    assert replies[1].metadata.src_node_id == 3


def test_an_action_that_the_app_does_not_have_is_an_error():
    grid = LocalGrid(app_of(drift), 3)
    (reply,) = grid.send_and_receive(ask(grid, [2], "train.nothing"))
    assert "nothing" in reply.error.reason


@pytest.mark.parametrize("answer", [None, RecordDict(), "text"])
def test_an_app_that_returns_no_message_is_an_error(answer):
    app = ClientApp()
    app.train()(lambda message, context: answer)
    grid = LocalGrid(app, 3)
    (reply,) = grid.send_and_receive(ask(grid, [2]))
    assert type(answer).__name__ in reply.error.reason


@pytest.mark.parametrize("chunk", [1, 10])
def test_offline_and_unknown_nodes_are_not_connected(chunk):
    grid = LocalGrid(app_of(drift), 4, offline={1}, chunk=chunk)
    assert list(grid.get_node_ids()) == [2, 4, 5]
    replies = grid.send_and_receive(ask(grid, [2, 3, 4, 1, 0, 6, 2**63]))
    assert [r.has_error() for r in replies] == [False, True, False, True, True, True, True]
    assert replies[1].error.reason == "the node is not connected"


@pytest.mark.parametrize("chunk", [1, 10])
def test_lost_messages_are_never_answered(chunk):
    grid = LocalGrid(app_of(drift), 4, lost=lambda m: client_of(m) in {1, 3}, chunk=chunk)
    assert examples(grid.send_and_receive(ask(grid, [2, 3, 4, 5]))) == [1, 3]


# ---- cohorts


class Cohort(ClientApp):
    """Trains together, or alone; notes how many at a time."""

    runs_alone = False

    def __init__(self, bad=(), short=False):
        super().__init__()
        self.bad, self.short, self.sizes = bad, short, []
        self.train()(lambda message, context: self.train_cohort([message], [context])[0])

    def train_cohort(self, messages, contexts):
        self.sizes.append(len(messages))
        for message, context in zip(messages, contexts, strict=True):
            if client_of(message) in self.bad:
                raise RuntimeError("bad data")
            context.state["seen"] = MetricRecord({"n": client_of(message)})
        replies = [
            Message(drift(m, c), reply_to=m) for m, c in zip(messages, contexts, strict=True)
        ]
        return replies[1:] if self.short and len(replies) > 1 else replies


def test_messages_of_a_round_train_in_chunks():
    app = Cohort()
    grid = LocalGrid(app, 7, chunk=3)
    assert examples(grid.send_and_receive(ask(grid, range(2, 9)))) == [1, 2, 3, 4, 5, 6, 7]
    assert app.sizes == [3, 3, 1]
    assert set(grid.states) == set(range(7))


def test_messages_with_other_arrays_train_apart():
    app = Cohort()
    grid = LocalGrid(app, 4, chunk=10)
    grid.send_and_receive([*ask(grid, [2, 3]), *ask(grid, [4, 5])])
    assert app.sizes == [2, 2]


def test_an_app_that_runs_alone_is_given_one_at_a_time():
    app = Cohort()
    app.runs_alone = True
    grid = LocalGrid(app, 4, chunk=10)
    grid.send_and_receive(ask(grid, [2, 3]))
    assert app.sizes == [1, 1]


@pytest.mark.parametrize("app", [Cohort(bad={1}), Cohort(short=True)])
def test_a_cohort_that_fails_is_run_one_by_one(app):
    grid = LocalGrid(app, 4, chunk=4)
    replies = grid.send_and_receive(ask(grid, [2, 3, 4, 5]))
    assert [r.has_error() for r in replies] == [client in app.bad for client in range(4)]
    assert app.sizes == [4, 1, 1, 1, 1]
    assert set(grid.states) == {0, 1, 2, 3} - set(app.bad)


def cohort_app(mods=None, clients=4):
    dataset = Digits().load(None, 0, ())
    model = MLP(hidden=[8], pretrained=False).build(dataset, 0)
    Full().attach(model, 0)
    site = Site(
        model=CohortModel(model),
        examples=dataset.train,
        shards=IID().split(dataset, clients, 0),
        training=LocalTraining(lr=0.1, batch_size=64),
        local_gradient=lambda params, start: {},
        rounds=1,
        seed=0,
        device=torch.device("cpu"),
    )
    return site, CohortApp(lambda context: site, mods)


def train_message(site, nodes):
    content = RecordDict({"arrays": encode_flat(site.model.initial)})
    content["config"] = ConfigRecord({"server-round": 1, "basis": ""})
    return [Message(content, node, "train", group_id="1") for node in nodes]


def vectors(replies):
    return [torch.from_numpy(r.content["arrays"]["packed"].numpy()) for r in replies]


def test_a_client_without_data_fails_alone_in_our_own_app():
    site, app = cohort_app()
    assert isinstance(app, TrainsCohorts)
    rows = site.shards.rows

    class Missing:
        def __len__(self):
            return 4

        def rows(self, client):
            return rows(client)[: 0 if client == 2 else None]

    good = vectors(LocalGrid(app, 4, chunk=4).send_and_receive(train_message(site, [2, 3, 5])))
    site.shards = Missing()
    replies = LocalGrid(app, 4, chunk=4).send_and_receive(train_message(site, [2, 3, 4, 5]))
    assert "no examples" in replies.pop(2).error.reason
    for mine, expected in zip(vectors(replies), good, strict=True):
        assert torch.allclose(mine, expected, atol=1e-6)


def test_a_message_alone_is_answered_by_flowers_own_class_and_a_cohort_without_records():
    site, app = cohort_app()
    grid = LocalGrid(app, 4, chunk=4)
    (alone,) = grid.send_and_receive(train_message(site, [3]))
    assert type(alone) is Message
    together = grid.send_and_receive(train_message(site, [2, 3]))
    assert [type(reply) for reply in together] == [TensorReply, TensorReply]
    assert all(reply.held is not None for reply in together)
    assert torch.allclose(*vectors([alone, together[1]]), atol=1e-6)
    assert {*alone.content} == {*together[1].content} == {"arrays", "metrics"}


def test_mods_see_each_message_once_and_change_nothing_by_watching():
    seen = []

    def watch(message, context, call_next):
        seen.append(client_of(message))
        return call_next(message, context)

    site, app = cohort_app([watch])
    assert app.runs_alone
    alone = LocalGrid(app, 4, chunk=4).send_and_receive(train_message(site, range(2, 6)))
    assert seen == [0, 1, 2, 3]
    site, app = cohort_app()
    together = LocalGrid(app, 4, chunk=4).send_and_receive(train_message(site, range(2, 6)))
    for mine, expected in zip(vectors(alone), vectors(together), strict=True):
        assert torch.allclose(mine, expected, atol=1e-6)


def test_our_app_evaluates_and_says_who_it_is():
    site, app = cohort_app()
    grid = LocalGrid(app, 4)
    message = train_message(site, [4])[0]
    (answer,) = grid.send_and_receive([Message(message.content, 4, "evaluate")])
    metrics = answer.content["metrics"]
    assert metrics["num-examples"] == len(site.shards.rows(2))
    assert 0 <= metrics["eval_accuracy"] <= 1
    (answer,) = grid.send_and_receive([Message(RecordDict(), 4, "query.whoami")])
    assert answer.content["metrics"]["partition-id"] == 2


def test_our_app_refuses_what_does_not_fit_its_model():
    site, app = cohort_app()
    grid = LocalGrid(app, 4)
    for arrays, basis, reason in (
        (encode_flat(torch.zeros(3)), "", "does not fit"),
        (encode_flat(site.model.initial), "feed" * 16, "frozen factors"),
    ):
        config = ConfigRecord({"server-round": 1, "basis": basis})
        content = RecordDict({"arrays": arrays, "config": config})
        (reply,) = grid.send_and_receive([Message(content, 2, "train")])
        assert reason in reply.error.reason


class Cramped(ClientApp):
    """An app that has memory for a few clients only, and notes how many it was given."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.passes, self.runs_alone = room, [], False
        self.train()(lambda message, context: self.train_cohort([message], [context])[0])

    def train_cohort(self, messages, contexts):
        self.passes.append(len(messages))
        if len(messages) > self.room:
            raise torch.OutOfMemoryError("no more")
        pairs = zip(messages, contexts, strict=True)
        return [Message(drift(message, context), reply_to=message) for message, context in pairs]


@pytest.mark.parametrize("room", [1, 2, 3, 10])
def test_where_memory_is_short_passes_are_smaller_from_then_on(room):
    app = Cramped(room)
    grid = LocalGrid(app, 20, chunk=10)
    for _ in range(2):
        app.passes.clear()
        replies = list(grid.stream(ask(grid, range(2, 22))))
        assert examples(replies) == list(range(1, 21))
        assert [r.metadata.src_node_id for r in replies] == list(range(2, 22))
    assert max(app.passes) <= room  # what did not fit is not tried again
    assert sum(app.passes) == 20  # nobody trained twice


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_a_pass_that_does_not_fit_is_tried_a_few_times_only(room):
    app = Cramped(room)
    list(LocalGrid(app, 20, chunk=16).stream(ask(LocalGrid(app, 20), range(2, 22))))
    failed = [count for count in app.passes if count > room]
    assert failed == [size for size in (16, 8, 4, 2) if size > room]
