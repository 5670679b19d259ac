"""Every command of docs/deploy.md, run on loopback: from nothing to a finished private run."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsys.deployment.superlink import stop
from tests.deployed import ENVIRONMENT, free_port

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
DEVICES = ("clinic-a", "clinic-b", "clinic-c")
GOOD = ("a joy from start to end", "warm , funny and wise", "the best film of the year")
BAD = ("a waste of time", "dull , loud and far too long", "the worst film of the year")


def commands(where: str) -> list[str]:
    """Return the commands of the blocks that are marked ``sh where``."""
    blocks = re.findall(rf"```sh {where}\n(.*?)```", DOC, re.DOTALL)
    joined = "".join(blocks).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | ENVIRONMENT | {"PATH": path}


def table(path: Path, rows: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for row in range(rows):
            texts = GOOD if row % 2 else BAD
            writer.writerow((f"{texts[row % 3]} {row}", row % 2))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    if (tmp_path / "fedsys-server").exists():
        stop(tmp_path / "fedsys-server")


def test_the_document_has_a_part_for_the_server_and_one_for_devices() -> None:
    assert [line.split()[1] for line in commands("server")] == ["enrol"] * 3 + ["serve"]
    assert [line.split()[1] for line in commands("device")] == ["join", "join"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_commands_lead_to_a_finished_private_run(folder: Path) -> None:
    port = free_port()
    here = {
        "server.example:8443": f"127.0.0.1:{port}",
        "engine.host=0.0.0.0": f"engine.port={port} engine.threads=1",
    }

    def shell(command: str) -> "subprocess.Popen[str]":
        for written, meant in here.items():
            command = command.replace(written, meant)
        return subprocess.Popen(
            f"exec {command}",
            shell=True,
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    *enrolments, serve = commands("server")
    for command in enrolments:
        process = shell(command)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    table(folder / "public.csv", 60)
    for name in DEVICES:
        table(folder / name / "rows.csv", 150)
    dry, join = commands("device")
    process = shell(dry)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "what never leaves:\n  rows" in said
    joined = [shell(join.replace("clinic-a", name)) for name in DEVICES]
    try:
        served = shell(serve)
        said, _ = served.communicate(timeout=600)
        assert served.returncode == 0, said
    finally:
        for process in joined:
            process.terminate()
        told = {name: p.communicate(timeout=60)[0] for name, p in zip(DEVICES, joined, strict=True)}
    summary = json.loads((folder / "runs" / "clinics" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["engine"] == "deployment"
    assert 0 < summary["epsilon"] <= 4
    assert (folder / "runs" / "clinics" / "report.html").is_file()
    for name in DEVICES:
        assert "leave, to train" in told[name]
        ledger = folder / name / "state" / "ledger" / "ledger.jsonl"
        entries = [json.loads(line) for line in ledger.read_text().splitlines()]
        assert [entry["round"] for entry in entries] == [1, 2]
        assert all(entry["num_examples"] == 150 for entry in entries)
