"""A real deployment on loopback: a server home, devices that join, and runs that are served."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from fedsys.deployment.bundle import bundle
from fedsys.deployment.enrolment import enrol
from fedsys.deployment.superlink import stop
from fedsys.json_lines import JsonLines
from fedsys.privacy.entries import Entry
from fedsys.privacy.ledger import read
from tests.cable import Cable

FEDSYS = (sys.executable, "-m", "fedsys")
OPEN = {"privacy": "none", "max_epsilon": None, "min_examples": 1, "evaluate": True}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Return the first true value of ``condition``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)
    return found


def tensors(run: Path, round: int) -> dict[str, torch.Tensor]:
    """Return everything in the checkpoint of a round."""
    return dict(load_file(run / "checkpoints" / f"round_{round:06d}" / "tensors.safetensors"))


def same_bits(left: Path, right: Path, round: int) -> bool:
    a, b = tensors(left, round), tensors(right, round)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_params(left: Path, right: Path, round: int) -> bool:
    """Return whether two runs have the same model, whatever else they remember."""
    a, b = (
        {name: value for name, value in tensors(run, round).items() if name.startswith("params/")}
        for run in (left, right)
    )
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return JsonLines(path).read() if path.exists() else []


@dataclass
class Served:
    """A `fedsys serve` that is under way."""

    process: "subprocess.Popen[str]"
    run: Path
    log: Path

    def wait(self, seconds: float = 400.0) -> int:
        """Return the exit code."""
        return self.process.wait(seconds)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


@dataclass
class Loopback:
    """A server home and the devices that are enrolled there, all below ``folder``."""

    folder: Path
    port: int = field(default_factory=free_port)
    modules: Sequence[str] = ()
    joined: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    served: list[Served] = field(default_factory=list)
    cables: dict[str, Cable] = field(
        default_factory=dict
    )  # of devices that are not called directly

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def enrol(self, name: str, port: int | None = None, **policy: Any) -> Path:
        """Enrol a device that calls ``port``, its policy open but for ``policy``."""
        code = [bundle(self.modules).hash]
        address = f"127.0.0.1:{port or self.port}"
        place = enrol(name, self.home, address, folder=self.folder / name, code=code)
        self.rule(name, **OPEN | policy)
        return place

    def rule(self, name: str, **policy: Any) -> None:
        """Change a device's policy."""
        path = self.folder / name / "policy.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | policy))

    def settle(self, name: str, **settings: Any) -> None:
        """Change a device's settings."""
        path = self.folder / name / "device.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))

    def join(self, *names: str, **environment: str) -> None:
        """Have devices take part until ``close`` or ``leave``."""
        for name in names:
            (self.folder / name / "misbehave").mkdir(exist_ok=True)
            log = (self.folder / f"{name}.log").open("ab")
            with log:
                self.joined[name] = subprocess.Popen(
                    [*FEDSYS, "join", str(self.folder / name)],
                    stdout=log,
                    stderr=log,
                    env=os.environ
                    | ENVIRONMENT
                    | {"MISBEHAVE": str(self.folder / name / "misbehave")}
                    | environment,
                    cwd=self.folder,
                )

    def said_by(self, name: str) -> str:
        """Return what a device's `fedsys join` has said."""
        path = self.folder / f"{name}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def leave(self, name: str, sign: int = signal.SIGTERM) -> int:
        """End a device and return its exit code."""
        process = self.joined.pop(name)
        process.send_signal(sign)
        return process.wait(60)

    def serve(self, out: str, *overrides: str, **environment: str) -> Served:
        """Begin a run in the folder ``out``; the SuperLink stays when it is over."""
        log, run = self.folder / f"{out}.log", self.folder / out
        engine = (f"engine.home={self.home}", f"engine.port={self.port}", "engine.keep=true")
        words = [*engine, "engine.threads=1", *overrides, f"out={run}"]
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*FEDSYS, "serve", *words],
                stdout=file,
                stderr=file,
                env=os.environ | ENVIRONMENT | environment,
                cwd=self.folder,
            )
        served = Served(process, run, log)
        self.served.append(served)
        return served

    def pids(self, name: str, what: str) -> list[int]:
        """Return the processes of a device whose command line has ``what``."""
        return _running(self.folder / name / "state" / "flwr", what)

    def server_pids(self, what: str) -> list[int]:
        """Return the processes of the server whose command line has ``what``."""
        return _running(self.home / "flwr", what)

    # ---- of devices that misbehave, see ``tests.misbehaving``

    def teach(self) -> str:
        """Make the module known here, and return its name, for ``modules`` and ``allow``."""
        shutil.copy(Path(__file__).with_name("misbehaving.py"), self.folder)
        return "misbehaving"

    def tell(self, name: str, round: int, word: str) -> Path:
        """Have a device misbehave in a round; until the file that is returned is deleted."""
        folder = self.folder / name / "misbehave"
        (folder / f"{round}.there").unlink(missing_ok=True)
        (folder / str(round)).write_text(word)
        return folder / str(round)

    def await_there(self, served: Served, *names: str, round: int) -> None:
        """Wait until devices have come to where they misbehave."""
        there = [self.folder / name / "misbehave" / f"{round}.there" for name in names]

        def all_there() -> bool:
            assert served.process.poll() is None, served.said
            return all(path.exists() for path in there)

        wait_for(f"{names} in round {round}", all_there, 240)

    def entries(self, name: str, run: Path) -> list[Entry]:
        """Return what a device has entered in its ledger for a run."""
        id = json.loads((run / "env.json").read_text())["run"]
        found = read(self.folder / name / "state" / "ledger")
        return [entry for entry in found if entry.run == id]

    def close(self) -> None:
        """End everything."""
        for served in self.served:
            served.process.kill()
            served.process.wait()
        for name in list(self.joined):
            self.leave(name)
        if self.home.exists():
            stop(self.home)


def _running(home: Path, what: str) -> list[int]:
    """Return the processes below one FLWR_HOME whose command line has ``what``."""
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal()
        and what in _command(entry)
        and f"FLWR_HOME={home}" in _environment(entry)
    ]


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _environment(process: Path) -> list[str]:
    try:
        return (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
