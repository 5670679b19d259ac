"""The policy around Flower's own loop: what is refused is not started, and does not leave."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeState, NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message, _push_messages

from fedsys.config import build, compose
from fedsys.deployment import apart, examining, gate
from fedsys.deployment.bundle import bundle
from fedsys.deployment.device import Device
from fedsys.deployment.disclosure import LAST_RUN, disclosure
from fedsys.deployment.gate import Gate
from fedsys.deployment.policy import Policy
from fedsys.deployment.terms import of_rows
from fedsys.messages import encode, spent_numbers
from fedsys.params import Params, digest
from fedsys.privacy.accounting import Release
from fedsys.privacy.ledger import Ledger, NewEntry
from fedsys.secagg.rounds import MASKED

CODE = bundle().content
POLICY = {
    "code": f"[{bundle().hash}]",
    "strategies": "any",
    "adapters": "any",
    "privacy": "sample",
    "max_epsilon": "3.0",
    "max_delta": "1.0e-5",
    "max_clipping_norm": "1.0",
    "max_bytes": "100000",
    "min_examples": "50",
    "evaluate": "false",
    "max_rounds": "null",
}
DEVICE = """\
name: here
number: 3
server: 127.0.0.1:1
devices: 5
data: null
threads: null
memory_mb: null
seconds: {seconds}
port: 0
"""
RUN, NODE = 77, 5
ARRAYS: Params = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2)}
RELEASE = Release(2.0, 0.05, 100)


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return build(compose(["privacy=sample", "privacy.epsilon=3", "privacy.delta=1e-6"])).resolved


@pytest.fixture(autouse=True)
def _examined_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare most tests the seconds that a process of its own takes."""
    monkeypatch.setattr(gate, "examine", examining.examine)


@pytest.fixture(autouse=True)
def _server_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_run_id": RUN, "_node_id": 1, "_task_id": 9}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


@dataclass
class Server:
    """A SuperLink as a SuperNode sees it, and what it was sent."""

    settings: dict[str, Any]
    content: bytes = CODE
    run: dict[str, Any] = field(default_factory=dict)  # what it says of its run otherwise
    messages: list[Message] = field(default_factory=list)
    sent: list[Message] = field(default_factory=list)  # replies
    pushed: dict[str, bytes] = field(default_factory=dict)  # their objects
    confirmed: list[str] = field(default_factory=list)
    fetched: int = 0  # bundles
    over: bool = False

    def ask(self, kind: str = "train", group: str = "1") -> Message:
        """Have a message waiting."""
        content = RecordDict({"config": ConfigRecord({"server-round": len(self.messages)})})
        message = Message(content, NODE, kind, group_id=group)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.messages.append(message)
        return message

    def receive(self) -> Any:
        if not self.messages:
            return None
        self.at_hand = self.messages.pop(0)
        empty = Message(RecordDict(), metadata=self.at_hand.metadata)
        return empty, get_object_tree(self.at_hand)

    def get_run(self, run_id: int) -> Run:
        known = vars(Run.create_empty(run_id)) | {
            "fab_id": "fedsys/fedsys",
            "fab_version": bundle_version(),
            "fab_hash": Fab_hash(self.content),
            "override_config": {"hydra-json": json.dumps(self.settings), "run": "abc"},
        }
        return Run(**known | self.run)

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        self.fetched += 1
        return Fab(fab_hash, self.content, {})

    def pull_object(self, run_id: int, object_id: str) -> bytes:
        return get_all_nested_objects(self.at_hand)[object_id].deflate()

    def confirm(self, run_id: int, message_id: str) -> None:
        if self.over:
            raise RunNotRunningException
        self.confirmed.append(message_id)

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        self.sent.append(message)
        return {node.object_id for node in iterate_object_tree(tree)}, "session"

    def push_object(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        self.pushed[object_id] = content

    @property
    def received(self) -> Message:
        """The last reply, put together from the bytes that were sent."""
        whole = inflate_object_from_contents(self.sent[-1].metadata.message_id, dict(self.pushed))
        assert isinstance(whole, Message)
        return whole


def bundle_version() -> str:
    from importlib.metadata import version

    return version("fedsys")


def Fab_hash(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


@dataclass
class Apps:
    """The processes of ClientApps, of which there are none here."""

    alive: bool = True
    runs: bool = False
    ended: int = 0

    def can_start(self) -> bool:
        return self.alive

    def any_runs(self) -> bool:
        return self.runs

    def end(self) -> None:
        self.ended += 1


@dataclass
class Node:
    """A SuperNode's loop, step by step, with the gate around it."""

    folder: Path
    server: Server
    seconds: float = 20.0

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "device.yaml").write_text(DEVICE.format(seconds=self.seconds))
        self.permit()
        states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        self.state: NodeState = states.state()
        self.store = states.objectstore_factory.store()
        self.state.set_node_id(NODE)
        self.device = Device.load(self.folder)
        self.said: list[str] = []
        self.apps = Apps()
        self.gate = Gate(self.device, self.apps, self.said.append)

    def permit(self, **changes: str) -> None:
        lines = [f"{key}: {value}" for key, value in (POLICY | changes).items()]
        self.device_policy.write_text("\n".join(lines) + "\n")

    @property
    def device_policy(self) -> Path:
        return self.folder / "policy.yaml"

    def pull(self) -> int | None:
        server = self.server
        return self.gate.pull(
            _pull_and_store_message,
            state=self.state,
            object_store=self.store,
            node_config=self.device.node_config,
            receive=server.receive,
            get_run=server.get_run,
            get_fab=server.get_fab,
            pull_object=server.pull_object,
            confirm_message_received=server.confirm,
            trusted_entities=None,
        )

    def push(self) -> None:
        self.gate.push(
            _push_messages,
            state=self.state,
            object_store=self.store,
            send=self.server.send,
            push_object=self.server.push_object,
        )

    @property
    def tasks(self) -> list[Any]:
        return list(self.state.get_tasks())

    def take(self) -> Message:
        """Do as a ClientApp that fetches its message; return it."""
        task = next(t for t in self.tasks if t.status.status == Status.PENDING)
        assert self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        (message,) = self.state.get_messages_legacy(run_ids=[RUN], is_reply=False, limit=1)
        self.state.record_message_processing_start(message.metadata.message_id)
        self.store.delete(message.metadata.message_id)
        self.apps.runs = True
        return message

    def give(self, reply: Message, objects: Callable[[str], bool] = lambda _: True) -> None:
        """Do as a ClientApp that sends ``reply``, and of its objects those chosen."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        session = self.state.start_session(RUN)
        bare = (
            Message(reply.error, metadata=reply.metadata)
            if reply.has_error()
            else Message(RecordDict(), metadata=reply.metadata)
        )
        stored, _ = self.state.store_message_and_object_tree(bare, get_object_tree(reply), session)
        assert stored
        for name, part in get_all_nested_objects(reply).items():
            if objects(name):
                self.state.store_object(RUN, session, name, part.deflate())

    def finish(self) -> None:
        """Do as a ClientApp that ends."""
        self.apps.runs = False
        for task in self.tasks:
            if task.status.status == Status.RUNNING:
                self.state.finish_task(task.task_id, SubStatus.COMPLETED, "")

    def answer(self, reply: Callable[[Message], Message]) -> None:
        """Take a message, answer it, and have the answer judged."""
        self.server.ask()
        assert self.pull() == RUN
        self.give(reply(self.take()))
        self.finish()
        self.push()


@pytest.fixture
def server(composed: dict[str, Any]) -> Server:
    return Server(composed)


@pytest.fixture
def node(tmp_path: Path, server: Server) -> Iterator[Node]:
    node = Node(tmp_path / "here", server)
    yield node
    # Whatever happened, nothing is left: a SuperNode runs for months.
    node.finish()
    assert len(node.store) == 0
    assert not node.state.msg_store  # type: ignore[attr-defined]
    assert all(task.status.status == Status.FINISHED for task in node.tasks)


def entered(node: Node, arrays: Params = ARRAYS, **changes: Any) -> None:
    known: dict[str, Any] = {
        "run": "abc",
        "round": 1,
        "client": "digits#3",
        "data": "digits",
        "fingerprint": "f",
        "num_examples": 60,
        "mechanism": "dp-sgd",
        "release": RELEASE,
        "clipping_norm": 1.0,
        "target": 3.0,
        "delta": 1e-6,
        "stream": f"stream {len(changes)} {sorted(arrays)}",
        "reply": digest(arrays),
    }
    with Ledger(node.device.ledger) as ledger:
        ledger.append([NewEntry(**known | changes)])


def private_reply(
    arrays: Params = ARRAYS, count: float = 60, spent: Any = (RELEASE,), **more: Any
) -> Callable[[Message], Message]:
    def reply(asked: Message) -> Message:
        content = RecordDict({"arrays": encode(arrays)})
        content["metrics"] = MetricRecord({"num-examples": count, **more})
        if spent is not None:
            content["reply"] = ConfigRecord({"spent": spent_numbers(spent)})
        return Message(content, reply_to=asked)

    return reply


def no_array_left(server: Server) -> bool:
    return not any(part.deflate() in server.pushed.values() for part in encode(ARRAYS).values())


# ---- what is allowed


def test_what_is_allowed_leaves_as_it_is(node: Node, server: Server) -> None:
    entered(node)
    node.answer(private_reply())
    received = server.received.content
    assert isinstance(received["arrays"], ArrayRecord)
    assert digest({n: torch.from_numpy(a.numpy()) for n, a in received["arrays"].items()}) == (
        digest(ARRAYS)
    )
    assert received["metrics"] == MetricRecord({"num-examples": 60})
    assert len(server.sent) == 1
    assert len(server.confirmed) == 1


def test_a_process_of_its_own_judges_the_same(
    node: Node, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "examine", apart.examine)
    entered(node)
    node.answer(private_reply())
    assert server.received.has_content()
    entered(node, {}, release=Release(0.6, 0.5, 500), run="before")
    node.answer(private_reply())
    assert "epsilon" in server.sent[-1].error.reason


def test_a_reply_is_examined_when_its_client_app_has_ended(
    node: Node, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def examine(*given: Any) -> list[str]:
        seen.append(node.apps.any_runs())
        return examining.examine(*given)

    monkeypatch.setattr(gate, "examine", examine)
    entered(node)
    server.ask()
    node.pull()
    node.give(private_reply()(node.take()))
    end = threading.Timer(0.5, node.finish)
    end.start()
    node.push()
    end.join()
    assert seen == [False]
    assert server.received.has_content()


def test_a_client_app_that_does_not_end_holds_nothing_up(
    node: Node, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_ENDING", 0.1)
    entered(node)
    server.ask()
    node.pull()
    node.give(private_reply()(node.take()))
    node.push()
    assert server.received.has_content()


def test_when_that_process_fails_nothing_leaves(
    node: Node, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "examine", apart.examine)
    monkeypatch.setattr(apart.sys, "executable", "/bin/false")
    entered(node)
    node.answer(private_reply())
    assert server.sent[-1].error.reason == "policy: it cannot be judged"


def test_a_node_that_waits_has_not_loaded_torch() -> None:
    heavy = "'torch', 'scipy', 'hydra', 'transformers', 'ray', 'matplotlib'"
    code = (
        "import sys, fedsys.deployment.node, fedsys.deployment.gate, fedsys.deployment.join\n"
        f"print([name for name in ({heavy}) if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_message_that_cannot_be_fetched_is_answered(
    node: Node, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run_id: int, object_id: str) -> bytes:
        raise OSError("cut off")

    server.ask()
    with monkeypatch.context() as line:
        line.setattr(server, "pull_object", broken)
        assert node.pull() == RUN
    node.push()
    assert server.sent[-1].error.reason == "the message could not be fetched whole"
    entered(node)
    node.answer(private_reply())
    assert server.received.has_content()


def test_the_ledger_is_read_while_a_client_holds_it(node: Node, server: Server) -> None:
    entered(node)
    with Ledger(node.device.ledger):
        node.answer(private_reply())
    assert server.received.has_content()


def test_nothing_to_do_is_nothing(node: Node, server: Server) -> None:
    assert node.pull() is None
    assert server.sent == []


def test_a_run_is_fetched_once_and_remembered(node: Node, server: Server) -> None:
    entered(node)
    node.answer(private_reply())
    assert node.answer(private_reply()) is None
    assert server.fetched == 1
    last = json.loads((node.device.state / LAST_RUN).read_text())
    assert last["run"] == "abc"


@pytest.mark.slow
def test_a_dry_run_names_what_the_last_run_trained(node: Node, server: Server) -> None:
    entered(node)
    node.answer(private_reply())
    told = disclosure(node.device, Policy.load(node.device_policy))
    assert "fc1.R.weight" in told
    assert "digits#3: epsilon" in told
    assert bundle().hash in told


# ---- what may not run


def refused(node: Node, server: Server) -> Error:
    """Return the error that a message was answered with, of which nothing else is left."""
    before = len(node.tasks)
    assert node.pull() == RUN
    assert len(node.tasks) == before  # nothing was started
    node.push()
    assert server.confirmed[-1] == server.sent[-1].metadata.reply_to_message_id
    assert server.sent[-1].has_error()
    return server.sent[-1].error


def test_code_that_is_not_allowed_is_not_even_opened(node: Node, server: Server) -> None:
    server.content = b"this is no archive, and opening it would fail"
    server.ask()
    error = refused(node, server)
    assert error.code == ErrorCode.INVALID_FAB
    assert str(error.reason).startswith("policy: the code")
    assert node.state.get_run(RUN) is None
    assert node.state.get_fab(Fab_hash(server.content)) is None


def test_settings_that_are_not_allowed_are_refused(node: Node, server: Server) -> None:
    server.settings = server.settings | {"privacy": {"_target_": None}}
    server.ask()
    assert "privacy is none" in str(refused(node, server).reason)


@pytest.mark.parametrize(
    ("data", "partition", "own", "reasons"),
    [
        ({"_target_": "fedsys.data.Digits"}, "fedsys.data.IID", False, []),
        ({"path": "/etc/passwd"}, "fedsys.data.IID", False, ["data.path"]),
        ({"eval_path": "../b.csv"}, "fedsys.data.IID", False, ["data.eval_path"]),
        ({"path": "public.csv"}, "fedsys.data.OnDevices", True, []),
        ({"path": "public.csv"}, "fedsys.data.OnDevices", False, ["no rows of its own"]),
        ({"_target_": "fedsys.data.Digits"}, "fedsys.data.IID", True, ["its own rows only"]),
        (None, None, True, ["its own rows only"]),
    ],
)
def test_which_file_is_read_is_up_to_the_device(
    data: Any, partition: str | None, own: bool, reasons: list[str]
) -> None:
    settings = {"data": data, "partition": partition and {"_target_": partition}}
    found = of_rows(settings, own)
    assert len(found) == len(reasons)
    assert all(word in reason for word, reason in zip(reasons, found, strict=True))


@pytest.mark.parametrize(
    "lie",
    [
        {"fab_hash": "0" * 64},
        {"fab_id": "fedsys/other"},
        {"fab_id": "../fedsys"},
        {"fab_version": "9"},
        {"primary_task_type": TaskType.AGENT_APP},
        {"override_config": {}},
        {"override_config": {"overrides": "privacy=sample"}},
        {"override_config": {"hydra-json": "[]"}},
        {"override_config": {"hydra-json": "{"}},
        {"override_config": {"hydra-json": 3}},
    ],
    ids=str,
)
def test_a_run_that_is_not_what_it_says_is_refused(
    lie: dict[str, Any], node: Node, server: Server
) -> None:
    server.run = lie
    server.ask()
    assert str(refused(node, server).reason).startswith("policy: ")


def test_evaluation_is_refused_before_anything_is_fetched(node: Node, server: Server) -> None:
    server.ask("evaluate")
    assert "evaluate" in str(refused(node, server).reason)
    assert server.fetched == 0


def test_a_policy_holds_from_the_moment_it_is_written(node: Node, server: Server) -> None:
    entered(node)
    node.answer(private_reply())
    node.permit(max_epsilon="2.0")
    server.ask()
    assert "privacy.epsilon" in str(refused(node, server).reason)
    node.permit()
    node.answer(private_reply())
    assert server.received.has_content()


def test_a_policy_that_cannot_be_read_permits_nothing(node: Node, server: Server) -> None:
    node.device_policy.write_text("code: [\n")
    server.ask()
    assert "cannot be used" in str(refused(node, server).reason)
    node.device_policy.unlink()
    server.ask()
    assert "cannot be used" in str(refused(node, server).reason)
    assert any("policy.yaml" in line for line in node.said)  # here, in full


def test_a_refusal_of_a_run_that_is_over_is_sent_to_nobody(node: Node, server: Server) -> None:
    server.over = True
    server.ask("evaluate")
    assert node.pull() is None
    assert server.sent == []


# ---- what may not leave


REPLIES: dict[str, Callable[[Message], Message]] = {
    "not entered": private_reply({"layer.weight": torch.zeros(2, 3)}),
    "says nothing of spending": private_reply(spent=None),
    "spent too much": private_reply(spent=(Release(0.5, 0.5, 1000),)),
    "without noise": private_reply(spent=(Release(0.0, 0.5, 1),)),
    "too few rows": private_reply(count=49),
    "half a row": private_reply(count=50.5),
    "a loss": private_reply(train_loss=0.5),
    "too large": private_reply({"layer.weight": torch.rand(40_000)}),
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_a_reply_that_may_not_leave_does_not(
    reply: Callable[[Message], Message], node: Node, server: Server
) -> None:
    entered(node)
    node.answer(reply)
    assert server.sent[-1].has_error()
    assert str(server.sent[-1].error.reason).startswith("policy: ")
    assert server.received.has_error()
    assert len(server.pushed) == 1  # the error, and nothing that it replaces
    assert no_array_left(server)


def test_what_the_ledger_says_counts_and_not_what_the_client_says(
    node: Node, server: Server
) -> None:
    entered(node)
    entered(node, {}, release=Release(0.6, 0.5, 500), run="before")
    node.answer(private_reply())
    assert "epsilon" in str(server.sent[-1].error.reason)
    assert no_array_left(server)


def test_without_a_ledger_or_with_an_altered_one_nothing_leaves(node: Node, server: Server) -> None:
    node.answer(private_reply())
    assert server.sent[-1].has_error()
    entered(node)
    path = node.device.ledger / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"num_examples":60', b'"num_examples":61'))
    node.answer(private_reply())
    assert server.sent[-1].has_error()
    assert no_array_left(server)


def test_extra_parts_do_not_leave(node: Node, server: Server) -> None:
    entered(node)

    def smuggling(name: str, record: Any) -> Callable[[Message], Message]:
        def reply(asked: Message) -> Message:
            message = private_reply()(asked)
            message.content[name] = record
            return message

        return reply

    for name, record in (
        ("more", encode(ARRAYS)),
        ("more", MetricRecord({"age": 3})),
        ("secagg", ConfigRecord({"rows": b"secret"})),
        ("reply", ConfigRecord({"spent": spent_numbers((RELEASE,)), "rows": "secret"})),
        ("reply", ConfigRecord({"spent": spent_numbers((RELEASE,)), "basis": "s" * 65})),
    ):
        node.answer(smuggling(name, record))
        assert server.sent[-1].has_error()
    assert not any(b"secret" in content for content in server.pushed.values())


def test_a_reply_is_marked_as_its_message_is(node: Node, server: Server) -> None:
    entered(node)

    def marked(asked: Message) -> Message:
        message = private_reply()(asked)
        message.metadata.__dict__["_group_id"] = "secret"
        return message

    node.answer(marked)
    assert server.sent[-1].has_error()
    assert server.sent[-1].metadata.group_id == "1"


def test_a_policy_tightened_while_a_client_works_holds_for_its_reply(
    node: Node, server: Server
) -> None:
    entered(node)
    for changes in ({"max_bytes": "10"}, {"strategies": "[FedAU]"}, {"nonsense": "1"}):
        node.permit()
        server.ask()
        node.pull()
        node.give(private_reply()(node.take()))
        node.finish()
        node.permit(**changes)
        node.push()
        assert server.sent[-1].has_error()
    assert no_array_left(server)


def test_a_masked_update_needs_an_entry_of_its_round(
    node: Node, server: Server, composed: dict[str, Any]
) -> None:
    server.settings = composed | {"secagg": {"_target_": "fedsys.secagg.SecureAggregation"}}
    masked = private_reply({MASKED: torch.arange(9)})
    node.answer(masked)
    assert server.sent[-1].has_error()
    entered(node, {}, stream="failed")  # a failure was charged, and nothing made
    node.answer(masked)
    assert server.sent[-1].has_error()
    entered(node, round=2)
    node.answer(masked)
    assert server.sent[-1].has_error()
    entered(node, round=1, stream="s")
    node.answer(masked)
    assert server.received.has_content()


def test_reasons_of_private_clients_stay(node: Node, server: Server) -> None:
    reason = "<class 'KeyError'>:<'patient 17 has HIV'>"
    node.answer(lambda asked: Message(Error(2, reason), reply_to=asked))
    error = server.sent[-1].error
    assert error.code == 2
    assert "patient" not in str(error.reason)
    assert not any(b"patient" in content for content in server.pushed.values())


# ---- clients that fail


def test_a_client_that_hangs_is_ended_and_answered_for(tmp_path: Path, server: Server) -> None:
    node = Node(tmp_path / "here", server, seconds=0.5)
    server.ask()
    assert node.pull() == RUN
    node.take()
    begun = time.monotonic()
    node.push()
    assert time.monotonic() - begun < 10
    assert node.apps.ended == 1
    assert server.sent[-1].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert "0.5 seconds" in str(server.sent[-1].error.reason)
    # Else it would be taken for lost in a minute, and the message then in hand with it.
    assert all(task.status.status == Status.FINISHED for task in node.tasks)
    assert len(node.store) == 0


def test_after_a_client_that_hung_the_next_is_served(tmp_path: Path, server: Server) -> None:
    node = Node(tmp_path / "here", server, seconds=1.5)
    entered(node)
    server.ask()
    node.pull()
    hung = node.take()
    node.push()
    # Its reply comes late, to nobody; the next message's is sent.
    late = private_reply(count=61)(hung)
    server.ask()
    node.pull()
    node.give(late)
    node.give(private_reply()(node.take()))
    node.finish()
    node.push()
    assert [m.has_error() for m in server.sent] == [True, False]
    assert server.received.content["metrics"]["num-examples"] == 60
    assert len(node.store) == 0


def test_a_client_that_returns_nothing_is_answered_for_at_once(node: Node, server: Server) -> None:
    server.ask()
    node.pull()
    node.take()
    node.finish()
    begun = time.monotonic()
    node.push()
    assert time.monotonic() - begun < 5  # of 20
    assert "without a reply" in str(server.sent[-1].error.reason)


def test_a_client_that_dies_is_answered_for_at_once(node: Node, server: Server) -> None:
    server.ask()
    node.pull()
    node.take()
    node.apps.runs = False
    begun = time.monotonic()
    node.push()
    assert time.monotonic() - begun < 5  # of 20
    assert "died" in str(server.sent[-1].error.reason)


def test_a_client_that_died_after_its_reply_has_replied(node: Node, server: Server) -> None:
    entered(node)
    server.ask()
    node.pull()
    node.give(private_reply()(node.take()))
    node.apps.runs = False
    node.push()
    assert server.received.has_content()


def test_a_client_that_has_not_started_yet_is_waited_for(tmp_path: Path, server: Server) -> None:
    node = Node(tmp_path / "here", server, seconds=1.0)
    node.apps.runs = False
    server.ask()
    node.pull()
    node.push()
    assert "1 seconds" in str(server.sent[-1].error.reason)


def test_a_reply_that_is_cut_off_is_none(node: Node, server: Server) -> None:
    entered(node)
    server.ask()
    node.pull()
    reply = private_reply()(node.take())
    missing = next(iter(get_all_nested_objects(reply)))
    node.give(reply, lambda name: name != missing)
    node.finish()
    node.push()
    assert server.sent[-1].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert len(server.pushed) == 1


def test_a_slow_client_is_waited_for(node: Node, server: Server) -> None:
    entered(node)
    server.ask()
    node.pull()

    def work() -> None:
        message = node.take()
        time.sleep(0.7)
        node.give(private_reply()(message))
        node.finish()

    thread = threading.Thread(target=work)
    thread.start()
    node.push()
    thread.join()
    assert server.received.has_content()


def test_without_a_starter_of_client_apps_the_loop_ends(node: Node, server: Server) -> None:
    server.ask()
    node.pull()
    node.apps.alive = False
    node.push()
    assert "has ended" in str(server.sent[-1].error.reason)
    with pytest.raises(RuntimeError, match="has ended"):
        node.pull()
