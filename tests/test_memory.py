"""What a pass takes, and what there is."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedsys import memory

CPU = torch.device("cpu")


def test_what_is_there_is_some_of_what_the_machine_has() -> None:
    fields = Path("/proc/meminfo").read_text().split()
    total = int(fields[fields.index("MemTotal:") + 1]) * 1024
    found = memory.available(CPU)
    assert found is not None
    assert 0 < found <= total


@pytest.mark.parametrize(("limit", "left"), [("1000000", 600_000 + 70_000), ("max", 2048 * 1024)])
def test_a_container_may_have_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 9\nactive_file 30000\ninactive_file 40000\n")
    assert memory.available(CPU) == left


def test_what_cannot_be_known_is_not_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "_GROUP", tmp_path / "none")
    assert memory.available(CPU) is None


@pytest.mark.parametrize("rows", [1, 7])
def test_a_pass_keeps_the_inputs_of_its_layers(rows: int) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    floats = rows * 5 + rows * 3  # of the two layers; what ReLU keeps is the second's input
    assert memory.kept(model, {"input": torch.randn(rows, 5)}) == 4 * floats


def test_what_is_frozen_below_keeps_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    assert memory.kept(model, {"input": torch.randn(4, 5)}) == 4 * 4 * 3


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_shortage_is_told_from_other_errors(error: Exception, short: bool) -> None:
    assert memory.is_shortage(error) is short
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("the client failed, and does not say why") from error
    assert memory.is_shortage(caught.value) is short


def test_a_real_shortage_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_shortage(caught.value)
