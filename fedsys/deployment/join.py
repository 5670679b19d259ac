"""``fedsys join FOLDER``: a device takes part, through failures of its server, network and itself.

It keeps one child, the SuperNode (``fedsys.deployment.node``), and starts it again when it ends: in
2 s, 4 s, ... 60 s, each up to a half shorter by chance, so that the devices of a server that was
away do not come back all at once. What cannot heal by itself ends it with exit code 2.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from fedsys.deployment.device import Device
from fedsys.deployment.disclosure import disclosure
from fedsys.deployment.ending import Ending
from fedsys.deployment.node import CONNECTED, ENDED, HEARD, environment
from fedsys.deployment.policy import Policy
from fedsys.deployment.probe import Trouble, probe
from fedsys.deployment.processes import kill_group
from fedsys.locks import hold

LOG = "node.log"
_LARGEST_LOG = 10 * 2**20  # bytes, of which one old one is kept
_GRACE = 12.0  # seconds for a clean end: longer than the node itself takes


@dataclass(frozen=True)
class Pauses:
    """Seconds between tries."""

    first: float = 2.0
    longest: float = 60.0
    calm: float = 60.0  # connected for so long, a device begins anew
    held: float = 120.0  # a server that refuses a key for longer does not know it: it lets go of
    # a device 60 s after it last heard of it

    def after(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row, at least one."""
        pause = min(self.longest, self.first * 2.0 ** min(failures - 1, 30))
        return pause * random.uniform(0.5, 1.0)


def join(folder: Path, dry_run: bool = False) -> int:
    """Take part as the device of ``folder`` until told to stop; return an exit code.

    0 after SIGTERM, 130 after SIGINT, 2 when it gave up. ``dry_run`` only says what would leave
    the device, touches no network and returns 0. Raises ``ConfigError`` for a folder that cannot
    be used, and ``Busy`` for a device that has joined already.
    """
    device = Device.load(folder)
    policy = Policy.load(device.policy)
    if dry_run:
        sys.stdout.write(disclosure(device, policy))
        return 0
    authority = device.folder / "ca.crt" if device.secure else None
    node = [sys.executable, "-P", "-m", "fedsys.deployment.node", str(device.folder)]
    with _alone(device):
        said = device.settings
        say(f"device {said.name}, number {said.number}, joins {said.server}")
        return Supervisor(
            [*node, "--parent", str(os.getpid())],
            dict(os.environ) | environment(device),
            device.state / "log" / LOG,
            lambda: probe(said.server, authority),
        ).run()


def say(text: str) -> None:
    """Tell whoever is at the device."""
    with suppress(OSError):
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} fedsys join: {text}\n")
        sys.stderr.flush()


@dataclass
class Supervisor:
    """Keeps a node running."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    probe: Callable[[], Trouble | None]  # asked before every start
    pauses: Pauses = Pauses()
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _signal: int = field(default=0, init=False)
    _child: "subprocess.Popen[str] | None" = field(default=None, init=False)

    def run(self) -> int:
        """Start the node again and again; return the exit code, see ``join``."""
        failures, known, refused_since = 0, False, None
        with self._signals():
            while not self._stop.is_set():
                trouble, ending = self.probe(), Ending(known)
                if trouble is None:
                    trouble = self._one_life(ending)
                if self._stop.is_set():
                    break
                known = known or ending.connected is not None
                failures = 1 if ending.lasted > self.pauses.calm else failures + 1
                refused_since = (refused_since or time.monotonic()) if ending.refused else None
                if refused_since and time.monotonic() - refused_since > self.pauses.held:
                    trouble = Ending.unknown()
                if not trouble.heals:
                    say(f"{trouble.reason}; no other try can help")
                    return 2
                pause = self.pauses.after(failures)
                say(f"{trouble.reason}; trying again in {pause:.0f} s")
                self._stop.wait(pause)
        say("stopped")
        return 130 if self._signal == signal.SIGINT else 0

    def _one_life(self, ending: Ending) -> Trouble:
        """Start the node, wait for its end, and return why it ended."""
        with _log(self.log) as log:
            # A session of its own, so that all that is in it can be ended with it.
            self._child = child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(self.environment),
                text=True,
                start_new_session=True,
            )
        listener = threading.Thread(target=_listen, args=(child.stdout, ending), daemon=True)
        listener.start()
        try:
            if self._stop.is_set():  # since it was looked at last
                self._end()
            ending.code = child.wait()
        finally:
            self._child = None
            kill_group(child.pid)  # whoever is left of it, and may still hold its output
            child.wait()
            listener.join()
        return ending.trouble(self.log)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT."""
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {sign: signal.signal(sign, self._handle) for sign in signals}
        try:
            yield
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    def _handle(self, sign: int, _: FrameType | None) -> None:
        impatient = self._stop.is_set()
        self._signal = self._signal or sign
        self._stop.set()
        if impatient and self._child is not None:
            kill_group(self._child.pid)
        else:
            self._end()

    def _end(self) -> None:
        """Have the node end itself, or end it."""
        if (child := self._child) is not None:
            child.terminate()
            late = threading.Timer(_GRACE, kill_group, [child.pid])
            late.daemon = True
            late.start()


def _listen(output: IO[str], ending: Ending) -> None:
    """Hear a node until nobody holds its output any more."""
    with output:
        for line in output:
            _hear(line, ending)


def _hear(line: str, ending: Ending) -> None:
    """Take in a line of the node, and pass on what people should hear."""
    try:
        said = json.loads(line)
    except ValueError:
        return
    if not isinstance(said, dict):
        return
    if HEARD in said:
        say(str(said[HEARD]))
    elif CONNECTED in said:
        ending.connected = time.monotonic()
        say("connected to the server")
    elif ENDED in said:
        ending.flowers, ending.api, ending.text = said.get("code"), said.get("api"), said[ENDED]


@contextmanager
def _log(path: Path) -> Iterator[int]:
    """Open the node's log, and put it aside when it has become large."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _LARGEST_LOG:
        path.replace(path.with_suffix(".log.1"))
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _alone(device: Device) -> Iterator[None]:
    """Hold the device; raises ``Busy`` when another process does."""
    device.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    taken = f"{device.folder} has joined already, in another process"
    with hold(device.state / ".joined.lock", taken):
        yield
