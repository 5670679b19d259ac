"""Who is refused in a deployment, and what people are told: real processes, with TLS and keys.

One server has two good devices and many that are not. The good ones train; at every other one, or
at the server, stands why it does not.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from fedsys.deployment import commands, pki
from fedsys.deployment.enrolment import enrol
from fedsys.deployment.guarded import SECRET, secret
from fedsys.deployment.superlink import SuperLink
from fedsys.json_lines import JsonLines
from tests.deployed import ENVIRONMENT, Loopback, Served, free_port, lines, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    *("num_clients=8", "rounds=1", "timeout=240", "strategy=fedavg", "adapter=full"),
    *("data.limit=200", "model.hidden=[6]", "model.pretrained=false", "client.steps=2"),
)
SAMPLE = {"privacy": "sample", "max_epsilon": 3.0, "evaluate": False}
POLICIES = {
    "good": {},
    "fine": {},
    "bytes": {"max_bytes": 1000},
    "strategy": {"strategies": ["FedAU"]},
    "private": SAMPLE,
    "code": {"code": ["0" * 64]},
    "stranger": {},
}
OUTSIDERS = ("plain", "elsewhere", "keyless")  # of another server home
FLOWER = Path(sys.executable).with_name("flower-supernode")


@dataclass
class Refused:
    """What was seen."""

    deployment: Loopback
    first: Served  # with every device
    second: Served  # a private one, that one of two devices refuses
    expired: str  # what a device said of the server's old certificate


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refused]:
    loopback = Loopback(tmp_path_factory.mktemp("refusals"))
    try:
        for name, policy in POLICIES.items():
            loopback.enrol(name, **policy)
        key, _ = pki.device_key()
        (loopback.folder / "stranger" / "device.key").write_bytes(key)
        expired = _meet_an_expired_certificate(loopback, "good")
        first = loopback.serve("first", *SMALL, "engine.min_clients=3", "engine.patience=300")
        other, address = loopback.folder / "other", f"127.0.0.1:{loopback.port}"
        for name in OUTSIDERS:
            insecure = name == "plain"
            enrol(name, other, address, folder=loopback.folder / name, insecure=insecure)
        (loopback.folder / "keyless" / "device.key").unlink()
        loopback.join(*OUTSIDERS, *(name for name in POLICIES if name != "good"))
        wait_for("a device", lambda: "connected" in loopback.said_by("fine"))
        with without_fedsys(loopback):
            assert first.wait() == 0, first.said
        for name in ("fine", "bytes", "strategy", "code"):
            loopback.leave(name)
        private = (
            *("privacy=sample", "privacy.epsilon=8"),
            "engine.min_clients=2",
            "engine.patience=5",
        )
        second = loopback.serve("second", *SMALL, *private)
        second.wait()
        yield Refused(loopback, first, second, expired)
    finally:
        loopback.close()


def _meet_an_expired_certificate(loopback: Loopback, name: str) -> str:
    """Have a SuperLink show a certificate that has ended; return what a device says of it.

    The device is left waiting: a server that is started with `fedsys serve` renews it.
    """
    home, link = loopback.home, SuperLink(loopback.home, port=loopback.port)
    (home / "server.crt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        ago = pki.now() - timedelta(days=400)
        patch.setattr(pki, "now", lambda: ago)
        pki.server_certificate(home, ["127.0.0.1"])
    secret(home / SECRET)
    arguments = commands.superlink(link.home, link.host, link.port, False)
    link.superlink.start(arguments, commands.environment(link.home, link.address))
    loopback.join(name)
    wait_for("expired", lambda: "is not valid" in loopback.said_by(name))
    link.superlink.stop()
    return loopback.said_by(name)


@contextmanager
def without_fedsys(loopback: Loopback) -> Iterator[None]:
    """Have Flower's own SuperNodes call, which keep to no rule of a device folder."""
    authorities = {
        "no key": ["--root-certificates", str(loopback.home / "ca.crt")],
        "in the clear": ["--insecure"],
        "other authority": ["--root-certificates", str(loopback.folder / "other" / "ca.crt")],
    }
    command = [str(FLOWER), "--superlink", f"127.0.0.1:{loopback.port}", "--port"]
    path = {"PATH": os.pathsep.join([str(FLOWER.parent), os.environ["PATH"]])}
    running = []
    for name, words in authorities.items():
        own = path | {"FLWR_HOME": str(loopback.folder / name)}
        with (loopback.folder / f"{name}.log").open("wb") as log:
            running.append(
                subprocess.Popen(
                    [*command, str(free_port()), *words],
                    stdout=log,
                    stderr=log,
                    env=os.environ | ENVIRONMENT | own,
                    start_new_session=True,  # it leaves processes behind
                )
            )
    yield
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def participants(run: Path) -> list[list[int]]:
    return [line["clients"] for line in JsonLines(run / "participation.jsonl").read()]


def test_good_devices_train_whoever_else_is_refused(refused: Refused) -> None:
    assert participants(refused.first.run) == [[0, 1]]
    assert JsonLines(refused.first.run / "metrics.jsonl").read()[-1]["failures"] == 1


def test_a_reply_that_may_not_leave_is_told_at_both_ends(refused: Refused) -> None:
    reason = r"policy: the reply has \d+ bytes, at most 1000"
    (recorded,) = lines(refused.first.run)[1]["reasons"]
    assert re.fullmatch(f"client 2: {reason}", recorded)
    assert re.search(f"client 2 left out: {reason}", refused.first.said)
    assert re.search(f"an error leaves, to train: {reason}", refused.deployment.said_by("bytes"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("strategy", "policy: strategy FedAvg is not among those allowed"),
        ("private", "policy: privacy is none, and sample is required"),
        ("code", r"policy: the code [0-9a-f]{16} is not among those allowed"),
    ],
)
def test_a_run_that_a_policy_forbids_is_told_at_the_device(
    refused: Refused, name: str, reason: str
) -> None:
    assert re.search(
        f"no work on a query.whoami message: {reason}", refused.deployment.said_by(name)
    )
    # None of its code was unpacked, and nothing of it was started.
    assert not list((refused.deployment.folder / name / "state" / "flwr").glob("apps/*"))


def test_too_high_an_epsilon_is_told_at_both_ends(refused: Refused) -> None:
    reason = "privacy.epsilon is 8"
    assert refused.second.process.returncode == 1
    assert re.search(rf"policy: .*{reason}.*, at most 3", refused.second.said)
    assert re.search(rf"policy: .*{reason}.*, at most 3", refused.deployment.said_by("private"))
    assert not (refused.deployment.folder / "private" / "state" / "ledger").exists()
    assert participants(refused.second.run) == []


def test_a_key_that_nobody_registered_is_refused_for_good(refused: Refused) -> None:
    join = refused.deployment.joined["stranger"]
    assert join.wait(240) == 2
    said = refused.deployment.said_by("stranger")
    assert "the server does not know the key of this device" in said
    assert "connected" not in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("plain", "asks for TLS, and this device was enrolled without keys; trying again"),
        ("elsewhere", "is not from the authority that this device trusts"),
        ("keyless", "device.key is missing; copy the whole folder"),
    ],
)
def test_who_lacks_what_the_server_asks_for_is_told_so(
    refused: Refused, name: str, reason: str
) -> None:
    assert reason in refused.deployment.said_by(name)
    assert "connected" not in refused.deployment.said_by(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no key", "SuperNode authentication is enabled. All SuperNodes must be registered"),
        ("in the clear", "Connection attempt failed, retrying"),
        ("other authority", "Connection attempt failed, retrying"),
    ],
)
def test_a_supernode_of_other_making_is_refused_by_the_server_itself(
    refused: Refused, name: str, reason: str
) -> None:
    said = refused.deployment.said_by(name)
    assert reason in said
    assert "SuperNode ID" not in said  # as it says when it is let in


def test_a_server_whose_certificate_has_ended_is_not_spoken_to(refused: Refused) -> None:
    assert "is not valid by the clock of this device: certificate has expired" in refused.expired
    assert "connected to the server" not in refused.expired
    # With a new one, the same process goes on.
    assert "connected to the server" in refused.deployment.said_by("good")
