import io
import json
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from benchmarks import loop, ours, tuned
from benchmarks.__main__ import Different, check, possible
from benchmarks.cases import Case, Group, Ratio, groups
from benchmarks.export import export
from benchmarks.flops import flop_of_round
from benchmarks.machine import Machine
from benchmarks.pace import Finished, Pace, cpu_of_descendants
from benchmarks.plain import copy_into, train, trained_of, wrapped
from benchmarks.results import (
    Result,
    adapter_figures,
    case_rows,
    cpu,
    difference,
    met,
    ratio_rows,
    ratios,
    scaling_figures,
    share_of_limit,
    wall,
)
from benchmarks.table import table, verdict
from benchmarks.work import Noise, Work
from benchmarks.worker import Died, Report, Worker, memory_mb, python_of
from fedsys.config import configure

TINY = ("experiment=bench_w1", "num_clients=20", "participation.cohort=5", "engine.threads=1")
MACHINE = Machine({"float32": 100.0, "bfloat16": 400.0}, 2, {"cpus": 2, "packages": {}})


class Model(nn.Module):
    """Two linear layers, either of which may be frozen."""

    def __init__(self, trains_first: bool, trains_last: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8).requires_grad_(trains_first)
        self.last = nn.Linear(8, 3).requires_grad_(trains_last)

    def forward(self, x):
        return self.last(self.first(x).relu())


def work_of(model, *, noise=None):
    """5 rounds of 3 clients with 2 steps of 5 rows, of 30 rows with 4 features."""
    plan = torch.randint(30, (5, 3, 2, 5))
    return Work(model, torch.randn(30, 4), torch.randint(3, (30,)), plan, 0.1, 6, noise)


def result_of(label, turns, *, update=None, engine="ours", precision="float32", peak=10.0):
    """A result with rounds of so many (wall, CPU) seconds."""
    case = Case(label, precision, engine, ())
    reports = [Report(laps, 1.0, peak) for laps in turns]
    return Result(case, Report([(9.0, 9.0)], 3.0, peak), update or {}, reports)


# ---- the protocol


def test_a_clock_answers_every_order_and_stops_at_the_end_of_them(tmp_path):
    file = tmp_path / "update.npz"
    orders = io.StringIO(
        json.dumps({"rounds": 2, "update": str(file)})
        + "\n"
        + json.dumps({"rounds": 1, "update": None})
        + "\n"
    )
    replies = io.StringIO()
    pace = Pace(orders, replies)
    values = [{"w": torch.tensor([float(i), 0.0])} for i in (0, 1, 4, 9)]
    for before, after in pairwise(values[:3]):
        pace.start()
        pace.stop(before, after)
    pace.start()
    with pytest.raises(Finished):
        pace.stop(values[2], values[3])
    answers = [json.loads(line)["laps"] for line in replies.getvalue().splitlines()]
    assert [len(laps) for laps in answers] == [2, 1]
    assert all(wall > 0 and cpu >= 0 for laps in answers for wall, cpu in laps)
    with np.load(file) as update:  # of the second round of the first order
        assert update["w"].tolist() == [3.0, 0.0]


def test_a_clock_without_orders_is_finished():
    with pytest.raises(Finished):
        Pace(io.StringIO(""), io.StringIO())


def test_cpu_seconds_include_those_of_a_child_that_has_ended():
    before = cpu_of_descendants()
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    psutil.Popen([sys.executable, "-c", busy]).wait()
    assert 0.25 < cpu_of_descendants() - before < 3


def test_memory_is_that_of_the_process_and_its_children():
    code = "import subprocess, sys; held = bytearray(60 << 20)\n"
    inner = "held = bytearray(90 << 20); print(1, flush=True); input()"
    child = f"subprocess.run([sys.executable, '-c', {inner!r}])"
    with psutil.Popen([sys.executable, "-c", code + child], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        assert 150 < memory_mb(process) < 250
        process.communicate(b"\n")


def test_a_worker_takes_turns_and_reports_its_first_update(tmp_path):
    model = Model(True, True)
    work_of(model).save(tmp_path / "work.pt")
    case = Case("loop", "float32", "loop", ())
    with Worker(case, [str(tmp_path / "work.pt")], 1, tmp_path) as worker:
        report, update = worker.first()
        assert len(report.laps) == 1
        assert set(update) == set(trained_of(model))
        assert all(np.abs(value).sum() > 0 for value in update.values())
        later = worker.turn(3)
    assert len(later.laps) == 3
    assert later.seconds < report.seconds  # which had to start


def test_a_worker_that_ends_early_says_why(tmp_path):
    with (
        Worker(Case("loop", "float32", "loop", ()), ["nowhere.pt"], 1, tmp_path) as worker,
        pytest.raises(Died, match=r"nowhere\.pt"),
    ):
        worker.first()


# ---- the engines


class Rounds:
    """A clock that keeps what the rounds have made."""

    def __init__(self, wanted):
        self.wanted, self.updates = wanted, []

    def start(self):
        pass

    def stop(self, before, after):
        self.updates.append({n: (after[n] - before[n]).double().numpy() for n in before})
        if len(self.updates) == self.wanted:
            raise Finished


def updates_of(run, what):
    """The updates of two rounds."""
    rounds = Rounds(2)
    with pytest.raises(Finished):
        run(what, rounds)
    return rounds.updates


def test_loop_tuned_loop_and_fedsys_do_the_same_work():
    experiment = configure([*TINY, "device=cpu"])
    expected = updates_of(loop.run, export(experiment, 2))
    for run, what in ((tuned.run, export(experiment, 2)), (ours.run, experiment)):
        for one, other in zip(expected, updates_of(run, what), strict=True):
            assert difference(one, other) < 1e-5


def test_work_is_the_same_after_a_file(tmp_path):
    work = export(configure(TINY), 2)
    work.save(tmp_path / "work.pt")
    read = Work.load(str(tmp_path / "work.pt"))
    assert torch.equal(read.plan, work.plan)
    assert read.plan.shape == (2, 5, 5, 10)
    assert updates_of(loop.run, read)[0].keys() == updates_of(loop.run, work)[0].keys()


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")  # of Opacus' first layer
def test_clipping_alone_moves_a_client_by_at_most_the_bound():
    work = work_of(Model(True, True), noise=Noise(clipping_norm=0.01, noise_multiplier=0.0))
    model = wrapped(work.model, work.noise)
    trained = trained_of(model)
    before = {name: p.detach().clone() for name, p in trained.items()}
    train(work, model, trained, work.plan[0, 0])
    moved = sum((trained[name] - value).square().sum() for name, value in before.items()).sqrt()
    assert 0 < moved <= 2 * 0.1 * 0.01 * (1 + 1e-4)  # steps, lr, bound
    copy_into(trained, before)
    assert all(torch.equal(trained[name], value) for name, value in before.items())


# ---- operations


@pytest.mark.parametrize(
    ("trains_first", "trains_last", "products"),
    [
        (True, True, 3),  # forward, gradient of the last weight, gradient of its input
        (False, True, 2),  # nothing below the last layer is trained
        (True, False, 2),  # the last weight is frozen, but the gradient passes through it
    ],
)
def test_a_frozen_layer_has_no_gradient_of_its_weight(trains_first, trains_last, products):
    work = work_of(Model(trains_first, trains_last))
    first, last = 2 * 5 * 4 * 8, 2 * 5 * 8 * 3  # of one step
    steps = 3 * 2
    expected = first * (2 if trains_first else 1) + last * products
    assert flop_of_round(work) == steps * expected


def test_the_share_of_the_limit_counts_cpu_seconds():
    # 100 GFLOP/s of two threads are 50 of a CPU second.
    assert share_of_limit(25 * 10**9, 1.0, "float32", MACHINE) == pytest.approx(0.5)
    assert share_of_limit(25 * 10**9, 0.5, "bfloat16", MACHINE) == pytest.approx(0.25)


def test_only_what_runs_on_the_threads_of_the_limit_is_compared_with_it():
    alone = result_of("fedsys", [[(1.0, 1.0)]])
    pair = replace(alone, case=replace(alone.case, label="on two cores", threads=2))
    names = [row["name"] for row in adapter_figures([alone, pair], 25 * 10**9, MACHINE)]
    assert [name.split(": ")[0] for name in names if "limit" in name] == ["fedsys, float32"]
    assert len([name for name in names if "round 1" in name]) == 2


# ---- figures


def test_a_ratio_is_that_of_neighbours():
    slow = result_of("slow", [[(2.0, 1.0), (4.0, 3.0), (3.0, 2.0)], [(8.0, 8.0)]])
    fast = result_of("fast", [[(1.0, 1.0)], [(2.0, 4.0)]])
    assert ratios(slow, fast, wall) == [3.0, 4.0]
    assert ratios(slow, fast, cpu) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("value", "least", "most", "expected"),
    [
        (4.0, 4.0, None, True),
        (3.9, 4.0, None, False),
        (1.1, None, 1.1, True),
        (1.2, None, 1.1, False),
        (float("nan"), 4.0, None, False),
        (1.0, None, None, None),
    ],
)
def test_a_bound_is_met_or_missed(value, least, most, expected):
    assert met(value, least, most) is expected


def test_the_worse_of_wall_and_cpu_time_decides():
    slow = result_of("slow", [[(5.0, 3.0)]])
    fast = result_of("fast", [[(1.0, 1.0)]])
    names = ("slow, float32", "fast, float32")
    wanted = (Ratio(*names, least=4.0), Ratio(*names, most=4.0), Ratio(*names), Ratio("x", "y"))
    group = Group("g", (slow.case, fast.case), wanted, 1, 1)
    rows = ratio_rows(group, [slow, fast])
    assert [row["value"] for row in rows[:2]] == [3.0, 5.0]
    assert [row["met"] for row in rows] == [False, False, None]
    assert [verdict(row).split("\n")[0] for row in rows] == [">= 4", "<= 4", ""]


def test_updates_are_compared_by_norm_and_by_name():
    base = {"a": np.array([3.0, 4.0])}
    assert difference(base, {"a": np.array([3.0, 4.5])}) == pytest.approx(0.1)
    assert difference(base, {"b": np.array([3.0, 4.0])}) == float("inf")
    assert difference(base, {"a": np.array([3.0])}) == float("inf")


def test_another_update_than_allowed_is_refused():
    base = result_of("base", [], update={"a": np.array([1.0])})
    other = result_of("other", [], update={"a": np.array([1.01])})
    check(base, other)  # nothing is asked of it
    strict = replace(other, case=replace(other.case, tolerance=1e-3))
    with pytest.raises(Different, match=r"other, float32 is 1\.0e-02 .* base, float32"):
        check(base, strict)
    nan = replace(strict, update={"a": np.array([np.nan])})
    with pytest.raises(Different):
        check(base, nan)


def test_an_idle_client_costs_what_is_between_the_fewest_and_the_most():
    few, many = (result_of(f"N = {n}", [], peak=peak) for n, peak in ((1000, 100.0), (3000, 102.0)))
    clients = {"N = 1000, float32": 1000, "N = 3000, float32": 3000}
    (row,) = scaling_figures([many, few], clients)
    assert row["value"] == pytest.approx(2 * 2**20 / 2000)
    assert row["met"] is False


def test_without_its_environment_a_peer_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.worker.PEERS", tmp_path)
    (w1, *_) = groups(bfloat16=False)
    group, missing = possible(w1)
    assert missing == ["pfl, float32", "Flower on Ray, float32"]
    assert [case.engine for case in group.cases] == ["loop", "tuned", "ours"]


@pytest.mark.parametrize("bfloat16", [True, False])
def test_every_ratio_is_of_cases_that_are_run(bfloat16):
    for group in groups(bfloat16):
        names = [case.name for case in group.cases]
        assert len(set(names)) == len(names)
        assert {n for ratio in group.ratios for n in (ratio.slow, ratio.fast)} <= set(names)
        assert all(configure(case.overrides) for case in group.cases)
        assert bfloat16 or all(case.precision == "float32" for case in group.cases)


def test_the_table_says_what_was_missed():
    slow = result_of("loop", [[(3.0, 3.0)]], engine="loop")
    fast = result_of("fedsys", [[(1.0, 1.0)]])
    names = ("loop, float32", "fedsys, float32")
    group = Group("w1", (slow.case, fast.case), (Ratio(*names, least=4.0),), 1, 1)
    rows = case_rows(group, [slow, fast]) + ratio_rows(group, [slow, fast])
    shown = table(rows, MACHINE)
    assert shown.row_count == 3
    assert list(shown.columns[1].cells) == [*names, "loop, float32 / fedsys, float32"]
    assert "missed" in list(shown.columns[-1].cells)[-1]


def test_peers_have_environments_of_their_own():
    pythons = {python_of(engine) for engine in ("ours", "loop", "tuned", "on_pfl", "on_flower")}
    assert len(pythons) == 3
