"""Who is asked who it is, how often, and what is said where too few take part."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsys import invitations
from fedsys.errors import RunError
from fedsys.invitations import Invitations


@pytest.fixture(autouse=True)
def _server_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_run_id": 7, "_node_id": 1, "_task_id": 9}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that only sleeping moves."""
    clock = SimpleNamespace(time=1000.0)

    def sleep(seconds: float) -> None:
        clock.time += seconds

    monkeypatch.setattr(
        invitations, "time", SimpleNamespace(monotonic=lambda: clock.time, sleep=sleep)
    )
    return clock


@dataclass
class Grid:
    """Nodes that say who they are, why they do not, or nothing."""

    says: dict[int, int | str | None]
    asked: list[int] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)

    def get_node_ids(self) -> list[int]:
        return list(self.says)

    def send_and_receive(self, calls: Iterable[Message], timeout: float) -> list[Message]:
        calls = list(calls)
        self.asked += [call.metadata.dst_node_id for call in calls]
        self.timeouts.append(timeout)
        return [reply for call in calls if (reply := self._reply(call)) is not None]

    def _reply(self, call: Message) -> Message | None:
        call.metadata.__dict__["_message_id"] = call.object_id
        said = self.says[call.metadata.dst_node_id]
        if isinstance(said, int):
            content = RecordDict({"metrics": MetricRecord({"partition-id": said})})
            return Message(content, reply_to=call)
        return None if said is None else Message(Error(2, said), reply_to=call)


def plan(**changes: Any) -> Any:
    return SimpleNamespace(**{"seats": 3, "min_clients": 2, "patience": 5.0} | changes)


def test_who_has_a_seat_is_asked_once(clock: SimpleNamespace) -> None:
    grid = Grid({50: 1, 60: 0, 70: 2})
    invited = Invitations(plan(), grid)  # type: ignore[arg-type]
    for _ in range(5):
        assert invited.online() == ([0, 1, 2], [60, 50, 70])
    assert sorted(grid.asked) == [50, 60, 70]


@pytest.mark.parametrize("silence", [None, "policy: not this", "it crashed"])
def test_who_does_not_say_who_it_is_delays_no_round_but_is_asked_again(
    clock: SimpleNamespace, silence: str | None
) -> None:
    grid = Grid({50: 1, 60: 0, 70: silence})
    invited = Invitations(plan(), grid)  # type: ignore[arg-type]
    for _ in range(10):
        clock.time += 2.0
        assert invited.online() == ([0, 1], [60, 50])
    assert grid.asked.count(70) == 1
    grid.says[70] = 2
    clock.time += 30.0
    assert invited.online() == ([0, 1, 2], [60, 50, 70])


def test_a_new_node_is_asked_at_once(clock: SimpleNamespace) -> None:
    grid = Grid({50: 1, 60: 0, 70: "it crashed"})
    invited = Invitations(plan(), grid)  # type: ignore[arg-type]
    grid.says[80] = 2
    assert invited.online() == ([0, 1, 2], [60, 50, 80])
    assert grid.asked.count(70) == 1


def test_too_few_are_waited_for_and_then_named_with_their_reasons(clock: SimpleNamespace) -> None:
    grid = Grid({50: 1, 70: "policy: epsilon is too high"})
    with pytest.raises(RunError, match=r"2 clients needed 1 take part; 1 of them: policy: epsilon"):
        Invitations(plan(patience=100.0), grid)  # type: ignore[arg-type]
    assert clock.time >= 1100.0
    assert 3 <= grid.asked.count(70) <= 5  # every 30 s


def test_a_reason_of_many_is_said_once(clock: SimpleNamespace, caplog: Any) -> None:
    grid = Grid({50: 1, 60: "policy: no", 70: "policy: no"})
    with pytest.raises(RunError, match=r"2 of them: policy: no$"):
        Invitations(plan(patience=100.0), grid)  # type: ignore[arg-type]
    assert len(caplog.messages) == 2  # of each node


def test_a_roll_call_takes_no_longer_than_there_is_patience(clock: SimpleNamespace) -> None:
    grid = Grid({50: 1, 60: 0})
    Invitations(plan(patience=20.0), grid)  # type: ignore[arg-type]
    assert max(grid.timeouts) <= 20.0


def test_nobody_is_waited_for_who_could_not_help(clock: SimpleNamespace) -> None:
    grid = Grid({50: 1, 60: "policy: no", 70: "policy: neither"})
    with pytest.raises(RunError, match="1 of them: policy: no; 1 of them: policy: neither"):
        Invitations(plan(patience=100.0), grid)  # type: ignore[arg-type]
    assert clock.time == 1000.0
