"""One configuration, three engines, one seed: the same bits, on real Ray and a real SuperLink."""

import csv
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

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


TEXT = (
    "num_clients=3",
    "participation.cohort=3",
    "rounds=2",
    "model=hf_classifier",
    "model.pooling=mean",
    "data=text",
    "data.text=text",
    "data.label=label",
    "data.classes=[0,1]",
    "data.max_length=32",
    "adapter.rank=8",
    "adapter.init=seeded_random",
    "adapter.targets=[layer.5.attention.self.query,layer.5.attention.self.value]",
    "client.optimizer=adamw",
    "client.lr=0.03",
    "client.batch_size=32",
    "client.epochs=1",
    "privacy=sample",
    "privacy.epsilon=8",
    "privacy.delta=1e-4",
    "privacy.reproducible=true",
    "engine.threads=1",
    "timeout=600",
)


def test_private_rows_that_only_devices_have_train_a_language_model_to_the_same_bits(
    deployment: Loopback, tmp_path: Path
) -> None:
    """Noise comes from the seed here, so that there are bits to compare."""
    everybody = []
    for number, name in enumerate(deployment.joined):
        texts = [(f"{name} {row} {'good' if row % 2 else 'bad'}", row % 2) for row in range(64)]
        write_table(deployment.folder / name / "rows.csv", texts)
        deployment.settle(name, data="rows.csv")
        everybody += texts
        assert (
            number
            == yaml.safe_load((deployment.folder / name / "device.yaml").read_text())["number"]
        )
    for name in list(deployment.joined):
        deployment.leave(name)
        deployment.join(name)
    write_table(tmp_path / "all.csv", everybody)
    write_table(tmp_path / "public.csv", everybody[:40])
    out = tmp_path / "local"
    evaluated = f"data.eval_path={tmp_path / 'public.csv'}"
    here = (f"data.path={tmp_path / 'all.csv'}", evaluated, "partition=contiguous")
    run([*TEXT, *here, "engine.chunk=1", f"out={out}"])
    there = (f"data.path={tmp_path / 'public.csv'}", evaluated, "partition=on_devices")
    served = deployment.serve("text", *TEXT, *there)
    assert served.wait(800) == 0, served.said
    assert same_bits(served.run, out, 2)
    for line, other in zip(lines(served.run), lines(out), strict=True):
        assert line["eval_accuracy"] == other["eval_accuracy"]
        assert line["epsilon"] == other["epsilon"]
        assert line["failures"] == 0


def write_table(path: Path, texts: list[tuple[str, int]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *texts])


def test_a_run_on_ray_that_is_interrupted_ends_and_can_be_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "ray"
    words = [*COMMON, "rounds=1000", "participation.cohort=2", "engine=ray", f"out={out}"]
    metrics = out / "metrics.jsonl"
    # SIGINT is ignored in jobs that a shell starts in the background, and by their children.
    run = subprocess.Popen(
        [*FEDSYS, "run", *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while run.poll() is None and not (metrics.exists() and len(lines(out)) > 1):
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130, said
    assert f"fedsys resume {out}" in said
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
