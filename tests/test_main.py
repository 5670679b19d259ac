"""The command line, called as a function: exit codes, and what goes to stdout and stderr."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedsys.config import configure
from fedsys.console import Observer, size
from fedsys.errors import ClientFailure, DataError, RunError
from fedsys.main import VERBS, main

RECORDS = [
    {"round": 0, "eval_accuracy": 0.1, "eval_loss": 2.3, "seconds": 0.0},
    {
        "round": 1,
        "train_loss": 1.5,
        "eval_accuracy": 0.75,
        "eval_loss": 0.5,
        "bytes_up": 1000,
        "bytes_down": 2_000_000,
        "seconds": 0.25,
        "epsilon": 1.25,
    },
]
SUMMARY = {
    "rounds": 1,
    "bytes_up": 1000,
    "bytes_down": 2_000_000,
    "bytes_init": 10,
    "seconds": 0.25,
    "seconds_per_round": 0.25,
    "peak_memory_mb": 321.0,
    "trainable_parameters": 12345,
}


class Result:
    folder = Path("runs/somewhere-with-a-long-name-that-must-not-be-cut-" + "x" * 80)
    summary = SUMMARY
    metrics = RECORDS


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand in for fedsys.experiment, so that no test here trains."""
    module: Any = ModuleType("fedsys.experiment")
    module.calls = []

    def run(overrides: list[str], observer: Observer) -> Result:
        module.calls.append(("run", overrides))
        observer.started(configure(overrides))
        observer.phase("loading data")
        observer.round(RECORDS[0], 1)
        for client in range(9):
            observer.failure(client, "sent [bold]NaN[/bold]")
        observer.round(RECORDS[1], 1)
        observer.finished(Result())
        return Result()

    def resume(folder: Path, observer: Observer) -> Result:
        module.calls.append(("resume", folder))
        return Result()

    def export(folder: Path, directory: Path, merged: bool) -> Path:
        module.calls.append(("export", folder, directory, merged))
        return directory

    module.run, module.resume, module.export = run, resume, export
    monkeypatch.setitem(sys.modules, "fedsys.experiment", module)
    return module


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("")
    return tmp_path


def test_a_run_shows_progress_on_stderr_and_results_on_stdout(
    stub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "rounds=3", "seed=1"]) == 0
    assert stub.calls == [("run", ["rounds=3", "seed=1"])]
    out, err = capsys.readouterr()
    assert "loading data" in err
    assert "round 1/1  loss 1.5  accuracy 0.75  up 1 kB  down 2 MB  epsilon 1.25" in err
    assert "client 0 left out: sent [bold]NaN[/bold]" in err
    assert "client 5 left out" not in err
    assert "more clients left out" in err
    assert "0.1 (round 0) -> 0.75 (round 1), best 0.75" in out
    assert "2.3 (round 0) -> 0.5 (round 1), best 0.5" in out
    assert str(Result.folder) in out
    assert "12,345" in out
    assert "loading" not in out


def test_options_may_stand_between_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "rounds=3", "--cfg", "job", "strategy=fedadam"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.rounds, printed.strategy.beta2) == (3, 0.99)


@pytest.mark.parametrize("verb", ["run", "doctor"])
def test_help_lists_groups_options_and_keys(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("fed_sb*", "lora_sb*", "participation", "num_clients: 100", "on_client_error"):
        assert word in text
    assert "strategy=fed_sb implies adapter=lora_sb" in text


def test_help_names_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fedsys ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "rnu: no such command; did you mean run?"),
        (["rounds=3"], "write fedsys run rounds=3"),
        (["run", "--cgf", "job"], "unrecognized arguments: --cgf"),
        (["run", "--cfg", "jbo"], "invalid choice: 'jbo'"),
        (["run", "rouns=3"], "rouns=3: no such key; did you mean rounds?"),
        (["run", "--cfg", "job", "rouns=3"], "did you mean rounds?"),
        (["run", "rounds=0", "client.lr=0"], "client.lr must be positive"),
        (["resume", "no/such/run"], "no/such/run: is no run folder"),
        (["export", "no/such/run", "x"], "no/such/run: is no run folder"),
        (["resume"], "required: RUN"),
    ],
)
def test_bad_input_is_told_on_stderr_with_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_without_a_command_help_is_shown_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("a.csv, line 7: no label"), 2, "a.csv, line 7: no label"),
        (RunError("too few clients"), 1, "the run failed: too few clients"),
        (ClientFailure(3, "sent NaN"), 1, "the run failed: client 3: sent NaN"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(
    stub: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(overrides: list[str], observer: Observer) -> None:
        experiment = configure(overrides)
        observer.started(experiment)
        experiment.out.mkdir(parents=True)
        (experiment.out / "config.yaml").touch()
        raise error

    monkeypatch.setattr(stub, "run", fail)
    monkeypatch.chdir(tmp_path)
    assert main(["run"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert ("fedsys resume runs/" in err) == (code == 130)


def test_resume_and_export(stub: Any, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(run_folder)]) == 0
    assert main(["export", str(run_folder), "there", "--merged"]) == 0
    assert stub.calls == [("resume", run_folder), ("export", run_folder, Path("there"), True)]
    assert capsys.readouterr().out == "there\n"


def test_doctor_passes_on_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "engine.chunk=30", "participation.cohort=70"]) == 0
    out = capsys.readouterr().out
    assert "can be run" in out
    assert "70 of 100 clients a round" in out
    assert "so 3 passes a round" in out
    assert list(tmp_path.iterdir()) == []


def test_doctor_fails_with_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "rouns=3", "client.lr=0"]) == 1
    out = capsys.readouterr().out
    assert out.count("fail") == 2
    assert "did you mean rounds?" in out


def test_doctor_misses_an_accelerator_and_a_place_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "device=cuda:99", f"out={tmp_path}/file/run"]) == 1
    out = capsys.readouterr().out
    assert "device=cuda:99 is not here" in out
    assert "cannot be written to" in out


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB")]
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text
