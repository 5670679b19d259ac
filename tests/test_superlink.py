import json
import os
import signal
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsys.deployment import superlink as module
from fedsys.deployment.control import Control, RunStatus
from fedsys.deployment.guarded import Guard
from fedsys.deployment.pki import device_key
from fedsys.deployment.superlink import Devices, SuperLink, stop
from fedsys.errors import ConfigError, RunError
from tests.flower_apps import tiny

# What anybody may ask of a SuperLink, and the worst it may answer to somebody without credentials.
OPEN = {"/health": 200, "/v1/control/get-login-details": 200, "/v1/control/get-auth-tokens": 501}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home: Path = tmp_path_factory.mktemp("server")
    (home / "devices").mkdir()
    for name in ("one", "two"):
        (home / "devices" / f"{name}.pub").write_text(f"{device_key()[1]} {name}\n")
    return home


@pytest.fixture(scope="module")
def link(home: Path) -> Iterator[SuperLink]:
    link = SuperLink(home, port=free_port())
    assert not link.start()
    yield link
    link.stop()


def again(link: SuperLink) -> SuperLink:
    return SuperLink(link.home, link.host, link.port, link.insecure)


def answer(link: SuperLink, within: float = 30.0) -> None:
    """Wait until the SuperLink answers."""
    deadline = time.monotonic() + within
    while True:
        try:
            link.unfinished()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def finished(link: SuperLink, run: int, within: float = 60.0) -> RunStatus:
    deadline = time.monotonic() + within
    while not (status := link.status(run)).finished:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return status


def test_its_processes_are_nobodys_children_and_found_again(link: SuperLink) -> None:
    pids = [daemon.pid() for daemon in (link.superlink, link.superexec)]
    for pid in pids:
        assert pid is not None
        assert os.getsid(pid) == pid  # what ends our session leaves them alone
    other = again(link)
    assert other.start()
    assert [daemon.pid() for daemon in (other.superlink, other.superexec)] == pids
    assert other.watch() == []
    kept = json.loads((link.home / "superlink.json").read_text())
    assert kept["port"] == link.port
    assert kept["pids"] == {"superlink": pids[0], "superexec": pids[1]}


def test_another_address_than_it_runs_at_is_refused(link: SuperLink) -> None:
    with pytest.raises(ConfigError, match=f"port={link.port} .*fedsys serve --stop"):
        SuperLink(link.home, link.host, free_port()).start()


def test_a_port_that_is_taken_is_refused_before_anything_starts(
    link: SuperLink, tmp_path: Path
) -> None:
    other = SuperLink(tmp_path, port=link.port)
    with pytest.raises(ConfigError, match=r"engine\.port"):
        other.start()
    assert other.superlink.pid() is None
    assert not (tmp_path / "state.db").exists()


def test_enrolled_devices_are_let_in_and_revoked_ones_never_again(link: SuperLink) -> None:
    assert link.register() == Devices(connected=0, enrolled=2)
    nodes = {node.name: node for node in control(link).nodes()}
    assert {name for name, node in nodes.items() if node.registered} == {"one", "two"}
    key = link.home / "devices" / "two.pub"
    text = key.read_text()
    key.unlink()
    assert link.register() == Devices(connected=0, enrolled=1)
    assert {node.name for node in control(link).nodes() if node.registered} == {"one"}
    key.write_text(text)
    link.register()
    assert {node.name for node in control(link).nodes() if node.registered} == {"one"}


def test_a_file_without_a_key_is_named(link: SuperLink) -> None:
    wrong = link.home / "devices" / "three.pub"
    wrong.write_text("ssh-rsa no key at all\n")
    with pytest.raises(ConfigError, match=r"three\.pub"):
        link.register()
    wrong.unlink()


def control(link: SuperLink, token: str | None = None) -> Control:
    kept = (link.home / "control.token").read_text()
    return Control(link.address, kept if token is None else token, link.home / "ca.crt")


@pytest.mark.parametrize("token", ["", "0" * 64, "é"])
def test_only_who_can_read_the_token_may_ask_for_runs_and_devices(
    link: SuperLink, token: str
) -> None:
    with pytest.raises(RunError, match="Not authenticated"):
        control(link, token).nodes()
    assert (link.home / "control.token").stat().st_mode & 0o077 == 0
    assert (link.home / "superexec.secret").stat().st_mode & 0o077 == 0


def test_a_stranger_finds_every_door_closed(link: SuperLink) -> None:
    """Of all paths of its one port, Fleet, Runtime and Control API."""
    context = ssl.create_default_context(cafile=str(link.home / "ca.crt"))

    def ask(path: str, method: str) -> tuple[int, bytes]:
        body = b"" if method == "POST" else None
        kind = {"Content-Type": "application/protobuf"}
        url = f"https://{link.address}{path}"
        try:
            asked = urllib.request.Request(url, body, kind, method=method)
            with urllib.request.urlopen(asked, context=context, timeout=10) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    paths = json.loads(ask("/openapi.json", "GET")[1])["paths"]
    assert {"/v1/control/start-run", "/v1/fleet/pull-messages", "/v1/runtime/acquire-task"} <= {
        *paths
    }
    answers = {path: ask(path, next(iter(ways)).upper())[0] for path, ways in paths.items()}
    assert {path: code for path, code in answers.items() if code != 401} == OPEN


def test_without_its_certificate_nobody_is_spoken_to(link: SuperLink) -> None:
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        Control(link.address, "", Path(ssl.get_default_verify_paths().openssl_cafile)).nodes()


def test_a_run_is_taken_followed_and_its_log_kept(link: SuperLink, tmp_path: Path) -> None:
    plan = json.dumps({"rounds": 1})
    run = link.submit(tiny(), {"hydra-json": plan, "out": str(tmp_path), "run": "ab12"})
    assert link.unfinished() == {run: str(tmp_path)}
    assert finished(link, run) == RunStatus("finished", "completed", "")
    assert run not in link.unfinished()
    assert "a tiny run ab12" in link.log(run)
    assert (tmp_path / "summary.json").exists()


def test_a_run_with_a_key_that_the_bundle_has_not_is_refused(link: SuperLink) -> None:
    with pytest.raises(RunError, match="start-run"):
        link.submit(tiny(), {"no-such-key": "1"})


def test_a_run_can_be_stopped(link: SuperLink, tmp_path: Path) -> None:
    plan = json.dumps({"rounds": 1000, "seconds": 0.5})
    run = link.submit(tiny(), {"hydra-json": plan})
    assert link.unfinished() == {run: ""}
    link.stop_run(run)
    status = link.status(run)
    assert (status.status, status.sub_status, status.lost) == ("finished", "stopped", False)
    with pytest.raises(RunError, match="stop-run"):
        link.stop_run(run)


def test_what_is_killed_comes_back_with_all_it_knew(link: SuperLink) -> None:
    link.register()
    before = {(node.id, node.name) for node in control(link).nodes()}
    for daemon in (link.superlink, link.superexec):
        killed = daemon.pid()
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while daemon.pid() == killed and time.monotonic() < deadline:
            time.sleep(0.05)
        assert link.watch() == [daemon.kind]
        assert daemon.pid() not in (None, killed)
    answer(link)
    assert {(node.id, node.name) for node in control(link).nodes()} == before


def test_what_dies_again_and_again_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = SuperLink(tmp_path, port=free_port())
    monkeypatch.setattr(module.SuperLink, "_start_missing", lambda _: ["superexec"])
    link.superexec.log.parent.mkdir()
    link.superexec.log.write_text("no more memory\n")
    (tmp_path / "superlink.json").write_text("{}")  # as start leaves it
    for _ in range(module._RESTARTS):
        assert link.watch() == ["superexec"]
    with pytest.raises(RunError, match="no more memory"):
        link.watch()


def test_one_that_does_not_come_up_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = SuperLink(tmp_path, port=free_port(), insecure=True)
    monkeypatch.setattr(module.SuperLink, "_start_missing", lambda _: [])
    link.superlink.log.parent.mkdir()
    link.superlink.log.write_text("the disk is full\n")
    with pytest.raises(RunError, match=r"does not come up(.|\n)*superlink\.log(.|\n)*full"):
        link.start()


def test_the_guard_knows_one_account() -> None:
    guard = Guard("secret")
    assert guard.validate_tokens_in_metadata([("token", "secret")])[0]
    assert guard.validate_tokens_in_metadata([("token", b"secret")])[1] is not None
    for shown in ([], [("token", "")], [("token", "secre")], [("token", "secret")] * 2):
        assert guard.validate_tokens_in_metadata(shown) == (False, None)


def test_a_stopped_one_leaves_no_process(link: SuperLink) -> None:
    """Last: it ends the SuperLink of this file."""
    pids = [daemon.pid() for daemon in (link.superlink, link.superexec)]
    assert stop(link.home)
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)
    assert link.superlink.pid() is None
    assert not (link.home / "superlink.json").exists()
    assert not stop(link.home)
    with pytest.raises(ConnectionRefusedError), socket.create_connection((link.host, link.port)):
        pass
