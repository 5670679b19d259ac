"""What is compared with what, and what is to come out."""

from dataclasses import dataclass
from typing import Literal

BFLOAT16_GAIN = 1.5  # over float32 in matrix products, from which on bfloat16 is worth a run
FIRST_ROUND = 12.0  # seconds from the start of the process to the end of W2's first round
SHARE = {"float32": 0.7, "bfloat16": 0.4}  # of the limit of matrix products, in W2
IDLE_BYTES = 1000.0  # of a client that is registered and was never asked

Precision = Literal["float32", "bfloat16"]
Engine = Literal["ours", "loop", "tuned", "on_pfl", "on_flower"]  # a module here


@dataclass(frozen=True)
class Case:
    """One engine on one experiment."""

    label: str
    precision: Precision  # of the frozen model; what is trained is in float32
    engine: Engine
    overrides: tuple[str, ...]
    tolerance: float | None = None  # of the update, relative to that of the first case
    threads: int | None = None  # of torch; None: as many as the others

    @property
    def name(self) -> str:
        """How the case is called in tables and files."""
        return f"{self.label}, {self.precision}"


@dataclass(frozen=True)
class Ratio:
    """How many times longer a round of ``slow`` takes than one of ``fast``, by name."""

    slow: str
    fast: str
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Group:
    """Cases that take turns."""

    name: str
    cases: tuple[Case, ...]
    ratios: tuple[Ratio, ...]
    turns: int
    rounds: int  # of a case in a turn


EXACT = 1e-4  # float32, in another order
ROUNDED = 0.1  # bfloat16 changes the update of a round by some per cent
W1, W2, W3 = (("experiment=bench_w1",), ("experiment=bench_w2",), ("experiment=bench_w3",))
LOW = "dtype=bfloat16"


def groups(bfloat16: bool) -> list[Group]:
    """Return all groups, with or without the cases in bfloat16."""
    privacy = [_privacy()] if bfloat16 else []
    return [
        _w1(),
        _w2(bfloat16),
        _ragged(bfloat16),
        _w3(bfloat16),
        *privacy,
        _upper(bfloat16),
        _scaling(),
    ]


def _w1() -> Group:
    cases = (
        Case("loop", "float32", "loop", W1),
        Case("tuned loop", "float32", "tuned", W1, EXACT),
        Case("pfl", "float32", "on_pfl", W1, EXACT),
        Case("Flower on Ray", "float32", "on_flower", W1, EXACT),
        Case("fedsys", "float32", "ours", W1, EXACT),
    )
    ratios = (
        Ratio("loop, float32", "fedsys, float32", 4.0),
        Ratio("tuned loop, float32", "fedsys, float32"),
        Ratio("pfl, float32", "fedsys, float32", 6.0),
        Ratio("Flower on Ray, float32", "fedsys, float32", 40.0),
    )
    return Group("w1", cases, ratios, turns=15, rounds=4)


def _w2(bfloat16: bool) -> Group:
    cases = [
        Case("loop", "float32", "loop", W2),
        Case("pfl", "float32", "on_pfl", W2, EXACT),
        Case("Flower on Ray", "float32", "on_flower", W2, EXACT),
        Case("fedsys", "float32", "ours", W2, EXACT),
        Case("fedsys on two cores", "float32", "ours", W2, EXACT, threads=2),
    ]
    ratios = [
        *_against("loop", "pfl", bfloat16=bfloat16),
        Ratio("Flower on Ray, float32", "fedsys on two cores, float32"),
    ]
    if bfloat16:
        cases += [
            Case("tuned loop", "bfloat16", "loop", (*W2, LOW), ROUNDED),
            Case("fedsys", "bfloat16", "ours", (*W2, LOW), ROUNDED),
            Case("fedsys on two cores", "bfloat16", "ours", (*W2, LOW), ROUNDED, threads=2),
        ]
        ratios.append(Ratio("Flower on Ray, float32", "fedsys on two cores, bfloat16"))
    return Group("w2", tuple(cases), tuple(ratios), turns=3, rounds=1)


def _ragged(bfloat16: bool) -> Group:
    """W2 on rows of 8 to 64 tokens; the others fill a batch up to its longest row."""
    work = (*W2, "data.length=64", "data.shortest=8")
    cases = [
        Case("loop", "float32", "loop", work),
        Case("pfl", "float32", "on_pfl", work, EXACT),
        Case("fedsys", "float32", "ours", work, EXACT),
    ]
    ratios = [
        Ratio("loop, float32", "fedsys, float32"),
        Ratio("pfl, float32", "fedsys, float32"),
    ]
    if bfloat16:
        cases += [
            Case("tuned loop", "bfloat16", "loop", (*work, LOW), ROUNDED),
            Case("fedsys", "bfloat16", "ours", (*work, LOW), ROUNDED),
        ]
        ratios += [
            Ratio("loop, float32", "fedsys, bfloat16"),
            Ratio("pfl, float32", "fedsys, bfloat16"),
            Ratio("tuned loop, bfloat16", "fedsys, bfloat16"),
        ]
    return Group("ragged", tuple(cases), tuple(ratios), turns=2, rounds=1)


def _w3(bfloat16: bool) -> Group:
    cases = [
        Case("loop with Opacus", "float32", "loop", W3),
        Case("pfl with Opacus", "float32", "on_pfl", W3),
        Case("Flower on Ray with Opacus", "float32", "on_flower", W3),
        Case("fedsys, W2", "float32", "ours", W2),
        Case("fedsys", "float32", "ours", W3),
    ]
    ratios = _against("loop with Opacus", "pfl with Opacus", bfloat16=bfloat16)
    private = Ratio("fedsys, float32", "fedsys, W2, float32", most=1.1)
    if bfloat16:
        cases += [
            Case("tuned loop with Opacus", "bfloat16", "loop", (*W3, LOW)),
            Case("fedsys", "bfloat16", "ours", (*W3, LOW)),
        ]
    return Group("w3", tuple(cases), (*ratios, private), turns=2, rounds=1)


def _privacy() -> Group:
    """The cost of privacy where a round is short enough for rounds as in a run.

    Lots of every size want memory, which takes a few rounds to be had once and for all.
    """
    cases = (
        Case("W2", "bfloat16", "ours", (*W2, LOW)),
        Case("W3", "bfloat16", "ours", (*W3, LOW)),
    )
    ratios = (Ratio(cases[1].name, cases[0].name, most=1.1),)
    return Group("privacy", cases, ratios, turns=2, rounds=8)


def _upper(bfloat16: bool) -> Group:
    """Adapters in the last two layers; what lies below is computed once for each row."""
    precision: Precision = "bfloat16" if bfloat16 else "float32"
    work = (*W2, f"dtype={precision}")
    cases = (
        Case("all layers", precision, "ours", work),
        Case("last:2", precision, "ours", (*work, "adapter.layers=last:2")),
    )
    ratios = (Ratio(cases[0].name, cases[1].name, 2.0),)
    # As in any run, rounds count in which some rows are new.
    return Group("upper", cases, ratios, turns=2, rounds=6)


def _against(loop: str, pfl: str, *, bfloat16: bool) -> tuple[Ratio, ...]:
    flower = "Flower on Ray" + loop.removeprefix("loop")
    low = "fedsys, bfloat16"
    ratios = [
        Ratio(f"{loop}, float32", "fedsys, float32", 1.1),
        Ratio(f"{pfl}, float32", "fedsys, float32", 1.1),
        Ratio(f"{flower}, float32", "fedsys, float32"),
    ]
    if bfloat16:
        ratios += [
            Ratio(f"{loop}, float32", low, 3.0),
            Ratio(f"{pfl}, float32", low, 3.0),
            Ratio(f"{flower}, float32", low),
            Ratio(f"tuned {loop}, bfloat16", low),
        ]
    return tuple(ratios)


def _scaling() -> Group:
    sizes = ("1,000", "100,000", "1,000,000")
    cases = tuple(
        Case(f"N = {size}", "float32", "ours", (*W1, f"num_clients={size.replace(',', '')}"))
        for size in sizes
    )
    ratios = tuple(Ratio(case.name, cases[0].name, most=1.2) for case in cases[1:])
    return Group("scaling", cases, ratios, turns=7, rounds=10)
