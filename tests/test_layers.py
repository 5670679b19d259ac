"""Who may import whom, and what no module may do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedsys", "strategies", "clients")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

# Entry points put the layers together; every other module of fedsys knows no algorithm.
ENTRY_POINTS = {
    f"fedsys/{name}.py"
    for name in (
        "federation",
        "protection",
        "experiment",
        "config",
        "far",
        "main",
        "server_app",
        "client_app",
    )
}
MAY_IMPORT = {
    "fedsys": {"fedsys"},
    "strategies": {"fedsys", "strategies"},
    "clients": {"fedsys", "clients"},
}


def nodes(name: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))


def imported(name: str) -> set[str]:
    """Return the top-level packages that a module imports, wherever in it."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            found.add(node.module or "")
    return {module.partition(".")[0] for module in found}


def calls(name: str) -> set[str]:
    """Return the names of the functions that a module calls, without what stands before a dot."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
    return found


def test_there_is_something_to_check() -> None:
    assert "fedsys/config.py" in NAMES
    assert "strategies/fedavg.py" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_one_way(name: str) -> None:
    if name not in ENTRY_POINTS:
        inner = imported(name) & {*PACKAGES, "configs", "tests", "benchmarks"}
        assert inner <= MAY_IMPORT[name.partition("/")[0]]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_pickled(name: str) -> None:
    assert not imported(name) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in nodes(name):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_printed(name: str) -> None:
    assert name in ("fedsys/main.py", "fedsys/console.py") or "print" not in calls(name)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_asserted_evaluated_or_seeded_globally(name: str) -> None:
    assert not any(isinstance(node, ast.Assert) for node in nodes(name))
    assert not calls(name) & {"eval", "exec"}
    for node in nodes(name):
        if isinstance(node, ast.Attribute):
            assert node.attr != "manual_seed_all"
