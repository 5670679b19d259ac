"""A message in the hands of a node that was killed: the next node answers for it."""

from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsys.deployment.unanswered import FILE, Unanswered
from tests.test_node import NODE, RUN, Node, Server


@pytest.fixture(autouse=True)
def _server_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_run_id": RUN, "_node_id": 1, "_task_id": 9}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def message() -> Message:
    message = Message(RecordDict(), NODE, "train", group_id="7")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def test_a_message_is_found_by_the_next_process(tmp_path: Path, message: Message) -> None:
    Unanswered(tmp_path / "state").note(message)
    found = Unanswered(tmp_path / "state").left()
    assert found is not None
    assert found.metadata == message.metadata


def test_what_is_answered_is_forgotten(tmp_path: Path, message: Message) -> None:
    noted = Unanswered(tmp_path)
    noted.note(message)
    noted.forget()
    assert noted.left() is None
    noted.forget()


@pytest.mark.parametrize("content", [b"", b"\x0a\xff", b"no message"])
def test_a_torn_note_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert Unanswered(tmp_path).left() is None


def test_a_note_that_cannot_be_written_harms_nobody(tmp_path: Path, message: Message) -> None:
    (tmp_path / "state").write_text("a file, where a folder should be")
    noted = Unanswered(tmp_path / "state")
    noted.note(message)
    noted.forget()


def test_a_node_that_was_killed_is_answered_for(tmp_path: Path) -> None:
    server = Server({})
    asked = server.ask("train")
    assert Node(tmp_path / "here", server).pull() == RUN
    assert not server.sent  # and there the node was killed
    Node(tmp_path / "here", server)  # as was this one, before it was let in
    node = Node(tmp_path / "here", server)
    assert node.pull() == RUN
    node.push()
    (sent,) = server.sent
    assert sent.metadata.reply_to_message_id == asked.metadata.message_id
    assert sent.metadata.group_id == asked.metadata.group_id
    assert "restarted" in sent.error.reason
    assert node.pull() is None
    assert len(node.store) == 0


def test_a_node_that_has_answered_is_not_answered_for(tmp_path: Path) -> None:
    server = Server({})
    server.ask("train")
    node = Node(tmp_path / "here", server)
    node.pull()
    node.push()
    assert len(server.sent) == 1
    assert Node(tmp_path / "here", server).pull() is None
    assert len(server.sent) == 1


def test_a_run_that_is_over_asks_for_no_answer(tmp_path: Path) -> None:
    server = Server({}, over=True)
    server.ask("train")
    assert Node(tmp_path / "here", server).pull() is None
    assert Node(tmp_path / "here", server).pull() is None
    assert not server.sent
