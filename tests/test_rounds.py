import pytest
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from fedsys import messages
from fedsys.engines.local import LocalGrid
from fedsys.rounds import Round, summarise
from tests.stock_app.toy import reply_of

LocalGrid(ClientApp(), 1)  # Flower refuses to make messages outside an engine

START = {"w": torch.zeros(2)}
NODES = {0: 20, 3: 10, 7: 30}  # clients are not in the order of their nodes


def begun(index=4):
    current = Round(index, NODES, messages.encode(START))
    content = RecordDict({"arrays": current.sent})
    outgoing = current.address("train", ((client, content) for client in NODES))
    for number, message in enumerate(outgoing):
        message.metadata.__dict__["_message_id"] = f"m{number}"
    return current, dict(zip(NODES, outgoing, strict=True))


def answer(message, value=1.0, examples=1, **metrics):
    return Message(reply_of({"w": torch.full((2,), value)}, examples, **metrics), reply_to=message)


def used(current, replies):
    failures = []
    updates = list(current.updates(replies, failures.append))
    current.close(failures.append)
    assert failures == current.failures
    assert [u.client for u in updates] == current.answered
    return updates, {(f.client, f.reason) for f in failures}


def test_messages_are_addressed_to_their_nodes_in_the_group_of_the_round():
    _, sent = begun(4)
    assert {c: m.metadata.dst_node_id for c, m in sent.items()} == NODES
    assert {m.metadata.group_id for m in sent.values()} == {"4"}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize("container", [list, tuple])
def test_updates_come_in_order_of_clients_whatever_the_order_of_replies(order, container):
    current, sent = begun()
    replies = [answer(m, float(c)) for c, m in sent.items()]
    updates, failures = used(current, container(replies[i] for i in order))
    assert [u.client for u in updates] == [0, 3, 7]
    assert [u.delta["w"][0].item() for u in updates] == [0.0, 3.0, 7.0]
    assert not failures


def test_who_never_answers_is_named():
    current, sent = begun()
    updates, failures = used(current, [answer(sent[3])])
    assert [u.client for u in updates] == [3]
    assert failures == {(0, "no reply before the deadline"), (7, "no reply before the deadline")}


def test_an_answer_to_another_kind_of_message_does_not_count():
    current, sent = begun()
    late = answer(sent[3])
    late.metadata.__dict__["_message_type"] = "evaluate"
    updates, failures = used(current, [answer(sent[0]), late, answer(sent[7])])
    assert [u.client for u in updates] == [0, 7]
    assert (3, "answered 'evaluate', and was asked to train") in failures


def test_the_first_of_two_answers_counts():
    current, sent = begun()
    replies = [answer(sent[0], 1.0), answer(sent[0], 9.0), answer(sent[3]), answer(sent[7])]
    updates, failures = used(current, replies)
    assert [u.delta["w"][0].item() for u in updates] == [1.0, 1.0, 1.0]
    assert failures == {(0, "answered twice")}


def test_a_late_answer_does_not_stand_in_for_the_one_expected():
    _, sent_before = begun(3)
    current, sent = begun(4)
    replies = [answer(sent_before[0], 9.0), *(answer(m) for m in sent.values())]
    updates, failures = used(current, replies)
    assert [u.delta["w"][0].item() for u in updates] == [1.0, 1.0, 1.0]
    assert failures == {(0, "answered round '3' in round 4")}


def test_a_late_answer_alone_leaves_its_client_without_a_reply():
    _, sent_before = begun(3)
    current, sent = begun(4)
    updates, failures = used(current, [answer(sent_before[0]), answer(sent[3]), answer(sent[7])])
    assert [u.client for u in updates] == [3, 7]
    assert {client for client, _ in failures} == {0}
    assert len(current.failures) == 2


def test_a_stranger_is_reported_and_not_used():
    current, sent = begun()
    stranger = Message(RecordDict({"arrays": current.sent}), 99, "train", group_id="4")
    updates, failures = used(current, [answer(stranger), *(answer(m) for m in sent.values())])
    assert len(updates) == 3
    assert failures == {(-1, "node 99 was not asked in this round")}


def test_an_error_that_the_server_replies_for_a_lost_node_is_that_nodes():
    """A SuperLink answers for a SuperNode it has lost, as node 1."""
    current, sent = begun()
    lost = Message(Error(3, "Node Unavailable"), reply_to=sent[3])
    lost.metadata.__dict__["_src_node_id"] = 1
    updates, failures = used(current, [answer(sent[0]), lost, answer(sent[7])])
    assert [u.client for u in updates] == [0, 7]
    assert failures == {(3, "Node Unavailable")}


def test_content_cannot_speak_for_another_node():
    current, sent = begun()
    forged = answer(sent[3], 9.0)
    forged.metadata.__dict__["_src_node_id"] = 1
    updates, failures = used(current, [forged, answer(sent[0]), answer(sent[7])])
    assert [u.client for u in updates] == [0, 7]
    assert {client for client, _ in failures} == {-1, 3}


def test_train_metrics_are_means_by_examples_over_those_who_report_them():
    current, sent = begun()
    replies = [
        answer(sent[0], examples=1, train_loss=1.0),
        answer(sent[3], examples=3, train_loss=5.0, rare=7.0),
        answer(sent[7], examples=2),
    ]
    used(current, replies)
    assert dict(current.train_metrics()) == {"train_loss": 4.0, "rare": 7.0, "num-examples": 6}


def test_evaluation_leaves_out_who_reports_nonsense():
    current, sent = begun()
    failures = []

    def metrics(client, **values):
        content = RecordDict({"metrics": MetricRecord(values)})
        return Message(content, reply_to=sent[client])

    replies = [
        metrics(0, **{"num-examples": 2, "eval_accuracy": 0.5}),
        metrics(3, **{"num-examples": 2, "eval_accuracy": float("nan")}),
        metrics(7, **{"num-examples": 0, "eval_accuracy": 1.0}),
    ]
    good = list(current.metrics(replies, failures.append))
    assert good == [(2, {"eval_accuracy": 0.5})]
    assert [failure.client for failure in failures] == [3, 7]


def test_summary_is_weighted_and_has_the_worst_tenth():
    values = [(n + 1, {"eval_accuracy": n / 20, "x": 1.0}) for n in range(20)]
    summary = summarise(values)
    expected = sum(n * (n - 1) / 20 for n in range(1, 21)) / 210
    assert summary["eval_accuracy"] == pytest.approx(expected)
    assert summary["eval_accuracy_worst_decile"] == pytest.approx((0 + 1 / 20) / 2)
    assert summary["x"] == pytest.approx(1.0)
    assert summarise([]) is None


def test_bytes_are_counted_once_a_message_and_apart_for_frozen_factors():
    current = Round(1, NODES, messages.encode(START))
    known = RecordDict({"arrays": messages.encode({"w": torch.zeros(1000)})})
    first = known.copy()
    first["frozen"] = messages.encode({"A": torch.zeros(5000)})
    outgoing = current.address("train", [(0, known), (3, first), (7, known)])
    assert current.bytes_down == 3 * messages.wire_bytes(known)
    assert current.bytes_init == messages.wire_bytes(first) - messages.wire_bytes(known)
    replies = [answer(message) for message in outgoing]
    used(current, replies)
    assert current.bytes_up == sum(messages.wire_bytes(r.content) for r in replies)


def test_a_record_holds_what_was_measured():
    current, sent = begun()
    used(current, [answer(sent[0], train_loss=2.0)])
    result = Result()
    result.train_metrics_clientapp[4] = current.train_metrics()
    result.evaluate_metrics_serverapp[4] = MetricRecord({"eval_accuracy": 0.25})
    record = current.record(result, 1.5)
    assert (record.round, record.clients, record.failures, record.seconds) == (4, 1, 2, 1.5)
    assert (record.train_loss, record.eval_accuracy) == (2.0, 0.25)
    assert (record.eval_loss, record.clients_accuracy, record.epsilon) == (None, None, None)
    assert record.reasons[0].startswith("client 3: no reply")
