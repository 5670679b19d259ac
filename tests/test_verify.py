"""``fedsys verify``: whatever a run folder says beside its ledger is found out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedsys.console import show_table
from fedsys.privacy.accounting import Release, epsilon, merged
from fedsys.privacy.entries import FILE, GENESIS, line_of
from fedsys.privacy.ledger import Head, Ledger, NewEntry
from fedsys.privacy.verify import Report, verify

DELTA = 1e-5
STEP = Release(1.5, 0.25, 4)  # of a client in a round
WHO = {1: (0, 1), 2: (0, 2), 3: (1,)}  # who takes part in which round


def entry(round: int, client: int | str, **changes: Any) -> NewEntry:
    known = {
        "run": "this",
        "round": round,
        "client": f"{client}",
        "data": "digits",
        "fingerprint": "f",
        "num_examples": 9,
        "mechanism": "dp-sgd",
        "release": STEP,
        "clipping_norm": 1.0,
        "target": 8.0,
        "delta": DELTA,
        "stream": f"{changes.get('run', 'this')}/{changes.get('mechanism')}/{round}/{client}",
        "reply": f"reply of {client} in {round}",
    }
    return NewEntry(**(known | changes))


def figure(steps: int, *more: Release) -> float:
    return epsilon(merged([Release(1.5, 0.25, steps), *more]), DELTA)


# By hand: in round 1 clients have taken part once, from round 2 on client 0 twice.
FIGURES = {1: figure(4), 2: figure(8), 3: figure(8)}


def metrics_line(round: int, clients: int, epsilon: float | None) -> dict[str, Any]:
    return {"round": round, "clients": clients, "train_loss": None, "epsilon": epsilon}


class Forger:
    """Writes a run folder by hand: honest until somebody changes a part of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [metrics_line(0, 0, None)]
        self.heads: dict[int, Head] = {}
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {"privacy": {"epsilon": 8.0, "ledger": None}}
        self.env: dict[str, Any] = {"run": "this"}
        self.ledger = folder / "ledger"

    def train(self, *extra: NewEntry) -> None:
        with Ledger(self.ledger) as ledger:
            for round, clients in WHO.items():
                ledger.append([entry(round, client) for client in clients])
                self.heads[round] = ledger.head
                self.lines.append(metrics_line(round, len(clients), FIGURES[round]))
            ledger.append(list(extra))
            head = ledger.head
        self.summary = {
            "status": "completed",
            "rounds": 3,
            "epsilon": FIGURES[3],
            "delta": DELTA,
            "ledger": head.as_dict(),
        }

    def write(self) -> Report:
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.folder / "metrics.jsonl").write_text(text)
        (self.folder / "config.yaml").write_text(json.dumps(self.config))
        (self.folder / "env.json").write_text(json.dumps(self.env))
        if self.summary:
            (self.folder / "summary.json").write_text(json.dumps(self.summary))
        for round in (2, 3):
            if round in self.heads:
                path = self.folder / "checkpoints" / f"round_00000{round}" / "checkpoint.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                said = {"round": round, "ledger": self.heads[round].as_dict()}
                path.write_text(json.dumps(said))
        return verify(self.folder)

    def file(self) -> Path:
        return self.ledger / FILE

    def cut(self, kept: int) -> None:
        lines = self.file().read_bytes().splitlines(keepends=True)
        assert kept < len(lines)
        self.file().write_bytes(b"".join(lines[:kept]))


@pytest.fixture
def forger(tmp_path: Path) -> Forger:
    return Forger(tmp_path)


def only(report: Report, *texts: str) -> None:
    """Check that ``texts`` are what is wrong, and nothing else."""
    assert len(report.problems) == len(texts), report.problems
    for problem, text in zip(report.problems, texts, strict=True):
        assert text in problem
    assert dict(report.rows())["result"].startswith(f"{len(texts)} problem")


def test_an_honest_run_is_as_recorded(forger: Forger, capsys: pytest.CaptureFixture[str]) -> None:
    forger.train()
    report = forger.write()
    assert report.problems == []
    rows = dict(report.rows())
    assert rows["result"] == "as recorded"
    assert rows["entries"] == "5, 5 of this run"
    assert rows["epsilon"] == f"{FIGURES[3]:.6g}, spent by client 0"
    assert rows["anchored in"] == "summary.json, round_000002, round_000003"
    show_table(report.rows())
    assert "as recorded" in capsys.readouterr().out


def test_verifying_changes_nothing(forger: Forger) -> None:
    forger.train()
    forger.write()
    before = {path: path.read_bytes() for path in forger.folder.rglob("*") if path.is_file()}
    with Ledger(forger.ledger):  # a run may still be going on
        assert verify(forger.folder).problems == []
    after = {path: path.read_bytes() for path in forger.folder.rglob("*") if path.is_file()}
    assert after == before


# ---- the ledger


def test_a_ledger_that_is_not_there(forger: Forger) -> None:
    forger.train()
    forger.file().unlink()
    only(forger.write(), "there is no ledger")


def test_a_run_that_was_not_private(forger: Forger) -> None:
    forger.summary = {"status": "completed", "rounds": 0, "epsilon": None, "ledger": None}
    forger.config = {"privacy": None}
    report = forger.write()
    assert any("there is no ledger" in problem for problem in report.problems)


@pytest.mark.parametrize("place", [10, 700, 1500])
def test_an_altered_ledger(forger: Forger, place: int) -> None:
    forger.train()
    data = bytearray(forger.file().read_bytes())
    data[place] ^= 1
    forger.file().write_bytes(data)
    only(forger.write(), "cannot be believed")


def test_a_smaller_number_of_steps(forger: Forger) -> None:
    forger.train()
    data = forger.file().read_bytes()
    assert b'"steps":4' in data
    forger.file().write_bytes(data.replace(b'"steps":4', b'"steps":3', 1))
    only(forger.write(), "cannot be believed")


def test_a_truncated_ledger(forger: Forger) -> None:
    forger.train()
    forger.cut(4)
    report = forger.write()
    assert sum("the end of the ledger is missing" in text for text in report.problems) == 2
    assert any("round 3 used 1 updates, the ledger has 0" in text for text in report.problems)


def test_a_truncated_ledger_whose_anchors_were_removed(forger: Forger) -> None:
    forger.train()
    forger.cut(2)
    forger.summary, forger.heads = {}, {}
    report = forger.write()
    for text in ("knows the head", "round 2 used 2 updates", "round 2 of metrics.jsonl says"):
        assert any(text in problem for problem in report.problems)


def test_a_ledger_made_anew(forger: Forger) -> None:
    forger.train()
    forger.file().unlink()
    with Ledger(forger.ledger) as ledger:
        ledger.append([entry(r, c) for r, clients in WHO.items() for c in clients])
    only(forger.write(), *[f"another one than {n}" for n in ("summary", "round", "round")])


def test_one_checkpoint_that_knows_another_head(forger: Forger) -> None:
    forger.train()
    forger.heads[2] = Head(4, "0" * 64)
    only(forger.write(), "another one than round_000002 knows")


def test_a_summary_that_knows_no_head(forger: Forger) -> None:
    forger.train()
    del forger.summary["ledger"]
    only(forger.write(), "summary.json: this is no head")


# ---- what the run says


@pytest.mark.parametrize(("factor", "round"), [(0.999, 1), (0.5, 2), (1.001, 3), (0.0, 3)])
def test_another_epsilon_in_the_metrics(forger: Forger, factor: float, round: int) -> None:
    forger.train()
    forger.lines[round]["epsilon"] *= factor
    only(forger.write(), f"round {round} of metrics.jsonl says epsilon")


def test_no_epsilon_in_the_metrics(forger: Forger) -> None:
    forger.train()
    forger.lines[2]["epsilon"] = None
    only(forger.write(), "round 2 of metrics.jsonl says no epsilon")


@pytest.mark.parametrize("said", [0.1, None, math.inf, "3", []])
def test_another_epsilon_in_the_summary(forger: Forger, said: Any) -> None:
    forger.train()
    forger.summary["epsilon"] = said
    only(forger.write(), "summary.json")


def test_another_delta_in_the_summary(forger: Forger) -> None:
    forger.train()
    forger.summary["delta"] = 1e-3
    only(forger.write(), "summary.json says delta 0.001, not 1e-05")


def test_several_deltas(forger: Forger) -> None:
    forger.train(entry(3, 5, delta=1e-3))
    only(forger.write(), "several deltas")


def test_a_round_that_was_left_out_of_the_metrics(forger: Forger) -> None:
    forger.train()
    del forger.lines[-1]
    only(
        forger.write(),
        "1 releases were entered after the end",
        "summary.json tells of 3 rounds, metrics.jsonl of 2",
    )


def test_metrics_that_say_nothing(forger: Forger) -> None:
    forger.train()
    forger.lines[1] = {"round": "one"}
    report = forger.write()
    assert "metrics.jsonl cannot be read" in report.problems[0]


@pytest.mark.parametrize("name", ["summary.json", "env.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_file_that_says_nothing(forger: Forger, name: str, text: str) -> None:
    forger.train()
    forger.write()
    (forger.folder / name).write_text(text)
    report = verify(forger.folder)
    assert f"{name} cannot be read" in report.problems[0]


# ---- what was released


def test_an_update_that_was_not_entered(forger: Forger) -> None:
    forger.train()
    forger.lines[1]["clients"] += 1
    only(forger.write(), "round 1 used 3 updates, the ledger has 2 releases")


def test_a_release_that_the_run_hides(forger: Forger) -> None:
    forger.train(entry(3, 0, release=Release(1.5, 0.25, 40)))
    report = forger.write()
    only(report, "round 3 of metrics.jsonl says", "summary.json says")
    assert f"the ledger comes to {figure(48):.6g}" in report.problems[0]


def test_a_release_without_noise(forger: Forger) -> None:
    forger.train(entry(3, 0, release=Release(0.0, 0.25, 1), stream="", target=math.inf))
    report = forger.write()
    assert "the ledger comes to inf" in report.problems[0]


def test_a_release_after_the_end(forger: Forger) -> None:
    forger.train(entry(4, 1))
    only(forger.write(), "1 releases were entered after the end")


def test_a_release_of_an_old_round_after_the_end(forger: Forger) -> None:
    forger.train()
    with Ledger(forger.ledger) as ledger:
        ledger.append([entry(2, 3)])  # of a client that has spent less than others
    only(forger.write(), "1 releases were entered after the end")


def test_noise_that_was_used_twice(forger: Forger) -> None:
    data, previous = b"", GENESIS
    for index in range(2):
        line, previous = line_of(entry(1, index, stream="s"), index, 0.0, previous)
        data += line
    forger.ledger.mkdir()
    forger.file().write_bytes(data)
    report = forger.write()
    assert any("uses noise for a second time" in problem for problem in report.problems)


def test_an_initialisation_that_was_not_entered(forger: Forger) -> None:
    forger.train()
    forger.summary["privacy"] = {"initialisation": "included", "accountant": "PLD"}
    report = forger.write()
    only(report, "never entered")
    assert ("accountant, as said", "PLD") in report.rows()


def test_rounds_that_do_not_rise(forger: Forger) -> None:
    forger.train()
    forger.lines.append(forger.lines[1])
    report = forger.write()
    assert "its rounds do not rise" in report.problems[0]


@pytest.mark.parametrize("target", [None, 0.999, 1.0])
def test_a_client_above_its_budget(forger: Forger, target: float | None) -> None:
    budget = None if target is None else target * figure(12)
    forger.train(entry(3, 0, target=budget))
    forger.lines[-1]["epsilon"] = forger.summary["epsilon"] = figure(12)
    report = forger.write()
    if target == 0.999:
        only(report, "client 0 has spent epsilon")
    else:
        assert report.problems == []


def test_everybody_above_the_budget(forger: Forger) -> None:
    forger.train(*(entry(3, client, target=0.1) for client in range(10, 20)))
    report = forger.write()
    assert sum("above its target 0.1" in text for text in report.problems) == 5
    assert "... and 5 more of this kind" in report.problems


# ---- runs that are interrupted, resumed, shared


def test_a_run_that_was_killed_in_a_round(forger: Forger) -> None:
    forger.train(entry(4, 2), entry(4, 0))
    forger.summary = {}
    report = forger.write()
    assert report.problems == []
    rows = dict(report.rows())
    assert rows["not finished"] == "2 releases after round 3"
    assert rows["epsilon"] == f"{FIGURES[3]:.6g}, spent by client 0"


def test_the_summary_of_an_interruption_is_not_that_of_what_came_after(forger: Forger) -> None:
    forger.train()
    forger.summary |= {"status": "interrupted", "rounds": 2, "epsilon": FIGURES[2]}
    forger.summary["ledger"] = forger.heads[2].as_dict()
    assert forger.write().problems == []


def test_a_round_done_again_counts_both_releases(forger: Forger) -> None:
    again = entry(1, 1, stream="new noise", reply="another reply")
    forger.train(again)  # entered last: client 1 has then spent three rounds' worth
    for line in forger.lines[1:]:
        line["epsilon"] = figure(12)
    forger.summary["epsilon"] = figure(12)
    assert forger.write().problems == []
    for line in forger.lines[1:]:
        line["epsilon"] = figure(8)  # as if the second reply had been for nothing
    assert len(forger.write().problems) == 3


def test_an_initialisation_counts(forger: Forger) -> None:
    release = Release(4.0, 1.0, 1)
    with Ledger(forger.ledger) as ledger:
        ledger.append([entry(0, c, mechanism="initialisation", release=release) for c in (0, 1)])
    forger.train()
    report = forger.write()
    assert len(report.problems) == 4, "epsilon leaves it out"
    for line in forger.lines[1:]:
        line["epsilon"] = figure({1: 4, 2: 8, 3: 8}[line["round"]], release)
    forger.summary["epsilon"] = forger.lines[-1]["epsilon"]
    assert forger.write().problems == []


def test_what_was_spent_in_another_run_counts(forger: Forger, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    forger.ledger = shared
    forger.config["privacy"]["ledger"] = str(shared)
    with Ledger(shared) as ledger:
        ledger.append([entry(r, c, run="before") for r in range(5) for c in (1, 7)])
    forger.train()
    with Ledger(shared) as ledger:
        ledger.append([entry(r, c, run="after", delta=1e-3) for r in range(5) for c in (0, 1)])
    report = forger.write()
    assert len(report.problems) == 4, "epsilon is that of this run alone"
    for line, steps in zip(forger.lines[1:], (24, 24, 28), strict=True):
        line["epsilon"] = figure(steps)
    forger.summary["epsilon"] = figure(28)
    report = forger.write()
    assert report.problems == []
    assert dict(report.rows())["entries"] == "25, 5 of this run"


def test_which_run_it_is_must_be_known(forger: Forger) -> None:
    forger.train()
    forger.env = {}
    assert forger.write().problems == [], "the only one there"
    with Ledger(forger.ledger) as ledger:
        ledger.append([entry(1, 1, run="another")])
    only(forger.write(), "holds several runs")


def test_the_server_enters_once_a_round_at_client_level(forger: Forger) -> None:
    with Ledger(forger.ledger) as ledger:
        for round in (1, 2):
            ledger.append([entry(round, "server", mechanism="client")])
            forger.lines.append(metrics_line(round, 30, figure(4 * round)))
        forger.summary = {
            "status": "completed",
            "rounds": 2,
            "epsilon": figure(8),
            "delta": DELTA,
            "ledger": ledger.head.as_dict(),
        }
    assert forger.write().problems == []
    forger.lines.append(metrics_line(3, 30, figure(8)))
    forger.summary["rounds"] = 3
    only(forger.write(), "round 3 used 30 updates, the ledger has 0")
    forger.lines[-1]["clients"] = 0
    assert forger.write().problems == []
