import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedsys.console import Silent
from fedsys.deployment import serve as module
from fedsys.deployment.control import RunStatus
from fedsys.deployment.following import Followed, failures
from fedsys.deployment.serve import ATTEMPTS, Served, serve
from fedsys.deployment.superlink import Devices, SuperLink
from fedsys.engines.deployment import Deployment, loopback
from fedsys.errors import Busy, ConfigError, RunError
from fedsys.locks import hold
from tests.flower_apps import tiny

RUNNING = RunStatus("running", "", "")
COMPLETED = RunStatus("finished", "completed", "")
SILENT = RunStatus("finished", "failed", "No heartbeat received from the task")


@dataclass
class Plan:
    """What ``serve`` reads of an experiment."""

    out: Path
    engine: Any
    num_clients: int = 2
    rounds: int = 3
    allow: list[str] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)


class Watching(Silent):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.rounds: list[int] = []
        self.failures: list[tuple[int, str]] = []
        self.results: list[Served] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def round(self, record, total) -> None:
        self.rounds.append(record["round"])

    def failure(self, client, reason) -> None:
        self.failures.append((client, reason))

    def finished(self, result) -> None:
        self.results.append(result)


class Scripted:
    """A SuperLink on which each submission goes as the next of ``scripts`` says."""

    address = "127.0.0.1:8443"

    def __init__(
        self, *scripts: Callable[[], Iterator[RunStatus]], others: dict[int, str] | None = None
    ):
        self.scripts, self.others = list(scripts), others or {}
        self.settings: list[dict[str, str]] = []
        self.devices = Devices(2, 2)
        self.stopped_runs: list[int] = []
        self.stopped = False

    def __call__(self, *where: object) -> "Scripted":
        self.where = where
        return self

    def start(self) -> bool:
        return False

    def submit(self, app, settings) -> int:
        self.settings.append(settings)
        self.statuses = self.scripts[len(self.settings) - 1]()
        return len(self.settings)

    def status(self, run: int) -> RunStatus:
        return next(self.statuses)

    def register(self) -> Devices:
        return self.devices

    def watch(self) -> list[str]:
        return []

    def stop_run(self, run: int) -> None:
        self.stopped_runs.append(run)

    def unfinished(self) -> dict[int, str]:
        return self.others

    def log(self, run: int) -> str:
        return "one line\nMemoryError: no more\n"

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "run").mkdir()
    return Plan(tmp_path / "run", Deployment(home=tmp_path / "home"), resolved={"rounds": 3})


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    def play(*scripts: Callable[[], Iterator[RunStatus]], **more: Any) -> Scripted:
        link = Scripted(*scripts, **more)
        for name, value in (("SuperLink", link), ("_LOOK", 0.001), ("_ASK", 0.0)):
            monkeypatch.setattr(module, name, value)
        return link

    return play


def writes(plan: Plan, numbers: Sequence[int], **summary: Any) -> Callable[[], Iterator[RunStatus]]:
    """Return a ServerApp that writes these rounds, and then a summary if it is given one."""

    def script() -> Iterator[RunStatus]:
        yield RUNNING
        for number in numbers:
            with (plan.out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"round": number, "reasons": ["client 1: it fell"]}) + "\n")
            yield RUNNING
        if summary:
            (plan.out / "new").write_text(json.dumps(summary))
            (plan.out / "new").rename(plan.out / "summary.json")
        yield COMPLETED if summary.get("status") == "completed" else SILENT

    return script


def always(status: RunStatus) -> Callable[[], Iterator[RunStatus]]:
    def script() -> Iterator[RunStatus]:
        while True:
            yield status

    return script


# ---- the settings


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.0.1", "::1"])
def test_without_tls_only_this_machine_is_served(host: str) -> None:
    assert loopback(host)
    assert Deployment(host=host, insecure=True).insecure
    for reachable in ("0.0.0.0", "::", "192.168.0.7", "server.example.org"):
        assert not loopback(reachable)
        assert Deployment(host=reachable).host == reachable
        with pytest.raises(ValueError, match=r"insecure .* loopback"):
            Deployment(host=reachable, insecure=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 0},
        {"port": 65536},
        {"host": ""},
        {"patience": 0.0},
        {"patience": float("inf")},
        {"min_clients": 0},
        {"threads": 0},
    ],
)
def test_ranges_of_the_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Deployment(**wrong)


def test_other_engines_are_not_served(plan: Plan) -> None:
    plan.engine = object()
    with pytest.raises(ConfigError, match="fedsys run"):
        serve(plan)


# ---- the run, as Flower may tell of it


def test_a_run_is_shown_round_by_round_and_returned(plan: Plan, played) -> None:
    link = played(writes(plan, range(4), status="completed", rounds=3))
    told = Watching()
    result = serve(plan, told)
    assert link.where == (plan.engine.home, "127.0.0.1", 8443, False)
    assert told.rounds == [0, 1, 2, 3]
    assert told.failures == [(1, "it fell")] * 4
    assert told.results == [result]
    assert (result.folder, result.summary["rounds"]) == (plan.out, 3)
    assert [line["round"] for line in result.metrics] == [0, 1, 2, 3]
    assert link.stopped
    assert link.stopped_runs == []


def test_the_server_app_is_told_what_to_run_and_where(plan: Plan, played, monkeypatch) -> None:
    monkeypatch.chdir(plan.out.parent)
    plan.out = Path("run")
    link = played(writes(plan, [0], status="completed"))
    serve(plan)
    (given,) = link.settings
    assert json.loads(given["hydra-json"]) == plan.resolved
    assert given["out"] == str(Path.cwd() / "run")
    assert len(given["run"]) == 16


def test_a_run_that_is_gone_on_with_keeps_its_id(plan: Plan, played) -> None:
    (plan.out / "env.json").write_text('{"run": "ab12"}')
    (plan.out / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n')
    (plan.out / "summary.json").write_text(
        '{"status": "interrupted", "reason": "KeyboardInterrupt"}'
    )
    link = played(writes(plan, [1, 2], status="completed"))
    told = Watching()
    serve(plan, told)
    assert link.settings[0]["run"] == "ab12"
    assert told.rounds == [2]  # round 1 was shown before, by whoever was there


def test_a_run_that_an_earlier_serve_has_left_is_followed(plan: Plan, played) -> None:
    link = played(others={7: str(plan.out)})
    link.statuses = writes(plan, [0], status="completed")()
    serve(plan)
    assert link.settings == []


def test_a_killed_server_app_is_started_again_and_goes_on(plan: Plan, played) -> None:
    link = played(writes(plan, [0, 1]), writes(plan, [1, 2, 3], status="completed"))
    told = Watching()
    serve(plan, told)
    assert told.rounds == [0, 1, 2, 3]
    assert link.settings[0] == link.settings[1]


def test_one_that_ended_by_a_signal_is_started_again(plan: Plan, played) -> None:
    said = RunStatus("finished", "failed", "Task failed with unknown error.")
    played(always(said), writes(plan, [0], status="completed"))
    assert serve(plan).summary["status"] == "completed"


def test_a_signal_is_told_from_a_failure_by_the_summary(plan: Plan, played) -> None:
    ended = {"status": "failed", "reason": "SystemExit: 1"}
    played(writes(plan, [0], **ended), writes(plan, [1], status="completed"))
    assert serve(plan).summary["status"] == "completed"


def test_one_that_is_killed_every_time_is_given_up(plan: Plan, played) -> None:
    link = played(*[writes(plan, [])] * (ATTEMPTS + 1))
    with pytest.raises(RunError, match=f"killed {ATTEMPTS} times"):
        serve(plan)
    assert len(link.settings) == ATTEMPTS
    assert link.stopped


def test_a_run_that_failed_says_why_and_is_not_repeated(plan: Plan, played) -> None:
    link = played(writes(plan, [0], status="failed", reason="RunError: every client failed"))
    with pytest.raises(RunError, match="every client failed"):
        serve(plan)
    assert len(link.settings) == 1


def test_one_that_died_before_it_could_say_why_shows_its_log(plan: Plan, played) -> None:
    played(always(RunStatus("finished", "failed", "ServerApp failed with exception: 7")))
    with pytest.raises(RunError, match=r"exception: 7(.|\n)*MemoryError: no more"):
        serve(plan)


def test_an_old_summary_is_not_taken_for_this_runs(plan: Plan, played) -> None:
    (plan.out / "summary.json").write_text('{"status": "completed"}')
    played(always(RunStatus("finished", "failed", "ServerApp failed with exception: 7")))
    with pytest.raises(RunError, match="exception: 7"):
        serve(plan)


def test_a_run_that_is_complete_is_shown_and_starts_nothing(plan: Plan, played) -> None:
    (plan.out / "summary.json").write_text('{"status": "completed", "rounds": 3}')
    link, told = played(), Watching()
    assert serve(plan, told).summary["rounds"] == 3
    assert len(told.results) == 1
    assert link.settings == []
    assert not hasattr(link, "where")  # not even looked for


def test_a_run_is_served_by_one_process_at_a_time(plan: Plan, played) -> None:
    link = played(always(RUNNING))
    with hold(plan.out / ".served.lock", "here"), pytest.raises(Busy, match="another process"):
        serve(plan)
    assert not hasattr(link, "where")  # whose SuperLink it is, is not touched
    assert link.settings == []
    assert link.stopped_runs == []


def test_a_run_that_somebody_stopped_is_not_repeated(plan: Plan, played) -> None:
    link = played(always(RunStatus("finished", "stopped", "")))
    with pytest.raises(RunError, match="stopped"):
        serve(plan)
    assert len(link.settings) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_an_interruption_ends_the_run_and_the_superlink_unless_kept(
    plan: Plan, played, keep: bool
) -> None:
    def interrupted() -> Iterator[RunStatus]:
        yield RUNNING
        raise KeyboardInterrupt

    plan.engine = Deployment(home=plan.out, keep=keep)
    link = played(interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve(plan)
    assert link.stopped_runs == [1]
    assert link.stopped is not keep


def test_a_superlink_with_another_run_on_it_is_left_alone(plan: Plan, played, caplog) -> None:
    link = played(writes(plan, [0], status="completed"), others={7: "/elsewhere"})
    with caplog.at_level(logging.WARNING):
        serve(plan)
    assert not link.stopped
    assert "1 other runs" in caplog.text


def test_too_few_devices_are_waited_for_and_then_given_up(plan: Plan, played, monkeypatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.0)
    plan.engine = Deployment(patience=0.05)
    link = played(always(RUNNING))
    link.devices = Devices(1, 1)
    told = Watching()
    with pytest.raises(RunError, match=r"1 of the 2 devices needed .* fedsys enrol NAME"):
        serve(plan, told)
    assert link.stopped_runs == [1]
    assert [text for text in told.phases if "1 of the 2" in text]
    plan.engine = Deployment(patience=0.05)
    link = played(always(RUNNING))
    link.devices = Devices(1, 2)
    with pytest.raises(RunError, match="fedsys join FOLDER"):
        serve(plan)


def test_as_many_devices_as_the_engine_asks_for_are_enough(plan: Plan, played, monkeypatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.0)
    plan.engine = Deployment(patience=0.05, min_clients=1)

    def slow() -> Iterator[RunStatus]:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            yield RUNNING
        yield from writes(plan, [0], status="completed")()

    link = played(slow)
    link.devices = Devices(1, 2)
    assert serve(plan).summary["status"] == "completed"


def test_a_superlink_that_is_silent_for_a_moment_is_waited_for(plan: Plan, played) -> None:
    link = played(writes(plan, [0], status="completed"))
    answers = iter([ConnectionRefusedError("nobody there"), None])

    def register() -> Devices:
        if (error := next(answers, None)) is not None:
            raise error
        return Devices(2, 2)

    link.register = register
    assert serve(plan).summary["status"] == "completed"


def test_a_superlink_that_stays_silent_is_given_up(plan: Plan, played, monkeypatch) -> None:
    monkeypatch.setattr(module, "_SILENCE", 0.02)
    link = played(always(RUNNING))

    def register() -> Devices:
        raise ConnectionRefusedError("nobody there")

    link.register = register
    with pytest.raises(RunError, match="nobody there"):
        serve(plan)


# ---- the run folder


def test_lines_are_shown_once_also_when_a_resumed_run_writes_them_again(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    followed = Followed(tmp_path)
    assert followed.rounds() == []
    assert not followed.moved
    log.write_text('{"round": 0}\n{"round": 1}\n{"rou')
    assert [line["round"] for line in followed.rounds()] == [0, 1]
    assert followed.rounds() == []
    (tmp_path / "other").write_text('{"round": 0}\n')
    (tmp_path / "other").rename(log)
    assert followed.rounds() == []
    log.write_text('{"round": 0}\n{"round": 1}\n{"round": 2}\n')
    assert [line["round"] for line in followed.rounds()] == [2]
    assert followed.moved


def test_reasons_name_their_clients() -> None:
    line = {
        "reasons": ["client 12: it said: no\nmore", "evaluation: client 1: late", "client -1: x"]
    }
    assert failures(line) == [(12, "it said: no\nmore")]
    assert failures({}) == []


# ---- with Flower


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plan]:
    """A run of an app that needs no device, on a SuperLink of its own."""
    monkeypatch.setattr(module, "bundle", lambda _: tiny())
    engine = Deployment(home=tmp_path / "home", port=free_port(), insecure=True, keep=True)
    yield Plan(tmp_path / "run", engine, resolved={"rounds": 3, "seconds": 0.1})
    SuperLink(engine.home).stop()


def link_of(plan: Plan) -> SuperLink:
    return SuperLink(plan.engine.home, port=plan.engine.port, insecure=True)


def test_from_nothing_to_a_finished_run(real: Plan) -> None:
    told = Watching()
    result = serve(real, told)
    assert told.rounds == [0, 1, 2, 3]
    assert result.summary["status"] == "completed"
    assert link_of(real).superlink.pid() is not None  # it was to be kept
    real.out, real.resolved = real.out.with_name("second"), {"raises": "no such luck"}
    with pytest.raises(RunError, match=r"no such luck(.|\n)*a tiny run"):
        serve(real)


@pytest.mark.slow
def test_a_server_app_that_was_really_killed(real: Plan) -> None:
    real.resolved = {"rounds": 3, "seconds": 0.1, "dies": 1}
    told = Watching()
    assert serve(real, told).summary["status"] == "completed"
    assert told.rounds == [0, 1, 2, 3]
    assert (real.out / "began-at-2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["superlink", "superexec"])
def test_a_run_survives_the_processes_of_its_server(real: Plan, kind: str) -> None:
    real.resolved = {"rounds": 20, "seconds": 0.5}

    def kill() -> None:
        while not (real.out / "began-at-0").exists():
            time.sleep(0.1)
        pid = getattr(link_of(real), kind).pid()
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    told = Watching()
    assert serve(real, told).summary["status"] == "completed"
    killer.join()
    assert told.rounds == [*range(21)]
    if kind == "superlink":
        assert len(list(real.out.glob("began-*"))) == 1  # nobody had to begin again


@pytest.mark.slow
def test_a_run_goes_on_when_serve_is_killed(real: Plan) -> None:
    real.resolved = {"rounds": 20, "seconds": 0.5}
    serving = multiprocessing.get_context("fork").Process(target=serve, args=(real,))
    serving.start()
    while not (real.out / "began-at-0").exists():
        time.sleep(0.1)
    serving.kill()
    serving.join()
    told = Watching()
    assert serve(real, told).summary["status"] == "completed"
    assert told.rounds[-1] == 20
    assert len(list(real.out.glob("began-*"))) == 1  # the next one found it and went along
