"""All figures of a run as one table."""

from itertools import groupby
from statistics import median

from rich import box
from rich.table import Table

from benchmarks.machine import SIZE, Machine
from benchmarks.results import Row

HEADS = ("wall\nms", "CPU\nms", "peak\nMB", "first\ns", "update\noff", "target")


def table(rows: list[Row], machine: Machine) -> Table:
    """Return a section a group: its cases, then what their rounds are of each other's."""
    versions = machine.environment["packages"]
    products = ", ".join(f"{name} {value:.0f}" for name, value in machine.gflops.items())
    shown = Table(
        title=f"A round on {machine.threads} of {machine.environment['cpus']} CPUs, or as said: "
        "median, range",
        caption=f"Products of {SIZE} x {SIZE} matrices, GFLOP/s: {products}. "
        f"torch {versions.get('torch')}, flwr {versions.get('flwr')}, "
        f"transformers {versions.get('transformers')}. Memory: of the process and all below it. "
        "First: from the start of the process to the end of round 1. a / b: how many times longer "
        "a takes; the worse of wall and CPU is held against the target.",
        box=box.SIMPLE_HEAD,
    )
    for _ in ("group", "name"):
        shown.add_column("", overflow="fold")
    for head in HEADS:
        shown.add_column(head, justify="right", overflow="fold")
    for group, members in groupby(rows, lambda row: str(row["group"])):
        for index, row in enumerate(members):
            cells = _case(row) if row["kind"] == "case" else _comparison(row)
            shown.add_row("" if index else group, row["name"], *cells)
        shown.add_section()
    return shown


def _case(row: Row) -> list[str]:
    off = row["update_off"]
    return [
        spread(row["wall_seconds"], 1000),
        spread(row["cpu_seconds"], 1000),
        f"{row['peak_mb']:.0f}",
        f"{row['first_seconds']:.1f}",
        "" if off is None else f"{off:.0e}",
        "",
    ]


def _comparison(row: Row) -> list[str]:
    if row["kind"] == "figure":
        return [_number(row["value"]), "", "", "", "", verdict(row)]
    return [spread(row["wall_ratios"]), spread(row["cpu_ratios"]), "", "", "", verdict(row)]


def verdict(row: Row) -> str:
    """Return the bound, and whether it was met."""
    if row["met"] is None:
        return ""
    least = row["least"]
    bound = f"<= {row['most']:.4g}" if least is None else f">= {least:.4g}"
    return f"{bound}\n{'met' if row['met'] else '[bold red]missed'}"


def spread(values: list[float], scale: float = 1) -> str:
    """Return the median, and the range below it."""
    low, middle, high = (scale * value for value in (min(values), median(values), max(values)))
    digits = _digits(middle)
    return f"{middle:.{digits}f}\n[dim]{low:.{digits}f}-{high:.{digits}f}"


def _number(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2
