"""The command line.

Exit codes: 0 the work was done, 1 a run failed, 2 the configuration or the data cannot be used,
130 interrupted.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from omegaconf import OmegaConf

from fedsys.compose import FOLDER, chosen_by_default, compose, groups, implied
from fedsys.deployment import verbs
from fedsys.errors import Busy, ClientFailure, ConfigError, DataError, RunError
from fedsys.known import suggestion

_EXAMPLES = """examples:
  fedsys run
  fedsys run strategy=fedavg num_clients=1000 participation.cohort=50
  fedsys run data=text data.path=train.csv data.text=sentence data.label=label model=hf_classifier
  fedsys run strategy._target_=my_module.MyStrategy allow=[my_module] strategy.my_key=1
"""


@dataclass(frozen=True)
class Verb:
    """A sub-command: its arguments and what it does."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    work: Callable[[argparse.Namespace], int]
    epilog: Callable[[], str] = str


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except SystemExit as reason:  # argparse, after --help and bad usage
        return reason.code if isinstance(reason.code, int) else 2
    except (ConfigError, DataError) as reason:
        return _fail(str(reason), 2)
    except Busy as reason:
        return _fail(str(reason), 1)
    except (RunError, ClientFailure) as reason:
        return _fail(f"the run failed: {reason}", 1)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as reason:
        return _fail(f"the run failed: {reason}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _dispatch(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        parser = _main_parser()
        parser.parse_args(words)
        parser.print_help()
        return 0 if words else 2
    name, *rest = words
    if name not in VERBS:
        hint = f"; write fedsys run {name}" if "=" in name else suggestion(name, list(VERBS))
        return _fail(f"{name}: no such command{hint}", 2)
    verb = VERBS[name]
    parser = argparse.ArgumentParser(
        prog=f"fedsys {name}",
        description=verb.help,
        epilog=verb.epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.arguments(parser)
    return verb.work(parser.parse_intermixed_args(rest))


def _main_parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}} {verb.help}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="fedsys",
        usage="fedsys COMMAND ...",
        description="Federated fine-tuning of one model across many clients.",
        epilog=f"commands:\n{verbs}\n\nfedsys COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedsys {_version()}")
    return parser


def _version() -> str:
    try:
        return version("fedsys")
    except PackageNotFoundError:
        return "(not installed)"


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"fedsys: {message}\n")
    return code


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _overrides(parser)
    parser.add_argument("--cfg", choices=["job"], help="only print the composed configuration")


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write")
    parser.add_argument("--merged", action="store_true", help="the whole model, adapter merged in")


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a table, or TABLE/ROW")
    _overrides(parser)
    parser.add_argument("--list", action="store_true", help="what there is, and what it costs")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; else one a core")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where runs are kept; else runs/reproduce/NAME"
    )


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    _overrides(parser)
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; else one a core")
    parser.add_argument(
        "--skip-refused", action="store_true", help="leave out what cannot be run, do the others"
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="RUN_OR_SWEEP", type=Path, help="the folder of a run or of a sweep"
    )


def _settings() -> str:
    """Return the groups with their options, and the other keys as config.yaml explains them."""
    chosen = chosen_by_default()
    lines = [
        f"  {group:<14} " + "  ".join(f"{o}*" if o == chosen[group] else o for o in options)
        for group, options in groups().items()
    ]
    implies = ", ".join(f"{choice} implies {other}" for choice, other in implied())
    text = (FOLDER / "config.yaml").read_text(encoding="utf-8")
    keys = "\n".join(f"  {line}" for line in text.split("\n\n", 1)[1].splitlines())
    return "\n".join(
        [
            "groups, chosen by group=option (* is the default):",
            *lines,
            f"  {implies}",
            "  keys of an option are set as group.key=value; `fedsys run --cfg job` prints them",
            f"\nother keys:\n{keys}\n",
            _EXAMPLES,
        ]
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.cfg:
        sys.stdout.write(OmegaConf.to_yaml(compose(arguments.overrides)))
        return 0
    from fedsys.config import configure

    configure(arguments.overrides)  # refuses before anything heavy is imported
    from fedsys.console import Terminal
    from fedsys.experiment import run

    _quieten()
    with Terminal() as terminal:
        run(arguments.overrides, terminal)
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    _check_run(arguments.run)
    from fedsys.console import Terminal
    from fedsys.experiment import resume

    _quieten()
    with Terminal() as terminal:
        resume(arguments.run, terminal)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _check_run(arguments.run)
    from fedsys.experiment import export

    _quieten()
    written = export(arguments.run, arguments.directory, arguments.merged)
    sys.stdout.write(f"{written}\n")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fedsys.doctor import examine, report

    checks = examine(arguments.overrides)
    report(checks)
    return int(any(check.status == "fail" for check in checks))


def _reproduce(arguments: argparse.Namespace) -> int:
    from fedsys import reproduction
    from fedsys.console import show_table

    if arguments.list:
        show_table(reproduction.listing(reproduction.every()))
        return 0
    if arguments.name is None:
        raise ConfigError(["NAME: say what to reproduce; `fedsys reproduce --list` names it"])
    table = reproduction.find(arguments.name)
    jobs = reproduction.cores() if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        raise ConfigError([f"--jobs {jobs}: must be at least 1"])
    out = arguments.out or Path("runs") / "reproduce" / table.name
    result = reproduction.reproduce(table, out, arguments.overrides, jobs, _say)
    for section in reproduction.sections(result):
        show_table(section)
        sys.stdout.write("\n")
    row = arguments.name.partition("/")[2]  # a row has its result beside its runs
    for note in reproduction.keep(result, out / row):
        _say(note)
    return int(not result.passed)


def _sweep(arguments: argparse.Namespace) -> int:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ConfigError([f"--jobs {arguments.jobs}: must be at least 1"])
    from fedsys import sweeps
    from fedsys.console import show_table

    results = sweeps.sweep(arguments.overrides, arguments.jobs, arguments.skip_refused, _say)
    show_table(sweeps.by_seed(results))
    if results.unfinished:
        sys.stdout.write("\n")
        show_table(sweeps.failures(results.unfinished))
    _say(f"results: {results.table}")
    try:
        from fedsys.report import write_report

        _say(f"report: {write_report(results.folder)}")
    except ModuleNotFoundError as error:
        _say(f"no report.html: {error}; pip install 'fedsys[report]'")
    return int(bool(results.unfinished))


def _report(arguments: argparse.Namespace) -> int:
    from fedsys.report import write_report

    try:
        sys.stdout.write(f"{write_report(arguments.folder)}\n")
    except ModuleNotFoundError as error:
        return _fail(f"no report.html: {error}; pip install 'fedsys[report]'", 1)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    _check_run(arguments.run)
    from fedsys.auditing import audit_run, rows
    from fedsys.console import show_table

    _quieten()
    found = audit_run(arguments.run, _say)
    show_table([("run folder", str(arguments.run)), *rows(found)])
    return int(found.contradicts)


def _verify(arguments: argparse.Namespace) -> int:
    _check_run(arguments.run)
    from fedsys.console import show_table
    from fedsys.privacy.verify import verify

    report = verify(arguments.run)
    show_table(report.rows())
    for problem in report.problems:
        _say(f"  - {problem}")
    return int(bool(report.problems or report.unread))


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _check_run(folder: Path) -> None:
    if not (folder / "config.yaml").is_file():
        raise ConfigError([f"{folder}: is no run folder, it has no config.yaml"])


def _quieten() -> None:
    """Leave the terminal to fedsys: Flower logs every round, by a handler of its own."""
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.WARNING)
    flower.handlers.clear()


VERBS = {
    "run": Verb("Run one experiment.", _run_arguments, _run, _settings),
    "sweep": Verb(
        "Run a grid: key=v1,v2 sweeps a key, and what is complete is not done again.",
        _sweep_arguments,
        _sweep,
        _settings,
    ),
    "resume": Verb("Continue a run from its last checkpoint.", _folder, _resume),
    "report": Verb(
        "Write report.html of a run or a sweep, as far as it went.", _report_arguments, _report
    ),
    "doctor": Verb(
        "Check a configuration and this machine without training.", _overrides, _doctor, _settings
    ),
    "audit": Verb("Attack a run that has canaries: its measured epsilon.", _folder, _audit),
    "export": Verb(
        "Write the adapter in the layout of PEFT, or the whole model.", _export_arguments, _export
    ),
    "verify": Verb("Recompute epsilon from the ledger alone.", _folder, _verify),
    "enrol": Verb("Enrol a device at a server.", verbs.enrol_arguments, verbs.enrol),
    "serve": Verb(
        "Run one experiment on enrolled devices.", verbs.serve_arguments, verbs.serve, _settings
    ),
    "join": Verb("Take part as a device that is enrolled.", verbs.join_arguments, verbs.join),
    "reproduce": Verb("Set our figures beside a paper's.", _reproduce_arguments, _reproduce),
}
