"""Joining: tried again and again, given up only where nothing heals, and nothing left behind."""

import io
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.deployment.ending import Ending
from fedsys.deployment.enrolment import enrol
from fedsys.deployment.join import Pauses, join
from fedsys.deployment.node import HEARD, Heard
from fedsys.deployment.pki import create_authority, server_certificate
from fedsys.deployment.probe import probe
from fedsys.deployment.processes import descendants
from fedsys.errors import ConfigError, RunError

# A supervisor of a node that is the script it is given, quick in everything.
SUPERVISE = """
import os, sys
from pathlib import Path
from fedsys.deployment.join import Pauses, Supervisor
folder = Path(sys.argv[1])
sys.exit(Supervisor(
    [sys.executable, str(folder / "node.py"), str(folder), str(os.getpid())], dict(os.environ),
    folder / "log" / "node.log", lambda: None,
    Pauses(first=0.1, longest=0.4, calm=60.0, held=float(sys.argv[2])),
).run())
"""
# A node with two descendants that do not listen to anybody, as ClientApps that hang.
NODE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def say(**line): print(json.dumps(line), flush=True)
def note(name, pid):
    with (folder / name).open("a") as file: file.write(f"{pid}\\n")
note("nodes", os.getpid())
"""
DEAF = """
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); signal.signal(15, signal.SIG_IGN);"
inner = subprocess.Popen([sys.executable, "-c", deaf + '''
import os, subprocess, sys
note = lambda pid: open(sys.argv[1], "a").write(f"{pid}\\\\n")
own = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
note(subprocess.Popen([sys.executable, "-c", own]).pid)
note(os.getpid())
time.sleep(600)''', str(folder / "others")])
while not (folder / "others").exists() or (folder / "others").read_text().count("\\n") < 2:
    time.sleep(0.02)
"""


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a supervisor of a node with the given script."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, held: float = 60.0) -> "subprocess.Popen[str]":
        (tmp_path / "node.py").write_text(NODE + textwrap.dedent(script))
        command = [sys.executable, "-c", SUPERVISE, str(tmp_path), str(held)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
    for pid in noted(tmp_path, "nodes") + noted(tmp_path, "others"):
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def noted(folder: Path, name: str) -> list[int]:
    path = folder / name
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def gone(pids: list[int]) -> bool:
    """Return whether none of the processes lives, zombies aside."""
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


# ---- again and again


def test_a_node_that_ends_is_started_again(
    supervised: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = supervised("say(connected='here'); say(say='something'); sys.exit(1)")
    until(lambda: len(noted(tmp_path, "nodes")) >= 4)
    process.terminate()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "fedsys join: something" in told
    assert told.count("the connection to the server was lost; trying again") >= 3
    assert told.rstrip().endswith("stopped")


def test_a_node_that_is_killed_is_started_again(
    supervised: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = supervised("say(connected='here'); time.sleep(600)")
    for number in (1, 2):
        until(lambda count=number: len(noted(tmp_path, "nodes")) == count)
        os.kill(noted(tmp_path, "nodes")[-1], signal.SIGKILL)
    until(lambda: len(noted(tmp_path, "nodes")) == 3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.count("killed by signal 9") == 2
    assert gone(noted(tmp_path, "nodes"))


def test_a_bad_folder_does_not_heal(supervised: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = supervised("say(say='policy.yaml: is wrong'); sys.exit(2)")
    _, told = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "policy.yaml: is wrong" in told


def test_a_key_that_nobody_knows_is_given_up(
    supervised: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = supervised("say(exit='[code: 2004] no', code=305, api=2004); sys.exit(1)", held=1.5)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(noted(tmp_path, "nodes")) >= 3
    assert "does not know the key of this device, or still holds" in told
    assert "enrol it there" in told


def test_a_held_connection_heals(
    supervised: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = supervised(
        """
        lives = len((folder / "nodes").read_text().split())
        if lives in (2, 3):
            say(exit='[code: 2004] no', code=305, api=2004); sys.exit(1)
        say(connected='here')
        time.sleep(600 if lives > 3 else 0)
        """
    )
    until(lambda: len(noted(tmp_path, "nodes")) == 4)
    process.terminate()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 0
    assert told.count("still holds this device's former connection; trying again in") == 2


@given(failures=st.integers(1, 10_000))
def test_pauses_grow_to_a_minute_and_differ_by_chance(failures: int) -> None:
    pauses = {Pauses().after(failures) for _ in range(20)}
    most = min(60.0, 2.0**failures if failures < 30 else 60.0)
    assert all(most / 2 <= pause <= most for pause in pauses)
    assert len(pauses) > 10


# ---- nothing is left behind


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_what_was_started_ends_with_it(
    sign: signal.Signals, supervised: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = supervised(DEAF + "say(connected='here')\ntime.sleep(600)")
    until(lambda: len(noted(tmp_path, "others")) == 2)
    process.send_signal(sign)
    process.wait(timeout=30)
    until(lambda: gone(noted(tmp_path, "nodes") + noted(tmp_path, "others")), 5.0)


def test_a_node_that_does_not_listen_is_ended_at_the_second_signal(
    supervised: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = supervised("signal.signal(15, signal.SIG_IGN); say(connected=''); time.sleep(600)")
    until(lambda: len(noted(tmp_path, "nodes")) == 1)
    time.sleep(0.5)
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None  # it waits for a clean end
    process.terminate()
    process.wait(timeout=5)
    assert gone(noted(tmp_path, "nodes"))


def test_when_a_node_ends_so_does_what_it_has_started(
    supervised: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    supervised(DEAF + "say(connected='here')\nos._exit(1)")
    until(lambda: len(noted(tmp_path, "nodes")) >= 2)
    first = noted(tmp_path, "others")[:2]
    until(lambda: gone(first), 5.0)


def test_without_its_supervisor_a_node_ends(
    supervised: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    orphaned = """
from fedsys.deployment import node, processes
node._GRACE = 0.5
processes.when_orphaned(node._end, int(sys.argv[2]), every=0.05)
signal.signal(signal.SIGTERM, lambda *_: time.sleep(600))  # and hangs
time.sleep(600)
"""
    process = supervised(DEAF + orphaned)
    until(lambda: len(noted(tmp_path, "others")) == 2)
    time.sleep(2.0)
    assert not gone(noted(tmp_path, "nodes"))
    process.kill()
    until(lambda: gone(noted(tmp_path, "nodes") + noted(tmp_path, "others")), 15.0)


def test_descendants_are_found_parents_first(tmp_path: Path) -> None:
    script = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '600'])\ntime.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        until(lambda: len(descendants(child.pid)) == 1)
        found = descendants(os.getpid())
        inner = descendants(child.pid)[0]
        assert found.index(child.pid) < found.index(inner)
        assert set(found) == {p.pid for p in psutil.Process().children(recursive=True)}
    finally:
        for process in psutil.Process(child.pid).children():
            process.kill()
        child.kill()
        child.wait()


# ---- why there is no connection


@contextmanager
def listening(context: ssl.SSLContext | None = None, says: bytes = b"") -> Iterator[str]:
    """Listen at a free port, by TLS or in the clear; yield the address."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.settimeout(0.2)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    line, _ = server.accept()
                    line.settimeout(2.0)
                    with line:
                        if context is None:
                            line.recv(100)
                            line.sendall(says)
                        else:
                            with context.wrap_socket(line, server_side=True) as secured:
                                secured.recv(1)
                except (OSError, ssl.SSLError):
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    create_authority(path)
    server_certificate(path, ["127.0.0.1"])
    return path


@pytest.fixture
def tls(home: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "server.crt", home / "server.key")
    return context


BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\n\r\n"


def test_where_all_is_well_there_is_no_trouble(home: Path, tls: ssl.SSLContext) -> None:
    with listening(tls) as server:
        assert probe(server, home / "ca.crt") is None
    with listening(says=BAD_REQUEST) as server:
        assert probe(server, None) is None


def test_another_authority_is_told(tmp_path: Path, tls: ssl.SSLContext) -> None:
    other = create_authority(tmp_path / "other")
    with listening(tls) as server:
        trouble = probe(server, other)
    assert trouble is not None
    assert "authority" in trouble.reason
    assert trouble.heals, "a captive portal goes away"


def test_a_certificate_for_another_name_is_told(
    home: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda to, **k: found(("127.0.0.1", to[1])))
    with listening(tls) as server:
        trouble = probe(f"other.example.org:{server.rpartition(':')[2]}", home / "ca.crt")
    assert trouble is not None
    assert "is not for the name other.example.org" in trouble.reason


def test_tls_at_one_end_only_is_told(home: Path, tls: ssl.SSLContext) -> None:
    with listening(says=BAD_REQUEST) as server:
        trouble = probe(server, home / "ca.crt")
    assert trouble is not None
    assert "does not speak TLS" in trouble.reason
    assert trouble.heals
    with listening(tls) as server:
        trouble = probe(server, None)
    assert trouble is not None
    assert "asks for TLS" in trouble.reason


def test_nobody_there_heals(home: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    trouble = probe(f"127.0.0.1:{port}", home / "ca.crt")
    assert trouble is not None
    assert "nothing listens" in trouble.reason
    assert trouble.heals


def test_a_server_that_says_nothing_is_not_waited_for(home: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        server = f"127.0.0.1:{silent.getsockname()[1]}"
        trouble = probe(server, home / "ca.crt", patience=0.3)
    assert trouble is not None
    assert "answers" in trouble.reason


@pytest.mark.parametrize(
    ("ending", "words", "heals"),
    [
        (Ending(code=2), "folder", False),
        (Ending(code=1, flowers=305, api=2004), "does not know the key", True),
        (Ending(known=True, code=1, flowers=305, api=2004), "former connection", True),
        (Ending(code=1, flowers=305, text="certificate"), "certificate", True),
        (Ending(code=1, flowers=302), "device.key", False),
        (Ending(code=1, flowers=606), "versions", True),
        (Ending(code=-9, connected=1.0), "signal 9", True),
        (Ending(code=0, connected=1.0), "was lost", True),
        (Ending(code=7), "code 7", True),
    ],
)
def test_endings_are_told_in_words(ending: Ending, words: str, heals: bool) -> None:
    trouble = ending.trouble(Path("node.log"))
    assert words in trouble.reason
    assert trouble.heals == heals


# ---- join


def test_a_dry_run_tells_what_would_leave_and_speaks_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = enrol("ward", tmp_path / "home", "fl.example.org:8443", folder=tmp_path / "ward")
    monkeypatch.setattr(socket, "socket", None)
    assert join(folder, dry_run=True) == 0
    told = capsys.readouterr().out
    policy = (folder / "policy.yaml").read_text()
    for words in ("fl.example.org:8443", "privacy: sample", "max_epsilon: 8", "what never leaves"):
        assert words in told
    assert "evaluate: false" in policy
    assert "evaluate  nothing" in told
    assert "no code may run" in told
    assert not (folder / "state").exists()


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        join(tmp_path / "none")
    folder = enrol("ward", tmp_path / "home", "localhost:8443", folder=tmp_path / "ward")
    (folder / "policy.yaml").write_text("privacy: none\n")
    with pytest.raises(ConfigError, match=r"policy\.yaml"):
        join(folder)
    with pytest.raises(ConfigError, match=r"policy\.yaml"):
        join(folder, dry_run=True)


def test_a_device_joins_once(tmp_path: Path) -> None:
    folder = enrol("ward", tmp_path / "home", "localhost:8443", folder=tmp_path / "ward")
    script = "import sys; from pathlib import Path; from fedsys.deployment.join import join\n"
    command = [sys.executable, "-c", f"{script}sys.exit(join(Path(sys.argv[1])))", str(folder)]
    with closing(socket.create_server(("127.0.0.1", 0))) as nobody:  # a port of ours, unused
        port = nobody.getsockname()[1]
    device = folder / "device.yaml"
    device.write_text(device.read_text().replace("localhost:8443", f"localhost:{port}"))
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr is not None
        lines = [first.stderr.readline(), first.stderr.readline()]
        assert "nothing listens" in lines[1]
        with pytest.raises(RunError, match="has joined already"):
            join(folder)
        first.terminate()
        assert first.wait(timeout=20) == 0
    finally:
        first.kill()
        first.wait()
        first.stderr.close()


def test_lines_of_a_node_are_json(tmp_path: Path) -> None:
    from fedsys.deployment.node import main

    (tmp_path / "device.yaml").write_text("name: a\n")
    command = [sys.executable, "-m", "fedsys.deployment.node", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "device.yaml" in json.loads(found.stdout)["say"]
    assert callable(main)


def test_a_server_that_is_away_is_told_of_once() -> None:
    output = io.StringIO()
    heard = Heard(output)
    for text in (
        "Connection attempt failed, retrying in 1.00 seconds",
        "Connection attempt failed, retrying in 2.00 seconds",
        "Connection successful after 3.00 seconds and 3 tries.",
        "Received successfully",
    ):
        heard.emit(logging.makeLogRecord({"msg": text}))
    away, back = [json.loads(line)[HEARD] for line in output.getvalue().splitlines()]
    assert "does not answer" in away
    assert "again" in back
