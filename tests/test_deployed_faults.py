"""What a deployment survives, on a real SuperLink and real SuperNodes, with TLS and keys.

In every run a round goes wrong, and all is well in the rounds around it. What then counts is the
same: the run ends or says why, no update is used twice, the model is that of a run in which the
same clients took part, to the bit, and every release of a private client is in its ledger.
"""

import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from fedsys.experiment import run
from fedsys.participation import Uniform
from fedsys.privacy.accounting import epsilon, merged
from tests.cable import Cable
from tests.deployed import Loopback, Served, lines, same_params, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = (
    *("strategy=fedavg", "adapter=full", "data.limit=200", "data.public_fraction=0"),
    *("model.hidden=[6]", "model.pretrained=false", "client.steps=2"),
)
OWN = ("allow=[misbehaving]", "client._target_=misbehaving.Training")
PRIVATE = ("privacy=sample", "privacy.noise_multiplier=1", "privacy.reproducible=true")
NAMES = "abcde"


@dataclass
class Story:
    """A run that is over, and when what happened in it."""

    deployment: Loopback
    served: Served
    code: int
    began: float
    at: dict[str, float] = field(default_factory=dict)  # seconds

    def note(self, event: str) -> None:
        self.at[event] = time.monotonic() - self.began
        sys.stderr.write(f"{self.at[event]:6.1f} s: {event}\n")

    @property
    def participants(self) -> dict[int, list[int]]:
        return {line["round"]: line["participants"] for line in lines(self.served.run)[1:]}

    def reason(self, client: int, round: int) -> str:
        """Return why a client was left out of a round, by the run's own record."""
        line = lines(self.served.run)[round]
        (found,) = [text for text in line["reasons"] if text.startswith(f"client {client}: ")]
        return str(found)


def alone(folder: Path, *overrides: str, away: Mapping[int, Collection[int]] = {}) -> Path:
    """Run in this process, with the clients of ``away`` missing in a round; return the folder."""

    def draw(self, round, num_clients, state, rng):
        return [c for c in range(num_clients) if c not in away.get(round, ())], state

    with mock.patch.object(Uniform, "draw", draw):
        run([*SMALL, *overrides, "engine.chunk=1", "engine.threads=1", f"out={folder}"])
    return folder


def kill(*processes: int) -> None:
    assert processes
    for process in processes:
        os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    loopback = Loopback(tmp_path_factory.mktemp("faults"))
    loopback.modules = [loopback.teach()]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(loopback.folder)
        yield loopback
    loopback.close()


@pytest.fixture(scope="module")
def cables(deployment: Loopback) -> Iterator[dict[str, Cable]]:
    """Enrol five devices, two of them at the end of a cable, and have them join."""
    with Cable(deployment.port) as d, Cable(deployment.port) as e:
        found = {"d": d, "e": e}
        for name in NAMES:
            deployment.enrol(name, found[name].port if name in found else None)
            deployment.settle(name, seconds=90)
        deployment.join(*NAMES)
        yield found


@pytest.fixture(scope="module")
def broken(deployment: Loopback, cables: dict[str, Cable]) -> Story:
    """Break processes and lines while four of five devices have trained and not yet answered."""
    held = {name: deployment.tell(name, 2, "hold") for name in "bcde"}
    words = ("num_clients=5", "rounds=3", "timeout=150", "engine.patience=200")
    served = deployment.serve("broken", *SMALL, *OWN, *PRIVATE, *words)
    story = Story(deployment, served, -1, time.monotonic())
    deployment.await_there(*"bcde", round=2)
    story.note("broken")
    kill(*deployment.pids("b", "flwr-clientapp"))
    kill(*deployment.pids("c", "fedsys.deployment.node"))
    cables["d"].pull()
    cables["e"].sever()
    broken = time.monotonic()
    for file in held.values():
        file.unlink()
    time.sleep(30)
    cables["d"].plug()
    story.note("plugged")
    time.sleep(max(0.0, broken + 90 - time.monotonic()))
    cables["e"].mend()
    story.note("mended")
    story.code = served.wait()
    story.note("over")
    return story


def test_a_run_outlives_processes_that_are_killed_and_lines_that_are_cut(broken: Story) -> None:
    assert broken.code == 0, broken.served.said
    assert broken.participants == {1: [0, 1, 2, 3, 4], 2: [0, 3], 3: [0, 1, 2, 3, 4]}
