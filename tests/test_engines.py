"""One configuration, three engines, one seed: the same bits, on real Ray and a real SuperLink."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsys.experiment import run
from tests.deployed import FEDSYS, Loopback, lines, same_bits
from tests.runs import comparable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMMON = ("num_clients=3", "rounds=2", "client.steps=2", "engine.threads=1", "timeout=600")
METHODS = {
    "fed_sb": ("strategy=fed_sb", "participation.cohort=2"),
    "fedau": ("strategy=fedau", "participation=bernoulli", "participation.rate=0.8"),
    "frl": ("strategy=frl", "participation.cohort=2"),
    "econtrol": ("strategy=econtrol", "compression=topk_econtrol", "participation.cohort=2"),
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    loopback = Loopback(tmp_path_factory.mktemp("deployment"))
    names = ("a", "b", "c")
    for name in names:
        loopback.enrol(name)
    loopback.join(*names)
    yield loopback
    loopback.close()


@pytest.fixture(scope="module", params=METHODS)
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    method: str = request.param
    out: Path = tmp_path_factory.mktemp("local") / method
    run([*COMMON, *METHODS[method], "engine.chunk=1", f"out={out}"])
    return out


def test_ray_trains_to_the_same_bits(local: Path, tmp_path: Path) -> None:
    out = tmp_path / "ray"
    words = [*COMMON, *METHODS[local.name], "engine=ray", f"out={out}"]
    done = subprocess.run([*FEDSYS, "run", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same_bits(out, local, 2)
    assert comparable(lines(out)) == comparable(lines(local))


def test_devices_train_to_the_same_bits(local: Path, deployment: Loopback) -> None:
    served = deployment.serve(local.name, *COMMON, *METHODS[local.name])
    assert served.wait() == 0, served.said
    assert same_bits(served.run, local, 2)
    assert comparable(lines(served.run)) == comparable(lines(local))
