"""A grid of runs: what is swept, what is refused, what is done once only, and what came of it."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.errors import ConfigError
from fedsys.main import main
from fedsys.sweeps import Results, by_seed, read
from fedsys.sweeps import sweep as do_sweep
from fedsys.sweeps.checks import _told, check
from fedsys.sweeps.grid import expand
from fedsys.sweeps.processes import difference, end_of_log, log_of
from fedsys.sweeps.results import spread, write_index, write_table

# In the place of Python: a run that writes what a sweep looks at, or ends as the test wants.
RUN = """#!{python}
import json, os, sys, time
from pathlib import Path
verb, *words = sys.argv[3:]
given = dict(word.split("=", 1) for word in words if "=" in word and verb == "run")
folder = Path(given["out"].strip('"') if verb == "run" else words[0])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent.parent / "calls", "a") as calls:
    calls.write(f"{{verb}} {{folder.name}} {{os.environ['OMP_NUM_THREADS']}}\\n")
config = folder / "config.yaml"
if verb == "run":
    assert not list(folder.iterdir()), "must be empty"
    config.write_text(json.dumps(given))
given = json.loads(config.read_text())
print("training", flush=True)
if verb == "run" and given["seed"] == "1":
    {end}
accuracy = 0.5 + 0.1 * int(given["seed"])
summary = {{"status": "completed", "final": {{"eval_accuracy": accuracy}}, "bytes_up": 10}}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def points(*overrides: str) -> list[dict[str, str]]:
    return [point.swept for point in expand([*overrides, "out=x"]).points]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return what lets runs end in a way of choice where their seed is 1; others complete."""

    def begin(end: str = "pass") -> Path:
        script = tmp_path / "python"
        script.write_text(RUN.format(python=sys.executable, end=end))
        script.chmod(0o755)
        monkeypatch.setattr("fedsys.sweeps.processes.sys.executable", str(script))
        # What these runs have in their folders is no configuration, and to compose one takes time.
        monkeypatch.setattr("fedsys.sweeps.checks.difference", lambda *_: None)
        monkeypatch.setattr("fedsys.sweeps.checks.configure", lambda _: Mock(resolved={"seed": 0}))
        return tmp_path / "out"

    return begin


def words(out: Path, *more: str) -> list[str]:
    return ["seed=0,1,2", "num_clients=4", "participation.cohort=4", f"out={out}", *more]


def called(out: Path) -> list[str]:
    """Return the verbs and points of the runs that were begun since the last time, sorted."""
    lines = (out / "calls").read_text().splitlines() if (out / "calls").exists() else []
    (out / "calls").unlink(missing_ok=True)
    return sorted(line.rpartition(" ")[0] for line in lines)


# ---- the grid


def test_the_points_are_the_product_and_the_last_key_varies_fastest() -> None:
    assert points("strategy=fed_sb,fedavg", "seed=0,1") == [
        {"strategy": "fed_sb", "seed": "0"},
        {"strategy": "fed_sb", "seed": "1"},
        {"strategy": "fedavg", "seed": "0"},
        {"strategy": "fedavg", "seed": "1"},
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=0,1,2", ["0", "1", "2"]),
        ("seed=range(0,3)", ["0", "1", "2"]),
        ("client.lr=range(0.5,1.1,0.25)", ["0.5", "0.75", "1.0"]),
        ("client.lr=choice(1e-3,2)", ["0.001", "2"]),
        ("privacy.epsilon=1,7.5,inf", ["1", "7.5", "inf"]),
        ("model.hidden=[6],[6,8]", ["[6]", "[6,8]"]),
        ("data.path='a,b',\"c d\"", ["a,b", "c d"]),
        ("evaluate.clients=true,false", ["true", "false"]),
        ("strategy=glob(fed_*)", ["fed_sb"]),
        ("+seed=0,1", ["0", "1"]),
    ],
)
def test_values_are_read_as_hydra_reads_them(text: str, values: list[str]) -> None:
    key = text.partition("=")[0].lstrip("+")
    assert points(text) == [{key: value} for value in values]


def test_what_is_not_swept_goes_to_every_point_as_typed() -> None:
    grid = expand(["model.hidden=[6,8]", "seed=0,1", "data.path='a,b'", "no sense=,", "out=x"])
    assert [point.overrides for point in grid.points] == [
        ["model.hidden=[6,8]", f"seed={seed}", "data.path='a,b'", "no sense=,"] for seed in (0, 1)
    ]


def test_of_a_key_that_is_given_twice_the_last_counts() -> None:
    assert points("seed=0,1", "seed=5,6") == [{"seed": "5"}, {"seed": "6"}]
    assert points("seed=0,1", "seed=5") == [{}]


def test_nothing_swept_is_a_sweep_of_one_point() -> None:
    grid = expand(["rounds=2", "out=x"])
    assert [point.folder for point in grid.points] == [Path("x/points/run")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client.lr=interval(0,1)", "an interval has no list of values"),
        ("seed=1,2,1", "1 is there 2 times"),
        ("seed=range(3,3)", "stands for no value at all"),
        ("strategy=glob(xyz*)", "stands for no value at all"),
        ("client.lr=glob(*)", "chooses among the options of a group"),
        ("out=a,b", "the points share one folder"),
    ],
)
def test_values_that_nobody_can_list_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        expand([text, "rounds=2"])
    assert len(caught.value.problems) == 1


def test_names_are_readable() -> None:
    grid = expand(["privacy.epsilon=7.5,inf", "strategy=fed_sb", "seed=0,1", "out=x"])
    assert grid.points[0].folder == Path("x/points/privacy.epsilon=7.5,seed=0")
    assert grid.keys == ["privacy.epsilon", "seed"]


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="'\\"), min_size=1, max_size=200)


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=4, unique=True))
def test_names_differ_and_stay_within_the_folder(texts: list[str]) -> None:
    values = ",".join(f"'{text}'" for text in texts)
    folders = [point.folder for point in expand([f"data.path={values}", "out=x"]).points]
    assert len(set(folders)) == len(texts)
    for folder in folders:
        assert folder.parent == Path("x/points")
        assert len(folder.name.encode()) < 250
        assert folder.name not in (".", "..")


# ---- what can be run


def test_all_problems_are_told_with_the_points_that_have_them(tmp_path: Path) -> None:
    grid = expand(["strategy=frl,fedavg", "adapter=full", "rouns=2", f"out={tmp_path / 'x'}"])
    with pytest.raises(ConfigError) as caught:
        check(grid, skip_refused=True)  # nothing is left
    typo, conflict = sorted(caught.value.problems)
    assert typo == "rouns=2: no such key; did you mean rounds?"  # all points: none is named
    assert "strategy=frl with adapter=full" in conflict
    assert conflict.endswith("(where strategy=frl)")


def test_a_refused_point_is_left_out_only_when_asked(tmp_path: Path) -> None:
    grid = expand(["strategy=frl,fedavg", "adapter=full", "seed=0,1", f"out={tmp_path / 'x'}"])
    checked = check(grid, skip_refused=True)
    assert [point.name for point in checked.accepted] == [
        "strategy=fedavg,seed=0",
        "strategy=fedavg,seed=1",
    ]
    assert list(checked.refused) == ["strategy=frl,seed=0", "strategy=frl,seed=1"]


def test_a_bad_seed_is_found_although_its_twins_are_good(tmp_path: Path) -> None:
    grid = expand(["strategy=fedavg,fed_sb", "seed=0,-1", f"out={tmp_path / 'x'}"])
    with pytest.raises(ConfigError) as caught:
        check(grid)
    assert caught.value.problems == ["seed=-1: must be at least 0 and below 2**63 (where seed=-1)"]


def test_problems_of_no_grid_name_their_points(tmp_path: Path) -> None:
    grid = expand(["num_clients=4,9", "participation.cohort=5,10", f"out={tmp_path / 'x'}"])
    problem = "too few"
    refused = {point.name: [problem] for point in grid.points if point != grid.points[2]}
    (told,) = _told(refused, grid)
    assert told.startswith("too few (at num_clients=4,participation.cohort=5; num_clients=4,")
    assert _told({grid.points[0].name: [problem]}, grid) == [
        "too few (where num_clients=4 participation.cohort=5)"
    ]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="must be a new or empty folder, or that of a sweep"):
        check(expand(["seed=0,1", f"out={tmp_path}"]))


def test_a_run_of_other_settings_is_never_gone_on_with(tmp_path: Path) -> None:
    grid = expand(["seed=0,1", "num_clients=9", "participation.cohort=3", f"out={tmp_path}"])
    write_index(grid, {})
    for point, clients in zip(grid.points, (9, 8), strict=True):
        point.folder.mkdir(parents=True)
        resolved = {**resolved_of(point.overrides), "num_clients": clients, "out": "elsewhere"}
        (point.folder / "config.yaml").write_text(json.dumps(resolved))
    with pytest.raises(ConfigError) as caught:
        check(grid, skip_refused=True)
    (problem,) = caught.value.problems
    assert "seed=1: holds a run with num_clients=8, and here it is 9; choose" in problem


def resolved_of(overrides: list[str]) -> dict[str, Any]:
    from fedsys.config import configure

    return configure(overrides).resolved


def test_a_folder_without_a_run_differs_in_nothing(tmp_path: Path) -> None:
    assert difference(tmp_path, {"a": 1}) is None
    (tmp_path / "config.yaml").write_text("a: {b: 1}\nout: x\n")
    assert difference(tmp_path, {"a": {"b": 1}, "out": "y"}) is None
    assert "a.b=1, and here it is 2" in str(difference(tmp_path, {"a": {"b": 2}}))
    assert "c=null, and here it is 3" in str(difference(tmp_path, {"a": {"b": 1}, "c": 3}))


# ---- the runs


def test_a_sweep_is_done_once(pretend: Callable[..., Path]) -> None:
    out = pretend()
    results = do_sweep(words(out), processes=2)
    assert not results.unfinished
    assert called(out) == ["run seed=0", "run seed=1", "run seed=2"]
    assert do_sweep(words(out)).rows == results.rows
    assert called(out) == []
    wider = do_sweep([*words(out), "seed=0,1,2,3"])  # a value more is a run more
    assert len(wider.rows) == 4
    assert called(out) == ["run seed=3"]


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "unfinished", "the process was ended by SIGKILL"),
        ('sys.exit("fedsys: the run failed: no space\\nat all")', "unfinished", "at all"),
        (
            '(folder / "summary.json").write_text(json.dumps('
            '{"status": "failed", "reason": "why not"})); sys.exit(1)',
            "failed",
            "why not",
        ),
    ],
)
def test_a_run_that_breaks_down_stops_no_other_and_is_gone_on_with(
    pretend: Callable[..., Path], end: str, status: str, reason: str
) -> None:
    out, said = pretend(end), list[str]()
    results = do_sweep(words(out), processes=1, tell=said.append)
    assert [row.status for row in results.rows] == ["completed", status, "completed"]
    assert reason in results.rows[1].reason
    assert any(line.startswith("2 of 3: seed=1: ") for line in said)
    assert called(out) == ["run seed=0", "run seed=1", "run seed=2"]
    assert not do_sweep([f"out={out}"]).unfinished  # its folder is enough to start it again
    assert called(out) == ["resume seed=1"]


def test_what_was_killed_before_it_began_begins_again(pretend: Callable[..., Path]) -> None:
    out = pretend()
    begun = out / "points" / "seed=1"
    begun.mkdir(parents=True)
    for name in (".lock", "env.json", "partition.png", "config.yaml.partial"):
        (begun / name).touch()
    write_index(expand(words(out)), {})
    assert not do_sweep(words(out)).unfinished


def test_a_foreign_file_is_not_removed(pretend: Callable[..., Path]) -> None:
    out = pretend()
    foreign = out / "points" / "seed=1" / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    write_index(expand(words(out)), {})
    assert [row.point.name for row in do_sweep(words(out)).unfinished] == ["seed=1"]
    assert foreign.exists()


def test_the_processors_are_shared(
    pretend: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsys.sweeps.processes.cores", lambda: 8)
    out = pretend()
    do_sweep(words(out), processes=2)
    assert {line.split()[-1] for line in (out / "calls").read_text().splitlines()} == {"4"}


def test_an_interrupted_sweep_says_how_to_go_on(
    pretend: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = pretend("time.sleep(60)"), list[str]()

    def tell(line: str) -> None:
        said.append(line)
        if line.startswith("1 of 3"):
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        do_sweep(words(out), processes=2, tell=tell)
    assert time.monotonic() - began < 30  # the run that sleeps was stopped
    assert said[-1] == f"interrupted; to go on: fedsys sweep out={out}"
    assert (out / "results.csv").exists()


# ---- the results


def results_of(out: Path, values: dict[str, Any], *overrides: str) -> Results:
    """Return a sweep whose completed runs have the summaries in ``values``, by name."""
    grid = expand([*overrides, f"out={out}"])
    write_index(grid, {})
    for point in grid.points:
        if point.name in values:
            point.folder.mkdir(parents=True)
            summary = {"status": "completed", **values[point.name]}
            (point.folder / "summary.json").write_text(json.dumps(summary))
    return read(out)


def test_a_row_of_the_table_has_what_the_summary_has(tmp_path: Path) -> None:
    summary = {
        "final": {"eval_accuracy": 0.75, "eval_loss": 0.5},
        "best": {"eval_accuracy": 0.875, "eval_loss": None, "round": 3},
        "epsilon": math.inf,
        "delta": 1e-5,
        "bytes_up": 7,
    }
    results = results_of(tmp_path, {"privacy.epsilon=inf": summary}, "privacy.epsilon=1,inf")
    write_table(results)
    with (tmp_path / "results.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["status"] == "not begun"
    assert first["final_accuracy"] == ""
    expected = {
        "privacy.epsilon": "inf",
        "status": "completed",
        "final_accuracy": "0.75",
        "final_loss": "0.5",
        "best_accuracy": "0.875",
        "best_loss": "",
        "best_round": "3",
        "epsilon": "inf",
        "delta": "1e-05",
        "bytes_up": "7",
        "bytes_down": "",
        "folder": "points/privacy.epsilon=inf",
        "reason": "",
    }
    assert {name: second[name] for name in expected} == expected


def test_mean_and_spread_are_over_the_completed_seeds(tmp_path: Path) -> None:
    values = {
        f"strategy=fedavg,seed={seed}": {"final": {"eval_accuracy": value}}
        for seed, value in enumerate((0.1, 0.3))
    }
    results = results_of(tmp_path, values, "strategy=fedavg,fed_sb", "seed=0,1,2")
    head, fedavg, fed_sb = by_seed(results)
    assert head[:4] == ["strategy", "runs", "accuracy", "+-"]
    # Of 0.1 and 0.3 the sample has the variance (0.01 + 0.01) / (2 - 1).
    assert fedavg[:4] == ["fedavg", "2 of 3", "0.2", "0.14"]
    assert fed_sb[:4] == ["fed_sb", "0 of 3", "", ""]


@pytest.mark.parametrize(
    ("values", "mean", "deviation"),
    [
        ([2.0], 2.0, None),
        ([1.0, 3.0], 2.0, math.sqrt(2)),
        ([5.0, 5.0, 5.0], 5.0, 0.0),
        ([math.inf, math.inf], math.inf, None),
    ],
)
def test_the_spread_is_that_of_a_sample(
    values: list[float], mean: float, deviation: float | None
) -> None:
    found = spread(values)
    assert found is not None
    assert (found.count, found.mean) == (len(values), mean)
    assert found.deviation == (None if deviation is None else pytest.approx(deviation))
    assert spread([]) is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.floats(-10, 10))
def test_a_shift_moves_the_mean_and_not_the_spread(values: list[float], by: float) -> None:
    left, right = spread(values), spread([value + by for value in values])
    assert left is not None
    assert right is not None
    assert right.mean == pytest.approx(left.mean + by, abs=1e-6)
    assert right.deviation == pytest.approx(left.deviation, abs=1e-6)


def test_without_accuracy_losses_are_compared(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"seed=0": {"final": {"eval_loss": 0.5}}}, "seed=0,1")
    assert results.measure == "loss"
    assert by_seed(results)[0][:2] == ["runs", "loss"]


@pytest.mark.parametrize("text", ["", "{", '{"status": "comp'])
def test_a_torn_summary_is_as_none(tmp_path: Path, text: str) -> None:
    results_of(tmp_path, {"seed=0": {}}, "seed=0,1")
    (tmp_path / "points" / "seed=0" / "summary.json").write_text(text)
    assert read(tmp_path).rows[0].status == "not begun"


def test_a_folder_of_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder of a sweep"):
        read(tmp_path)


def test_the_end_of_a_log_is_read(tmp_path: Path) -> None:
    assert end_of_log(tmp_path / "run", 2) == []
    log_of(tmp_path / "run").write_text("one\ntwo\nthree\n")
    assert end_of_log(tmp_path / "run", 2) == ["two", "three"]


# ---- the command


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["rouns=3"], "rouns=3: no such key; did you mean rounds?"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["client.lr=interval(0,1)"], "an interval has no list of values"),
    ],
)
def test_bad_input_is_told_before_anything_is_run(
    typed: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *typed]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_is_0_only_when_every_run_is_complete(
    pretend: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = pretend('sys.exit("fedsys: the run failed: no space")')
    assert main(["sweep", *words(out), "--jobs", "2"]) == 1
    shown = capsys.readouterr()
    assert "seed=1  unfinished:  fedsys: the run failed: no space" in shown.out
    assert f"results: {out / 'results.csv'}" in shown.err
    assert main(["sweep", f"out={out}"]) == 0
    assert "unfinished" not in capsys.readouterr().out


def test_without_matplotlib_there_are_results_and_a_hint(
    pretend: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = pretend()
    assert main(["sweep", *words(out)]) == 0
    assert "pip install 'fedsys[report]'" in capsys.readouterr().err
    assert (out / "results.csv").exists()


@pytest.mark.slow
def test_real_runs_of_which_one_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    typed = [
        "sweep",
        "strategy=fedavg,fed_sb",
        "rounds=10",
        "num_clients=4",
        "participation.cohort=4",
        "evaluate.every=5",
        f"out={out}",
    ]
    sweep = subprocess.Popen([sys.executable, "-m", "fedsys", *typed, "--jobs", "1"])
    victim = out / "points" / "strategy=fedavg"
    kill_run(sweep.pid, victim)
    assert sweep.wait(300) == 1
    assert [row.status for row in read(out).rows] == ["unfinished", "completed"]
    kept = (out / "points" / "strategy=fed_sb" / "summary.json").stat().st_mtime_ns
    assert main(typed) == 0
    assert "resume" not in json.loads((victim / "env.json").read_text())["command"]
    assert [row.status for row in read(out).rows] == ["completed", "completed"]
    assert (out / "points" / "strategy=fed_sb" / "summary.json").stat().st_mtime_ns == kept
    lines = [json.loads(text) for text in (victim / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(11))


def kill_run(sweep: int, folder: Path) -> None:
    """Kill the only child of a process once its run has a checkpoint."""
    for _ in range(1200):
        if list(folder.glob("checkpoints/round_*")):
            children = Path(f"/proc/{sweep}/task/{sweep}/children").read_text().split()
            tasks = Path(f"/proc/{sweep}/task").iterdir()
            found = children or [c for t in tasks for c in (t / "children").read_text().split()]
            os.kill(int(found[0]), signal.SIGKILL)
            return
        time.sleep(0.05)
    raise TimeoutError(f"{folder} has no checkpoint")
