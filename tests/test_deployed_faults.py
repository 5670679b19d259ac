"""What a deployment survives, on a real SuperLink and real SuperNodes, with TLS and keys.

In every run a round goes wrong, and all is well in the rounds around it. What then counts is the
same: the run ends or says why, no update is used twice, the model is to the bit that of a run in
which the same clients took part, and every release of a private client is in its ledger.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fedsys.experiment import run
from fedsys.json_lines import JsonLines
from fedsys.participation import Uniform
from fedsys.privacy.accounting import epsilon, merged
from tests.cable import Cable
from tests.deployed import Loopback, Served, lines, same_bits, same_params

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = (
    *("strategy=fedavg", "adapter=full", "data.limit=200", "data.public_fraction=0"),
    *("model.hidden=[6]", "model.pretrained=false"),
    *("client.steps=2", "client.batch_size=8", "client.optimizer=sgd", "client.lr=0.1"),
)
OWN = ("allow=[misbehaving]", "client._target_=misbehaving.Training")
# Another seed for each run: a ledger lets no noise be used twice.
PRIVATE = ("privacy=sample", "privacy.noise_multiplier=1", "privacy.reproducible=true")
TWO = ("num_clients=2", "timeout=240", *PRIVATE)
FOUR = ("num_clients=4", "timeout=240", "engine.patience=240")
NAMES = "abcd"
EVERYBODY = [0, 1, 2, 3]
LOST = ("Node Unavailable", "the device was restarted")


@dataclass
class Story:
    """A run, and when what happened in it."""

    deployment: Loopback
    served: Served
    began: float = field(default_factory=time.monotonic)

    def note(self, event: str) -> float:
        """Say how long a thing took that is of interest to who reads the output."""
        sys.stderr.write(f"{time.monotonic() - self.began:6.1f} s: {event}\n")
        return time.monotonic()

    def ends(self) -> "Story":
        assert self.served.wait(600) == 0, self.served.said
        self.note("over")
        return self

    @property
    def run(self) -> Path:
        return self.served.run

    @property
    def participants(self) -> dict[int, list[int]]:
        attended = JsonLines(self.run / "participation.jsonl").read()
        return {line["round"]: line["clients"] for line in attended}

    def reason(self, client: int, round: int) -> str:
        """Return why a client was left out of a round, as the run's own record has it."""
        start = f"client {client}: "
        (line,) = [line for line in lines(self.run) if line["round"] == round]
        (found,) = [text for text in line["reasons"] if text.startswith(start)]
        return str(found)

    def entered(self, name: str) -> list[int]:
        """Return the rounds of a device's entries in its ledger, in their order."""
        return [entry.round for entry in self.deployment.entries(name, self.run)]


def alone(folder: Path, *overrides: str, away: Mapping[int, Collection[int]] = {}) -> Path:
    """Run in this process, the clients of ``away`` missing from a round; return the folder."""

    def draw(self, round, num_clients, state, rng):
        return [c for c in range(num_clients) if c not in away.get(round, ())], state

    with mock.patch.object(Uniform, "draw", draw):
        run([*SMALL, *overrides, "engine.chunk=1", "engine.threads=1", f"out={folder}"])
    return folder


def course(run: Path) -> list[dict[str, Any]]:
    """Return what two runs have in common, whatever their devices had spent before them."""
    names = ("round", "clients", "failures", "reasons", "eval_loss", "eval_accuracy", "norm")
    return [{name: line[name] for name in names} for line in lines(run)]


def kill(processes: list[int]) -> None:
    assert processes
    for process in processes:
        os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """Enrol four devices, of which two are at the end of a cable, and have them join."""
    loopback = Loopback(tmp_path_factory.mktemp("faults"))
    loopback.modules = [loopback.teach()]
    with (
        pytest.MonkeyPatch.context() as patch,
        Cable(loopback.port) as c,
        Cable(loopback.port) as d,
    ):
        patch.syspath_prepend(loopback.folder)
        loopback.cables = {"c": c, "d": d}
        for name in NAMES:
            cable = loopback.cables.get(name)
            loopback.enrol(name, cable.port if cable else None)
        loopback.settle("b", seconds=60)
        loopback.join(*NAMES)
        yield loopback
        loopback.close()


# ---- clients that misbehave


@pytest.fixture(scope="module")
def misbehaved(deployment: Loopback) -> Story:
    """Have clients do what they should not, and b hang beyond its limit of 60 s."""
    for name, round, word in (
        *(("b", 2, "nothing"), ("c", 2, "raise"), ("d", 2, "die")),
        ("b", 3, "hang"),
    ):
        deployment.tell(name, round, word)
    return Story(deployment, deployment.serve("misbehaved", *SMALL, *OWN, *FOUR, "rounds=4")).ends()


def test_a_run_goes_on_without_clients_that_misbehave(misbehaved: Story) -> None:
    assert misbehaved.participants == {1: EVERYBODY, 2: [0], 3: [0, 2, 3], 4: EVERYBODY}


@pytest.mark.parametrize(
    ("client", "round", "reason"),
    [
        (1, 2, "the ClientApp ended without a reply"),
        (2, 2, "the rows have gone"),
        (3, 2, "the ClientApp died"),
        (1, 3, "no reply within the 60 seconds of this device"),
    ],
    ids=["nothing", "raise", "die", "hang"],
)
def test_a_client_that_misbehaves_is_left_out_with_the_reason(
    misbehaved: Story, client: int, round: int, reason: str
) -> None:
    assert reason in misbehaved.reason(client, round)
    assert f"client {client} left out: " in misbehaved.served.said


def test_clients_that_misbehave_change_nothing_else(misbehaved: Story, tmp_path: Path) -> None:
    other = alone(tmp_path, "num_clients=4", "rounds=4", away={2: [1, 2, 3], 3: [1]})
    assert same_params(misbehaved.run, other, 4)


# ---- processes and lines that break


@pytest.fixture(scope="module")
def broken(deployment: Loopback) -> Story:
    """Break three of four devices when they have trained and not yet answered."""
    words = (*SMALL, *OWN, *FOUR, *PRIVATE, "rounds=3")
    story = Story(deployment, deployment.serve("broken", *words))
    held = [deployment.tell(name, 2, "hold") for name in "bcd"]
    deployment.await_there(story.served, *"bcd", round=2)
    kill(deployment.pids("b", "fedsys.deployment.node"))
    deployment.cables["c"].pull()
    deployment.cables["d"].sever()
    begun = story.note("broken")
    for file in held:
        file.unlink()
    time.sleep(30)
    deployment.cables["c"].plug()
    time.sleep(max(0.0, begun + 90 - time.monotonic()))
    deployment.cables["d"].mend()
    return story.ends()


def test_a_run_goes_on_without_devices_that_break(broken: Story) -> None:
    # That of c was cut for 30 s only: its update came through, once.
    assert broken.participants == {1: EVERYBODY, 2: [0, 2], 3: EVERYBODY}
    for client in (1, 3):
        assert any(lost in broken.reason(client, 2) for lost in LOST)


def test_a_node_that_was_killed_comes_back_by_itself(broken: Story, deployment: Loopback) -> None:
    said = deployment.said_by("b")
    assert "killed by signal 9" in said
    # Flower holds a connection for a minute.
    assert "the server still holds this device's former connection; trying again" in said
    assert said.count("connected to the server") == 2


def test_devices_that_break_change_nothing_else(broken: Story, tmp_path: Path) -> None:
    other = alone(tmp_path, "num_clients=4", "rounds=3", *PRIVATE, away={2: [1, 3]})
    assert same_params(broken.run, other, 3)


def test_what_was_released_in_vain_is_in_the_ledger_and_in_epsilon(broken: Story) -> None:
    for name in NAMES:
        assert broken.entered(name) == [1, 2, 3]
    entries = broken.deployment.entries("b", broken.run)
    spent = epsilon(merged(entry.release for entry in entries), entries[0].delta)
    assert lines(broken.run)[-1]["epsilon"] == pytest.approx(spent)


# ---- the server's processes


@pytest.fixture(scope="module")
def two(deployment: Loopback) -> Loopback:
    """Leave two devices of the four, for runs that nothing but the server is to disturb."""
    for name in "cd":
        deployment.leave(name)
    return deployment


def test_a_run_outlives_its_superlink(two: Loopback, tmp_path: Path) -> None:
    words = (*TWO, "rounds=3", "seed=1")
    story = Story(two, two.serve("superlink", *SMALL, *OWN, *words))
    held = [two.tell(name, 2, "hold") for name in "ab"]
    two.await_there(story.served, *"ab", round=2)
    kill(two.server_pids("guarded superlink"))
    story.note("killed")
    for file in held:
        file.unlink()
    story.ends()
    assert "the superlink had died and was started again" in story.served.said
    undisturbed = alone(tmp_path, *words)
    assert same_bits(story.run, undisturbed, 3)
    assert course(story.run) == course(undisturbed)
    for name in "ab":
        assert story.entered(name) == [1, 2, 3]


def test_a_server_that_was_killed_goes_on_from_its_checkpoint(
    two: Loopback, tmp_path: Path
) -> None:
    words = (*TWO, "rounds=3", "seed=2")
    story = Story(two, two.serve("killed", *SMALL, *OWN, *words))
    held = [two.tell(name, 2, "hold") for name in "ab"]
    two.await_there(story.served, *"ab", round=2)
    kill([story.served.process.pid])
    kill(two.server_pids("flwr-serverapp") + two.server_pids("guarded superlink"))
    story.note("killed")
    for file in held:
        file.unlink()
    assert story.served.wait() == -signal.SIGKILL
    assert len(lines(story.run)) == 2
    story.served = two.serve("killed", *SMALL, *OWN, *words)
    story.ends()
    undisturbed = alone(tmp_path, *words)
    assert same_bits(story.run, undisturbed, 3)
    assert course(story.run) == course(undisturbed)
    for name in "ab":  # though round 2 was asked for twice
        assert story.entered(name) == [1, 2, 3]


# ---- a device without space


@pytest.fixture
def full(two: Loopback) -> Iterator[Path]:
    """Have b begin anew with a small disk; yield a file that fills it as soon as it is written."""
    two.leave("b")
    disk = two.folder / "b" / "state"
    shutil.rmtree(disk)
    disk.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk))
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        two.join("b")
        yield disk / "filler"
        two.leave("b")
    finally:
        subprocess.run(("umount", "-l", str(disk)), check=True)


def test_a_device_whose_disk_is_full_is_left_out_until_there_is_space(
    two: Loopback, full: Path, tmp_path: Path
) -> None:
    words = (*TWO, "rounds=3", "seed=3")
    story = Story(two, two.serve("full", *SMALL, *OWN, *words))
    at_2, at_3 = two.tell("b", 2, "wait"), two.tell("b", 3, "wait")
    two.await_there(story.served, "b", round=2)
    with suppress(OSError), full.open("wb", buffering=0) as filler:
        while True:
            filler.write(b" " * 4096)
    at_2.unlink()
    two.await_there(story.served, "b", round=3)
    full.unlink()
    at_3.unlink()
    story.ends()
    assert story.participants == {1: [0, 1], 2: [0], 3: [0, 1]}
    assert "No space left on device" in story.reason(1, 2)
    assert story.entered("b") == [1, 3]
    assert same_params(story.run, alone(tmp_path, *words, away={2: [1]}), 3)


# ---- too few devices


def test_a_run_that_lacks_devices_ends_and_says_so(two: Loopback) -> None:
    if "b" in two.joined:
        two.leave("b")
    served = two.serve("few", *SMALL, "num_clients=2", "engine.patience=5")
    assert served.wait() == 1
    assert "1 of the 2" in served.said
    assert not served.run.exists() or len(lines(served.run)) <= 1
