"""``python -m benchmarks``: one table, and a file with every figure in it."""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import BFLOAT16_GAIN, Group, groups
from benchmarks.results import Result, difference, summarise, table
from benchmarks.worker import Worker, measure_machine

RESULTS = Path(__file__).parent / "results"
WIDTH = 110


class Different(Exception):
    """Two engines that were to do the same work did not."""


def main() -> int:
    """Run what is asked for; return 1 when engines that are compared do different work."""
    options = _parse()
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.status("measuring the machine") as status:
        machine = measure_machine(options.threads)
        bfloat16 = machine.gflops["bfloat16"] > BFLOAT16_GAIN * machine.gflops["float32"]
        rows: list[dict[str, Any]] = []
        for group in groups(bfloat16):
            if group.name in options.only:
                status.update(f"measuring {group.name}")
                try:
                    results = _measure(group, options.rounds or group.rounds, options.threads)
                except Different as reason:
                    console.print(f"{group.name}: {reason}")
                    return 1
                rows += summarise(group, results)
    console.print(table(rows, machine))
    out = options.out or RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": asdict(machine), "rows": rows}, indent=1) + "\n")
    console.print(f"written to {out}")
    return 0


def _parse() -> argparse.Namespace:
    names = [group.name for group in groups(bfloat16=False)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default=",".join(names), help="of %(default)s")
    parser.add_argument("--rounds", type=int, help="in each turn, instead of the group's own")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file (default benchmarks/results/...)")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(names):
        parser.error(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    if options.threads < 1 or (options.rounds is not None and options.rounds < 1):
        parser.error("--rounds and --threads must be at least 1")
    return options


def _measure(group: Group, rounds: int, threads: int) -> list[Result]:
    """Let the cases take turns; raises ``Different`` when their updates of round 1 disagree."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(case, threads)) for case in group.cases]
        pairs = zip(group.cases, workers, strict=True)
        results = [Result(case, first=worker.turn(1)) for case, worker in pairs]
        for result in results:
            _check(results[0], result)
        for _ in range(group.turns):
            for result, worker in zip(results, workers, strict=True):
                result.turns.append(worker.turn(rounds))
    return results


def _check(base: Result, result: Result) -> None:
    allowed = result.case.tolerance
    if allowed is not None and not (off := difference(base, result)) <= allowed:
        raise Different(
            f"after a round the update of {result.case.label} is {off:.1e} of its norm away from "
            f"that of {base.case.label}, and {allowed:.0e} is allowed"
        )


if __name__ == "__main__":
    sys.exit(main())
