"""The files of a run, written as it goes.

config.yaml overrides.yaml env.json     what was asked, and where it ran
partition.json partition.png            who holds what
metrics.jsonl                           a line a round; round 0 is the model before training
participation.jsonl participation.png   whose updates were used in each round
checkpoints/                            see fedsys.checkpoint
audit/                                  of a run with canaries, see fedsys.privacy.observed
summary.json adapter/                   at the end
"""

import json
import os
import platform
import resource
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import OmegaConf

from fedsys import settings
from fedsys.checkpoint import Checkpoints, ClientStates
from fedsys.errors import ClientFailure, RunError
from fedsys.json_lines import JsonLines, strict, write_whole
from fedsys.locks import hold
from fedsys.params import Params
from fedsys.privacy.ledger import Head, Ledger
from fedsys.privacy.release import Spent
from fedsys.records import RoundRecord
from fedsys.snapshot import Snapshot
from fedsys.update import Update

if TYPE_CHECKING:
    from fedsys.privacy.observed import Observed

PACKAGES = ("fedsys", "torch", "flwr", "numpy", "opacus", "hydra-core", "transformers", "peft")
Metrics = dict[str, Any]


class Listener(Protocol):
    """Who is shown the run while it goes on."""

    def round(self, record: Metrics, rounds: int) -> None:
        """A round is over; ``record`` is its line of ``metrics.jsonl``."""
        ...

    def failure(self, client: int, reason: str) -> None:
        """A client's reply was left out."""
        ...


class RunFolder:
    """The recorder of a run: metrics, checkpoints, and whoever listens."""

    def __init__(
        self,
        folder: Path,
        rounds: int,
        when: settings.Checkpoints,
        clients: ClientStates,
        listener: Listener,
    ) -> None:
        """Record a run of ``rounds``; ``clients`` are memories shared with the engine."""
        self.folder = folder
        self.rounds = rounds
        self.every = when.every
        self.clients = clients
        self._checkpoints = Checkpoints(folder / "checkpoints", when.keep)
        self.listener = listener
        self.on_factors: Callable[[Params], None] = lambda _: None  # told of them before round 1
        self.on_base: Callable[[Snapshot], None] = lambda _: None  # told whenever it has moved
        self.params: Params = {}  # x_t
        self.spent: Mapping[int, Spent] = {}  # what each private client has released
        self.ledger: Ledger | None = None  # of the clients of this process
        self.observed: Observed | None = None  # what clients send, for an audit
        self._bytes_init = 0
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._participation = JsonLines(folder / "participation.jsonl")

    # ---- before the run

    def exists(self) -> bool:
        """Return whether a run was begun here."""
        return (self.folder / "config.yaml").exists()

    def create(
        self, resolved: Metrics, overrides: list[str], run: str, chunk: int | None = None
    ) -> None:
        """Write what was asked for; the configuration last, since it makes a folder a run's.

        ``run`` is the run's id, by which ledgers know it, and ``chunk`` how many clients train in
        one pass.
        """
        facts = {"run": run, "chunk": chunk, **environment()}
        write_whole(self.folder / "env.json", json.dumps(facts, indent=2) + "\n")
        write_whole(self.folder / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
        write_whole(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; raise ``Busy`` when another process runs in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with hold(self.folder / ".lock", f"another process is running in {self.folder}"):
            yield

    # ---- fedsys.records.Recorder

    def restore(self, like: Snapshot) -> Snapshot | None:
        """Return the last checkpoint, with metrics and memories as they were then."""
        found = self._checkpoints.load(like)
        if found is None:
            self._keep_lines(-1)
            return None
        snapshot, clients = found
        if self.ledger is not None and snapshot.anchor:
            self.ledger.check(Head.of(snapshot.anchor))
        self.clients.clear()
        self.clients.update(clients)
        self._keep_lines(snapshot.round)
        return snapshot

    def prepared(self, snapshot: Snapshot, bytes_init: int) -> None:
        """Keep the frozen factors and hand them to whoever evaluates."""
        self._bytes_init = bytes_init
        self.params, self.spent = snapshot.params, snapshot.spent
        if snapshot.frozen:
            self.on_factors(snapshot.frozen)
        if snapshot.version:
            self.on_base(snapshot)
        if snapshot.round == 0:
            self._checkpoints.save_frozen(snapshot.frozen)

    def checkpoints(self) -> list[int]:
        """Return the rounds that a resumed run may go back to, always as many; 0: the beginning."""
        kept, keep = self._checkpoints.rounds(), self._checkpoints.keep
        # As many, so that the bytes of a message are the same after a resume.
        return ([0] * keep + kept)[-keep:] if self.every else []

    def watch(self, snapshot: Snapshot, updates: Iterator[Update]) -> Iterator[Update]:
        """Pass the updates on, noted where the run is to be audited."""
        watching = self.observed
        return updates if watching is None else watching.watch(snapshot.params, updates)

    def moved(self, snapshot: Snapshot) -> None:
        """Hand the moved base to whoever evaluates."""
        self.on_base(snapshot)

    def failed(self, failure: ClientFailure) -> None:
        """Pass the failure on."""
        self.listener.failure(failure.client, failure.reason)

    def finished(self, snapshot: Snapshot, record: RoundRecord) -> None:
        """Write the round's line, and a checkpoint when one is due."""
        # The lines go first: one without a checkpoint is dropped at resume, never the reverse.
        self.write(record)
        self._participation.append(record.attendance())
        self.params, self.spent = snapshot.params, snapshot.spent
        if self.observed is not None:
            self.observed.write(snapshot.round)
        due = self.every and (snapshot.round % self.every == 0 or snapshot.round == self.rounds)
        if due:
            if self.ledger is not None:
                snapshot = replace(snapshot, anchor=self.ledger.head.as_dict())
            try:
                self._checkpoints.save(snapshot, self.clients)
            except OSError as error:
                raise RunError(
                    f"the checkpoint of round {snapshot.round} cannot be written: {error}; "
                    f"free some space, then `fedsys resume {self.folder}`"
                ) from error

    # ---- metrics

    def write(self, record: RoundRecord) -> None:
        """Append a line to ``metrics.jsonl``; raises ``RunError`` when it cannot be written."""
        if record.round == 0:
            record = replace(record, bytes_init=self._bytes_init)
        line = record.as_dict()
        self._metrics.append(line)
        self.listener.round(line, self.rounds)

    def lines(self) -> list[Metrics]:
        """Return the lines of ``metrics.jsonl``; a torn last line is left out."""
        return self._metrics.read()

    def participants(self) -> list[tuple[int, list[int]]]:
        """Return, for each round so far, its number and the clients whose updates were used."""
        return [(line["round"], line["clients"]) for line in self._participation.read()]

    def summarise(self, status: str, **facts: Any) -> Metrics:
        """Write ``summary.json`` from the metrics and ``facts``, and return it."""
        lines = self.lines()
        rounds = [line for line in lines if line["round"] > 0]
        seconds = sum(line["seconds"] for line in rounds)
        updates = sum(line["clients"] for line in rounds)
        summary = {
            "status": status,
            "final": _last(lines),
            "best": _best(lines),
            "rounds": len(rounds),
            "failures": sum(line["failures"] for line in rounds),
            "bytes_up": sum(line["bytes_up"] for line in rounds),
            "bytes_down": sum(line["bytes_down"] for line in rounds),
            "bytes_init": sum(line["bytes_init"] for line in lines),
            "seconds": seconds,
            "seconds_per_round": seconds / len(rounds) if rounds else None,
            "client_updates_per_second": updates / seconds if seconds else None,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "epsilon": rounds[-1]["epsilon"] if rounds else None,
            "delta": None,
            "ledger": self.ledger.head.as_dict() if self.ledger is not None else None,
            **facts,
        }
        write_whole(self.folder / "summary.json", strict(summary, indent=2) + "\n")
        return summary

    def _keep_lines(self, last_round: int) -> None:
        self._metrics.keep(last_round)
        self._participation.keep(last_round)
        if self.observed is not None:
            self.observed.keep(last_round)


def new_run_id() -> str:
    """Return an id that no other run has."""
    return secrets.token_hex(8)


def id_of(folder: Path) -> str | None:
    """Return the id of the run in ``folder``; None where none was begun."""
    run: str | None = _facts(folder).get("run")
    return run


def chunk_of(folder: Path) -> int | None:
    """Return how many clients train in one pass in the run in ``folder``; None if not known."""
    chunk: int | None = _facts(folder).get("chunk")
    return chunk


def _facts(folder: Path) -> Metrics:
    kept = folder / "env.json"
    facts: Metrics = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    return facts


def environment() -> Metrics:
    """Return the versions and the machine a run depends on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "git": _git_commit(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    home = Path(__file__).resolve().parents[1]
    if not (home / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _last(lines: list[Metrics]) -> Metrics:
    names = ("train_loss", "eval_loss", "eval_accuracy")
    final: Metrics = {}
    for name in names:
        values = [line[name] for line in lines if line[name] is not None]
        final[name] = values[-1] if values else None
    return final


def _best(lines: list[Metrics]) -> Metrics:
    """Return the round of the highest accuracy or, where there is none, of the lowest loss."""
    classified = [line for line in lines if line["eval_accuracy"] is not None]
    measured = [line for line in lines if line["eval_loss"] is not None]
    if classified:
        best = max(classified, key=lambda line: line["eval_accuracy"])
    elif measured:
        best = min(measured, key=lambda line: line["eval_loss"])
    else:
        return dict.fromkeys(("round", "eval_loss", "eval_accuracy"))
    return {name: best[name] for name in ("round", "eval_loss", "eval_accuracy")}
