"""report.html of runs and sweeps: what it shows, and that it needs nothing else."""

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.errors import ConfigError
from fedsys.main import main
from fedsys.report import write_report
from fedsys.report.curves import curves
from fedsys.report.drawing import COLOURS, look, thinned
from fedsys.report.grids import _Places
from fedsys.report.page import Page, Section, Table, as_html, link
from fedsys.report.pareto import as_number, called, front
from fedsys.sweeps.grid import expand
from fedsys.sweeps.results import write_index

SUMMARY = {
    "status": "completed",
    "final": {"train_loss": 0.5, "eval_loss": 0.25, "eval_accuracy": 0.8125},
    "best": {"round": 2, "eval_loss": 0.25, "eval_accuracy": 0.875},
    "bytes_up": 24792,
    "epsilon": None,
}
CONFIG = """
strategy: {_target_: strategies.fed_sb.FedSB}
model: {_target_: fedsys.models.MLP}
data: {_target_: fedsys.data.Digits}
num_clients: 4
"""
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


def lines(rounds: int = 3, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "round": round,
            "train_loss": 1 / (round + 1),
            "eval_loss": 2.0,
            "eval_accuracy": 0.5,
            "bytes_up": 10,
            "reasons": [],
            **more,
        }
        for round in range(rounds)
    ]


def run_in(folder: Path, records: list[dict[str, Any]] | None = None, **summary: Any) -> str:
    """Write what is left of a run, and return its report."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **summary}))
    text = "".join(json.dumps(line) + "\n" for line in records or lines())
    (folder / "metrics.jsonl").write_text(text)
    return write_report(folder).read_text()


def sweep_in(folder: Path, overrides: list[str], value: Any) -> str:
    """Write what is left of a sweep with the accuracies ``value`` gives, and return its report."""
    grid = expand([*overrides, f"out={folder}"])
    write_index(grid, {})
    for index, point in enumerate(grid.points):
        accuracy = value(point.swept)
        if accuracy is not None:
            point.folder.mkdir(parents=True)
            summary = {
                "status": "completed",
                "final": {"eval_accuracy": accuracy},
                "bytes_up": 100 * (index + 1),
            }
            (point.folder / "summary.json").write_text(json.dumps(summary))
    return write_report(folder).read_text()


class Reader(HTMLParser):
    """What a browser would see of a page."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.tags, self.addresses = "", [], [], []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " "
        values = dict(attrs)
        self.addresses += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the curves out, which take most of the time."""
    monkeypatch.setattr("fedsys.report.run.curves", lambda _: [])


def words(html: str) -> str:
    return " ".join(Reader(html).text.split())


# ---- of a run


def test_a_run_is_told_in_full(tmp_path: Path) -> None:
    for name in ("partition.png", "participation.png"):
        (tmp_path / name).write_bytes(PIXEL)
    env = {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "git": None}
    (tmp_path / "env.json").write_text(json.dumps(env))
    (tmp_path / "overrides.yaml").write_text("- rounds=2\n- seed=3\n")
    html = run_in(tmp_path)
    text = words(html)
    for said in (
        "FedSB of MLP on Digits, 4 clients",
        "completed",
        "overrides rounds=2 seed=3",
        "final accuracy 0.8125",
        "best accuracy 0.875 (round 2)",
        "sent up 24.8 kB",
        "torch 2.13.0",
        "_target_: strategies.fed_sb.FedSB",
        "Accuracy over rounds.",
        "Loss over bytes.",
    ):
        assert said in text
    assert html.count(base64.b64encode(PIXEL).decode()) == 2
    for absent in ("Privacy", "Audit", "Failures", "Epsilon over rounds", "None"):
        assert absent not in text


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "partition.png").write_bytes(PIXEL)
    reader = Reader(run_in(tmp_path))
    assert reader.open == []
    assert reader.addresses
    assert all(address.startswith(("#", "data:image/png;")) for address in reader.addresses)
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert len(reader.ids) == len(set(reader.ids))
    targets = {address[1:] for address in reader.addresses if address[0] == "#"}
    assert targets <= set(reader.ids)


EVIL = '<script>alert("x")</script>&'


@pytest.mark.usefixtures("undrawn")
def test_all_text_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "env.json").write_text(json.dumps({EVIL: EVIL, "packages": {EVIL: EVIL}}))
    (tmp_path / "audit.json").write_text(json.dumps({"claimed": EVIL, EVIL: EVIL}))
    (tmp_path / "overrides.yaml").write_text(json.dumps([EVIL]))
    records = lines(reasons=[f"client 1: {EVIL}"])
    html = run_in(tmp_path, records, reason=EVIL, privacy={EVIL: EVIL}, engine=EVIL)
    reader = Reader(html)
    assert "script" not in reader.tags
    assert reader.text.count(EVIL) >= 9


def test_keys_with_dollars_are_no_mathematics(tmp_path: Path) -> None:
    html = sweep_in(
        tmp_path,
        ["data.path='$x^{','<b>'", "client.lr=1,2"],
        lambda swept: float(swept["client.lr"]),
    )
    assert "b" not in Reader(html).tags
    assert (tmp_path / "accuracy_lr.png").exists()


def test_what_is_guaranteed_stands_in_the_page(tmp_path: Path) -> None:
    said = {"unit": "record", "adjacency": "add or remove one", "accountant": "PLD"}
    figures = {"pld": 2.5, "rdp": 2.75, "prv": None}
    html = run_in(
        tmp_path, lines(epsilon=1.5), epsilon=2.5, delta=1e-5, privacy=said, accountants=figures
    )
    text = words(html)
    assert "Privacy epsilon 2.5 delta 1e-05 unit record adjacency add or remove one" in text
    assert "accountant PLD epsilon by accountant pld 2.5, rdp 2.75 Course" in text
    assert "Epsilon over rounds." in text


def test_an_epsilon_without_bound_is_told_and_not_drawn(tmp_path: Path) -> None:
    text = words(run_in(tmp_path, lines(epsilon=math.inf), epsilon=math.inf))
    assert "Privacy epsilon inf" in text
    assert "Epsilon over rounds" not in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("claimed", "measured", "confidence", "verdict"),
    [
        (3.0, 1.5, 0.95, "does not refute it"),
        (3.0, 3.5, 0.95, "the claim does not hold"),
        (math.inf, 9.0, 0.95, "does not refute it"),
        (3.0, 3.5, None, "can neither confirm the claim nor refute it"),
    ],
)
def test_an_audit_stands_beside_the_claim(
    tmp_path: Path, claimed: float, measured: float, confidence: float | None, verdict: str
) -> None:
    found = {"claimed": claimed, "measured": measured, "method": "one run"}
    found |= {"confidence": confidence}
    (tmp_path / "audit.json").write_text(json.dumps(found))
    text = words(run_in(tmp_path))
    assert verdict in text
    assert f"claimed {claimed:.4g} measured {measured:.4g}" in text
    assert ("method one run confidence 0.95" in text) is (confidence is not None)


@pytest.mark.usefixtures("undrawn")
def test_failures_are_told_by_client_with_reasons(tmp_path: Path) -> None:
    records = lines(12)
    for record in records[1:]:
        record["reasons"] = ["client 7: sent NaN"]
    records[2]["reasons"].append("client 3: raised ValueError: a\nb")
    records[3]["reasons"].append("nobody answered")
    text = words(run_in(tmp_path, records))
    assert "13 replies of 3 clients were left out" in text
    assert "7 11 1, 2, 3, 4, 5, 6 ... 11 sent NaN" in text
    assert "3 1 2 raised ValueError: a b" in text
    assert text.index("sent NaN") < text.index("raised ValueError")


def test_a_run_that_was_killed_is_told_as_far_as_it_went(tmp_path: Path) -> None:
    run_in(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "comp')
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "eval_')
    text = words(write_report(tmp_path).read_text())
    assert "unfinished" in text
    assert "Accuracy over rounds." in text
    (tmp_path / "metrics.jsonl").unlink()
    assert "Course" not in words(write_report(tmp_path).read_text())


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    assert run_in(tmp_path) == write_report(tmp_path).read_text()


def test_bytes_add_up_over_the_rounds() -> None:
    pictures = curves(lines(3, bytes_down=5, bytes_init=None))
    ticks = ElementTree.fromstring(pictures[2].svg).itertext()
    assert pictures[2].caption == "Accuracy over bytes."
    assert "".join(ticks)  # well-formed


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_was_not_measured_is_not_drawn(value: float | None) -> None:
    assert [p.caption for p in curves(lines(eval_accuracy=value, eval_loss=value))] == [
        "Loss over rounds."  # that of the training
    ]


@given(st.integers(0, 5000), st.integers(1, 900))
def test_thinning_keeps_the_ends_and_the_order(count: int, most: int) -> None:
    points = [(float(i), 0.0) for i in range(count)]
    kept = thinned(points, most)
    assert len(kept) <= most + 1
    assert list(kept) == sorted(kept)
    assert list(kept[:1]) == points[:1]
    assert list(kept[-1:]) == points[-1:]


# ---- of a sweep


def test_a_sweep_over_epsilon_is_drawn(tmp_path: Path) -> None:
    html = sweep_in(
        tmp_path,
        ["privacy.epsilon=1,10,inf", "strategy=fed_sb,fedavg", "seed=0,1"],
        lambda swept: min(0.9, 0.1 * float(swept["privacy.epsilon"])) + 0.01 * int(swept["seed"]),
    )
    text = words(html)
    assert "Sweep over privacy.epsilon, strategy, seed 12 of 12 runs completed" in text
    assert "Mean over 2 seeds; bars are one standard deviation of the sample." in text
    assert (
        "no other one beats in bytes, accuracy and epsilon: epsilon 1, fed_sb (150 B, 0.105)"
        in text
    )
    for name in ("accuracy_epsilon.png", "accuracy_bytes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results.csv").exists()
    reader = Reader(html)
    assert len(reader.ids) == len(set(reader.ids))


def test_another_key_is_drawn_only_where_it_is_a_number(tmp_path: Path) -> None:
    sweep_in(tmp_path, ["client.lr=0.1,1,10", "client.optimizer=sgd,adam"], lambda _: 0.5)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"accuracy_lr.png", "accuracy_bytes.png"}


def test_too_many_lines_are_not_drawn(tmp_path: Path) -> None:
    sweep_in(tmp_path, ["client.lr=range(1,14)", "adapter.rank=1,2"], lambda _: 0.5)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "accuracy_lr.png",  # two lines, and not thirteen
        "accuracy_bytes.png",
    }


def test_what_is_not_complete_is_told_with_its_reason(tmp_path: Path) -> None:
    grid = expand(["seed=0,1,2", f"out={tmp_path}"])
    write_index(grid, {"seed=2": ["it makes no sense"]})
    grid.points[0].folder.mkdir(parents=True)
    summary = {"status": "failed", "reason": "RunError: no space"}
    (grid.points[0].folder / "summary.json").write_text(json.dumps(summary))
    text = words(write_report(tmp_path).read_text())
    assert "0 of 2 runs completed" in text
    assert "Not complete run status reason seed=0 failed RunError: no space" in text
    assert "Left out run status reason seed=2 refused it makes no sense" in text
    assert "Pictures" not in text


def test_runs_with_a_report_are_linked(tmp_path: Path) -> None:
    sweep_in(tmp_path, ["data.path='a b','c#d'"], lambda _: 0.5)
    folders = sorted((tmp_path / "points").iterdir())
    (folders[0] / "report.html").touch()
    links = [a for a in Reader(write_report(tmp_path).read_text()).addresses if "report" in a]
    assert len(links) == 1
    assert re.fullmatch(r"points/data\.path%3Da_b-[0-9a-f]{8}/report\.html", links[0])


COSTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), max_size=12)


@given(COSTS)
def test_the_front_is_what_nobody_beats(costs: list[tuple[float, ...]]) -> None:
    def beats(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
        no_more = all(a <= b for a, b in zip(left, right, strict=True))
        return no_more and any(a < b for a, b in zip(left, right, strict=True))

    kept = front(costs)
    for place, cost in enumerate(costs):
        beaten = any(beats(costs[other], cost) for other in kept)
        assert beaten is (place not in kept)


def test_a_front_by_hand() -> None:
    # (bytes, -accuracy)
    assert front([(10, -0.9), (10, -0.8), (20, -0.95), (5, -0.5), (30, -0.95)]) == [0, 2, 3]


def test_what_has_no_bound_has_a_place_at_the_right() -> None:
    places = _Places([10.0, math.inf, 1.0], log=True)
    assert [places.of(value) for value in (1.0, 10.0)] == [1.0, 10.0]
    assert places.of(math.inf) > 10.0
    assert _Places([math.inf], log=True).of(math.inf) > 0
    assert _Places([0.0, math.inf], log=True).log is False  # 0 has no logarithm
    assert _Places([1.0, 100.0], log=False).log is True
    assert _Places([1.0, 2.0], log=False).log is False


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("inf", math.inf), ("nan", None), ("fedavg", None), ("true", None)],
)
def test_numbers_are_told_from_texts(text: str, value: float | None) -> None:
    assert as_number(text) == value


def test_settings_are_called_by_few_words() -> None:
    assert called({"strategy": "fed_sb", "privacy.epsilon": "3", "rounds": "5"}) == (
        "fed_sb, epsilon 3, rounds 5"
    )
    assert called({}) == "all"


def test_looks_differ() -> None:
    looks = {tuple(sorted(look(index).items())) for index in range(70)}
    assert len(looks) == 70


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_seen_on_white(colour: str) -> None:
    # WCAG 2.2, 1.4.11: graphics need a contrast of 3; lines here also have marks, so 2 is enough.
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert 1.05 / (luminance + 0.05) >= 2


def test_a_page_of_nothing_is_a_page() -> None:
    html = as_html(Page("a & b", "done", True, [], [Section("x", table=Table(["y"], []))]))
    assert words(html) == "a & b done x y"


def test_links_are_quoted() -> None:
    assert link("x", "a=1,b#2", "c.html").href == "a%3D1%2Cb%232/c.html"


# ---- the command


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_in(tmp_path)
    (tmp_path / "report.html").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").exists()


def test_a_folder_of_neither_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is the folder of no run and no sweep" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError):
        write_report(tmp_path / "missing")


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.figure"])
def test_without_the_extra_there_is_a_hint(
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines(1)[0]) + "\n")
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["report", str(tmp_path)]) == 1
    assert "pip install 'fedsys[report]'" in capsys.readouterr().err
