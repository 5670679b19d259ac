"""The server's processes: a SuperLink and a superexec, started, found again, restarted, stopped.

They are processes of their own (``--isolation process``), with a database: a SuperLink that is
killed comes back with all it knew, and the ServerApp, which is superexec's child, waits for it. A
`fedsys serve` that is killed leaves both running, for the next one to find.

superlink.json   where the SuperLink listens, and the ids of both processes
"""

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedsys.deployment import commands
from fedsys.deployment.bundle import Bundle
from fedsys.deployment.control import Control, RunStatus, public_pem
from fedsys.deployment.daemon import Daemon
from fedsys.deployment.guarded import SECRET, TOKEN, secret
from fedsys.deployment.pki import create_authority, server_certificate
from fedsys.errors import ConfigError, RunError
from fedsys.json_lines import write_whole

_FILE = "superlink.json"
_POLL = 0.2  # seconds
_START = 90.0  # seconds until a SuperLink must answer; it takes about five
_RESTARTS = 5  # of one process
_WITHIN = 120.0  # seconds; more restarts than that are no accident


@dataclass(frozen=True)
class Devices:
    """How many devices there are."""

    connected: int
    enrolled: int | None  # None where devices have no keys


class SuperLink:
    """The SuperLink of a server home."""

    def __init__(
        self, home: Path, host: str = "127.0.0.1", port: int = 8443, insecure: bool = False
    ) -> None:
        """Touch nothing yet."""
        self.home = home.absolute()
        self.host, self.port, self.insecure = host, port, insecure
        self.superlink = Daemon("superlink", self.home)
        self.superexec = Daemon("superexec", self.home)
        self._restarts: list[tuple[str, float]] = []

    @property
    def address(self) -> str:
        """Return where this machine calls the SuperLink."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    # ---- processes

    def start(self) -> bool:
        """Start what does not run; return whether a SuperLink was running before.

        Raises ``ConfigError`` if it runs at another address, or the address is not to be had, and
        ``RunError`` if it does not come up.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)  # updates pass through its database
        found = self.superlink.pid() is not None
        if found:
            self._check_address()
        else:
            self._check_free()
            self._prepare()
        self._start_missing()
        self._await_answer()
        return found

    def watch(self) -> list[str]:
        """Restart what has died, and return its kinds; raises ``RunError`` if it dies repeatedly.

        To be called every few seconds.
        """
        if not (self.home / _FILE).exists():
            raise RunError("the SuperLink was stopped from elsewhere")
        restarted = self._start_missing()
        now = time.monotonic()
        self._restarts += [(kind, now) for kind in restarted]
        self._restarts = [(kind, when) for kind, when in self._restarts if now - when < _WITHIN]
        for daemon in (self.superlink, self.superexec):
            times = sum(kind == daemon.kind for kind, _ in self._restarts)
            if times > _RESTARTS:
                raise RunError(
                    f"the {daemon.kind} has died {times} times within {_WITHIN:.0f} s; the end of"
                    f" {daemon.log}:\n{daemon.tail()}"
                )
        return restarted

    def stop(self) -> bool:
        """End both processes and every ServerApp; return whether there was anything to end."""
        (self.home / _FILE).unlink(missing_ok=True)  # so that nobody starts them again
        running = [d for d in (self.superexec, self.superlink) if d.pid() is not None]
        for daemon in running:
            daemon.stop()
        return bool(running)

    # ---- devices

    def register(self) -> Devices:
        """Let in the devices that are enrolled, and no more those that no longer are.

        A device is enrolled by its key in devices/NAME.pub, and revoked when that file goes; a key
        that was revoked never comes back. Raises ``ConfigError`` for a file that holds no key.
        """
        nodes = self._control.nodes()
        if self.insecure:
            return Devices(sum(node.online for node in nodes), None)
        known = {node.key: node for node in nodes}
        keys = {public_pem(path): path.stem for path in sorted(self.home.glob("devices/*.pub"))}
        for key in keys.keys() - known.keys():
            self._control.register(keys[key], key)
        for key in known.keys() - keys.keys():
            if known[key].registered:
                self._control.unregister(known[key].id)
        online = sum(known[key].online for key in keys.keys() & known.keys())
        return Devices(online, len(keys))

    # ---- runs

    def submit(self, bundle: Bundle, settings: Mapping[str, str]) -> int:
        """Start a run of ``bundle`` with these values of its keys; return its id."""
        return self._control.submit(bundle, settings)

    def status(self, run: int) -> RunStatus:
        """Return how a run stands; raises ``OSError`` while the SuperLink does not answer."""
        return self._control.status(run)

    def unfinished(self) -> dict[int, str]:
        """Return the runs that are not over, each with its folder."""
        return self._control.unfinished()

    def stop_run(self, run: int) -> None:
        """End a run; raises ``RunError`` if it is over already."""
        self._control.stop(run)

    def log(self, run: int) -> str:
        """Return what the ServerApp of a run that is over has written."""
        return self._control.log(run)

    # ---- details

    @cached_property
    def _control(self) -> Control:
        authority = None if self.insecure else self.home / "ca.crt"
        return Control(self.address, secret(self.home / TOKEN), authority)

    def _prepare(self) -> None:
        """Make the secrets, and the keys where there are none."""
        secret(self.home / TOKEN)
        secret(self.home / SECRET)
        if not self.insecure:
            create_authority(self.home)
            server_certificate(self.home, [self.host])

    def _start_missing(self) -> list[str]:
        started = []
        environment = commands.environment(self.home, self.address)
        for daemon, arguments in (
            (self.superlink, commands.superlink(self.home, self.host, self.port, self.insecure)),
            (self.superexec, commands.superexec(self.home, self.address, self.insecure)),
        ):
            if daemon.pid() is None:
                daemon.start(arguments, environment)
                started.append(daemon.kind)
        if started:
            self._write()
        return started

    def _write(self) -> None:
        here = {"host": self.host, "port": self.port, "insecure": self.insecure}
        pids = {daemon.kind: daemon.pid() for daemon in (self.superlink, self.superexec)}
        write_whole(self.home / _FILE, json.dumps(here | {"pids": pids}, indent=2) + "\n")

    def _check_address(self) -> None:
        there = described(self.home)
        if (there.host, there.port, there.insecure) != (self.host, self.port, self.insecure):
            raise ConfigError(
                [
                    f"engine: the SuperLink of {self.home} runs with host={there.host}"
                    f" port={there.port} insecure={str(there.insecure).lower()}; set the same, or"
                    f" end it: fedsys serve --stop {self.home}"
                ]
            )

    def _check_free(self) -> None:
        """Raise ``ConfigError`` if the address cannot be listened at, before anything starts."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise ConfigError(
                    [f"engine.host={self.host} engine.port={self.port}: {error.strerror or error}"]
                ) from None

    def _await_answer(self) -> None:
        deadline = time.monotonic() + _START
        while True:
            try:
                self._control.nodes()
                return
            except OSError as error:
                reason = str(error)
            if self.superlink.pid() is None or time.monotonic() > deadline:
                raise RunError(
                    f"the SuperLink at {self.address} does not come up ({reason}); the end of"
                    f" {self.superlink.log}:\n{self.superlink.tail()}"
                )
            time.sleep(_POLL)


def described(home: Path) -> SuperLink:
    """Return the SuperLink that runs in ``home``; raises ``ConfigError`` if none was started."""
    try:
        there = json.loads((home / _FILE).read_text())
        return SuperLink(home, there["host"], there["port"], there["insecure"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError([f"{home}: no SuperLink runs here"]) from None


def stop(home: Path) -> bool:
    """End the SuperLink of ``home``; return whether there was one."""
    return SuperLink(home).stop()
