"""The page of one run."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedsys.console import size
from fedsys.json_lines import JsonLines
from fedsys.report.curves import curves
from fedsys.report.page import Page, Section, Table, image

_FAILURES_SHOWN = 200  # lines; metrics.jsonl has all of them
_PACKAGES = "packages"
Facts = list[tuple[str, str]]


def page_of_run(folder: Path) -> Page:
    """Return what the files of a run tell; those that are missing are left out."""
    summary, env = _json(folder / "summary.json"), _json(folder / "env.json")
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    tree: Any = OmegaConf.to_container(OmegaConf.create(config))
    lines = JsonLines(folder / "metrics.jsonl").read()
    sections = [
        Section("Result", facts=_numbers(summary)),
        _privacy(summary),
        _audit(_json(folder / "audit.json")),
        Section("Course", pictures=curves(lines)),
        _pictures(folder),
        _failures(lines),
        Section("Environment", facts=_environment(env)),
        Section("Configuration", text=config),
    ]
    status = str(summary.get("status", "unfinished"))
    reason = f": {summary['reason']}" if summary.get("reason") else ""
    return Page(
        title=_title(tree),
        status=f"{status}{reason}",
        good=status == "completed",
        facts=_head(folder, env),
        sections=[section for section in sections if section and _filled(section)],
    )


def _filled(section: Section) -> bool:
    return bool(section.facts or section.table or section.pictures or section.text)


def _title(tree: Mapping[str, Any]) -> str:
    """Return what was run: the classes of strategy, model and data."""
    names = {
        group: str((tree.get(group) or {}).get("_target_") or "").rpartition(".")[2]
        for group in ("strategy", "model", "data")
    }
    clients = tree.get("num_clients")
    return "{strategy} of {model} on {data}".format(**names) + f", {clients} clients"


def _head(folder: Path, env: Mapping[str, Any]) -> Facts:
    """Return what was asked for, where and when."""
    overrides = folder / "overrides.yaml"
    typed: Any = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.is_file() else []
    begun = folder / "env.json"
    ended = folder / "summary.json"
    facts = [
        ("overrides", " ".join(map(str, typed)) or "none"),
        ("run folder", str(folder.resolve())),
        ("begun", str(env.get("time") or _time(begun))),
        ("ended", _time(ended)),
        ("machine", str(env.get("platform", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def _time(path: Path) -> str:
    """Return when a file was written, in UTC; it is as old as what it tells of."""
    if not path.is_file():
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(path.stat().st_mtime))


def _numbers(summary: Mapping[str, Any]) -> Facts:
    final, best = summary.get("final") or {}, summary.get("best") or {}
    at = f" (round {best.get('round')})"
    found: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("final accuracy", final.get("eval_accuracy"), _number),
        ("best accuracy", best.get("eval_accuracy"), lambda v: _number(v) + at),
        ("final loss", final.get("eval_loss"), _number),
        ("training loss", final.get("train_loss"), _number),
        ("rounds", summary.get("rounds"), str),
        ("failures of clients", summary.get("failures"), str),
        ("clients", summary.get("num_clients"), lambda v: f"{v:,}"),
        ("trained numbers", summary.get("trainable_parameters"), lambda v: f"{v:,}"),
        ("sent up", summary.get("bytes_up"), size),
        ("sent down", summary.get("bytes_down"), size),
        ("sent at first", summary.get("bytes_init"), size),
        ("seconds", summary.get("seconds"), lambda v: f"{v:.1f}"),
        ("seconds a round", summary.get("seconds_per_round"), _number),
        ("peak memory", summary.get("peak_memory_mb"), lambda v: f"{v:.0f} MB"),
        ("seed", summary.get("seed"), str),
        ("engine", summary.get("engine"), str),
    ]
    return [(name, show(value)) for name, value, show in found if value is not None]


def _privacy(summary: Mapping[str, Any]) -> Section | None:
    """Return what is guaranteed, of a private run."""
    said = summary.get("privacy")
    facts: Facts = [
        (name, _number(summary[name]))
        for name in ("epsilon", "delta")
        if summary.get(name) is not None
    ]
    if isinstance(said, Mapping):
        # A figure that is said in full is not said twice.
        facts = [(name, value) for name, value in facts if name not in said]
        facts += [(str(name), str(value)) for name, value in said.items()]
    elif said:
        facts.append(("guarantee", str(said)))
    figures = summary.get("accountants")
    if isinstance(figures, Mapping):
        found = [f"{name} {_number(value)}" for name, value in figures.items() if value is not None]
        facts.append(("epsilon by accountant", ", ".join(found)))
    return Section("Privacy", facts=facts)


def _audit(found: Mapping[str, Any]) -> Section:
    """Return the claimed and the measured epsilon side by side."""
    if "claimed" not in found and "measured" not in found:
        return Section("Audit")
    claimed: Any = found.get("claimed")
    measured: Any = found.get("measured")
    verdict = _verdict(claimed, measured, found.get("confidence"))
    said = {k: v for k, v in found.items() if k not in ("claimed", "measured") and v is not None}
    others = [(k, _shown(v)) for k, v in said.items()]
    table = Table(["", "epsilon"], [["claimed", _shown(claimed)], ["measured", _shown(measured)]])
    return Section("Audit", notes=[verdict], facts=others, table=table)


def _verdict(claimed: Any, measured: Any, confidence: Any) -> str:
    """Return what an audit says of the claim; without confidence it has estimated no bound."""
    if confidence is None:
        return (
            "What was measured is an estimate, which can neither confirm the claim nor refute it."
        )
    if _is_number(claimed) and _is_number(measured) and measured > claimed:
        return "The lower bound that was measured exceeds what is claimed: the claim does not hold."
    return "What was measured is a lower bound: below the claim, it does not refute it."


def _pictures(folder: Path) -> Section:
    found = [
        image(folder / "partition.png", "Who holds how many rows of which label."),
        image(folder / "participation.png", "Whose updates were used in which round."),
    ]
    return Section("Clients", pictures=[picture for picture in found if picture])


def _failures(lines: Sequence[Mapping[str, Any]]) -> Section:
    """Return who was left out, how often and why; the most frequent first."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        for text in line.get("reasons") or ():
            found = re.fullmatch(r"client (-?\d+): (.*)", text, re.DOTALL)
            client, reason = found.groups() if found else ("", text)
            rounds.setdefault((client, reason), []).append(line["round"])
    if not rounds:
        return Section("Failures")
    ordered = sorted(rounds.items(), key=lambda item: -len(item[1]))
    rows = [[client, str(len(where)), _few(where), reason] for (client, reason), where in ordered]
    total, clients = sum(map(len, rounds.values())), Counter(client for client, _ in rounds)
    notes = [f"{total:,} replies of {len(clients):,} clients were left out."]
    if len(rows) > _FAILURES_SHOWN:
        notes.append(f"The {_FAILURES_SHOWN} most frequent are shown; metrics.jsonl has all.")
    table = Table(["client", "times", "rounds", "reason"], rows[:_FAILURES_SHOWN])
    return Section("Failures", notes=notes, table=table)


def _few(rounds: Sequence[int]) -> str:
    shown = ", ".join(map(str, rounds[:6]))
    return f"{shown} ... {rounds[-1]}" if len(rounds) > 6 else shown


def _environment(env: Mapping[str, Any]) -> Facts:
    packages = env.get(_PACKAGES) or {}
    facts = [(k, _shown(v)) for k, v in env.items() if k != _PACKAGES and v is not None]
    if packages:
        facts.append((_PACKAGES, ", ".join(f"{name} {found}" for name, found in packages.items())))
    return facts


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return _number(value) if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    if not _is_number(value) or not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a file, empty where it is missing or torn."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
