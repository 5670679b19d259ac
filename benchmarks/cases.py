"""What is compared with what."""

from dataclasses import dataclass
from typing import Literal

BFLOAT16_GAIN = 1.5  # over float32 in matrix products, from which on bfloat16 is worth a run


@dataclass(frozen=True)
class Case:
    """One engine on one experiment."""

    label: str
    engine: Literal["ours", "bare"]
    overrides: tuple[str, ...]
    target: float | None = None  # the first case's CPU time over this one's, at least
    tolerance: float | None = None  # of the update, relative to that of the first case


@dataclass(frozen=True)
class Group:
    """Cases that take turns; the first is what the others are compared with."""

    name: str
    cases: tuple[Case, ...]
    turns: int
    rounds: int  # of a case in a turn


def groups(bfloat16: bool) -> list[Group]:
    """Return all groups, with or without the cases in bfloat16."""
    w1, w2 = ("experiment=bench_w1",), ("experiment=bench_w2",)
    many = (*w1, "num_clients=100000")
    w3, low = ("experiment=bench_w3",), (*w2, "dtype=bfloat16")
    adapters = [
        Case("loop, float32", "bare", w2),
        Case("fedsys, float32", "ours", w2, target=1.0, tolerance=1e-4),
    ]
    if bfloat16:
        adapters.append(Case("fedsys, bfloat16", "ours", low, target=3.0))
    private = [Case("float32", "ours", w2), Case("float32, private", "ours", w3, target=1 / 1.1)]
    private_low = [
        Case("bfloat16", "ours", low),
        Case("bfloat16, private", "ours", (*w3, "dtype=bfloat16"), target=1 / 1.1),
    ]
    return [
        Group(
            "w1",
            (
                Case("loop", "bare", w1),
                Case("fedsys", "ours", w1, target=4.0, tolerance=1e-4),
            ),
            turns=9,
            rounds=5,
        ),
        Group("w2", tuple(adapters), turns=2, rounds=1),
        Group("w3", tuple(private), turns=3, rounds=1),
        *([Group("w3", tuple(private_low), turns=3, rounds=2)] if bfloat16 else []),
        Group(
            "scaling",
            (
                Case("N = 1,000", "ours", w1),
                Case("N = 100,000", "ours", many, target=1 / 1.2),
            ),
            turns=9,
            rounds=10,
        ),
    ]
