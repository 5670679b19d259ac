"""``python -m benchmarks``: one table, and a file with every figure in it."""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.cases import BFLOAT16_GAIN, Group, groups
from benchmarks.export import export
from benchmarks.flops import flop_of_round
from benchmarks.machine import Machine, measure_machine
from benchmarks.results import (
    Result,
    Row,
    adapter_figures,
    case_rows,
    difference,
    ratio_rows,
    scaling_figures,
)
from benchmarks.table import table
from benchmarks.worker import Died, Worker, python_of
from fedsys.config import configure

RESULTS = Path(__file__).parent / "results"
WIDTH = 120


class Different(Exception):
    """Two engines that were to do the same work did not."""


def main() -> int:
    """Run what is asked for; return 1 when engines do different work, or die."""
    options = _parse()
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    began = time.perf_counter()
    with console.status("measuring the machine") as status:
        machine = measure_machine(options.threads)
        bfloat16 = machine.gflops["bfloat16"] > BFLOAT16_GAIN * machine.gflops["float32"]
        rows: list[Row] = []
        for whole in groups(bfloat16):
            if whole.name not in options.only:
                continue
            group, missing = possible(whole)
            if missing:
                console.print(f"{group.name} without {', '.join(missing)}: make bench-env first")
            status.update(f"measuring {group.name}")
            turns, rounds = options.turns or group.turns, options.rounds or group.rounds
            group = replace(group, turns=turns, rounds=rounds)
            try:
                rows += measure(group, machine)
            except (Different, Died) as reason:
                console.print(f"{group.name}: {reason}", markup=False)
                return 1
    console.print(table(rows, machine))
    out = options.out or RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter() - began
    result = {"machine": asdict(machine), "seconds": seconds, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {out} after {seconds / 60:.0f} minutes")
    return 0


def _parse() -> argparse.Namespace:
    names = [group.name for group in groups(bfloat16=True)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default=",".join(names), help="of %(default)s")
    parser.add_argument("--turns", type=int, help="of each case, instead of the group's own")
    parser.add_argument("--rounds", type=int, help="in each turn, instead of the group's own")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file (default benchmarks/results/...)")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(names):
        parser.error(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    counts = (options.turns, options.rounds, options.threads)
    if any(count is not None and count < 1 for count in counts):
        parser.error("--turns, --rounds and --threads must be at least 1")
    return options


def possible(group: Group) -> tuple[Group, list[str]]:
    """Return ``group`` with the cases whose environment is there, and the names of the others."""
    ready = tuple(case for case in group.cases if python_of(case.engine).exists())
    return replace(group, cases=ready), [c.name for c in group.cases if c not in ready]


def measure(group: Group, machine: Machine) -> list[Row]:
    """Let the cases of ``group`` take turns and return their rows.

    Raises ``Different`` when their updates of round 1 disagree and ``Died`` when one ends early.
    """
    with TemporaryDirectory() as folder:
        files = export_all(group, Path(folder))
        results = run(group, files, machine.threads, Path(folder))
    rows = case_rows(group, results) + ratio_rows(group, results)
    if group.name == "w2":
        work = export(configure(group.cases[0].overrides), 1)
        rows += adapter_figures(results, flop_of_round(work), machine)
    if group.name == "scaling":
        clients = {c.name: configure(c.overrides).num_clients for c in group.cases}
        rows += scaling_figures(results, clients)
    return rows


def export_all(group: Group, folder: Path) -> dict[tuple[str, ...], Path]:
    """Write the work of each experiment that another engine than fedsys runs; return the files."""
    files: dict[tuple[str, ...], Path] = {}
    for case in group.cases:
        if case.engine != "ours" and case.overrides not in files:
            files[case.overrides] = folder / f"{len(files)}.pt"
            work = export(configure(case.overrides), 1 + group.turns * group.rounds)
            work.save(files[case.overrides])
    return files


def run(
    group: Group, files: dict[tuple[str, ...], Path], threads: int, folder: Path
) -> list[Result]:
    """Start one case after the other, compare their first updates, then let them take turns."""
    results: list[Result] = []
    with ExitStack() as stack:
        workers: list[Worker] = []
        for case in group.cases:
            arguments = case.overrides if case.engine == "ours" else (str(files[case.overrides]),)
            used = case.threads or threads
            worker = stack.enter_context(Worker(case, list(arguments), used, folder))
            workers.append(worker)
            results.append(Result(case, *worker.first()))
            check(results[0], results[-1])
        for _ in range(group.turns):
            for result, worker in zip(results, workers, strict=True):
                result.turns.append(worker.turn(group.rounds))
    return results


def check(base: Result, result: Result) -> None:
    """Raise ``Different`` if the first update of ``result`` is not that of ``base``."""
    allowed = result.case.tolerance
    if allowed is not None and not (off := difference(base.update, result.update)) <= allowed:
        raise Different(
            f"after a round the update of {result.case.name} is {off:.1e} of its norm away from "
            f"that of {base.case.name}, and {allowed:.0e} is allowed"
        )


if __name__ == "__main__":
    sys.exit(main())
