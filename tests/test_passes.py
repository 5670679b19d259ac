"""Rows of a step in passes of similar length: the cheapest choice, and every row once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clients.passes import by_column, by_row, gather, widths
from fedsys.losses import IGNORE
from tests.cohorts import CPU, texts, vectors


def cost(lengths: Tensor, ends: list[int], overhead: int) -> int:
    """Return what passes up to each of ``ends`` cost."""
    columns = [lengths[:, first:end] for first, end in pairwise([0, *ends])]
    return sum(part.numel() * int(part.max()) + overhead for part in columns)


def choices(columns: int) -> list[list[int]]:
    """Return the ends of all ways to part ``columns``."""
    inner = range(1, columns)
    picks = [[c for c in inner if mask >> c & 1] for mask in range(0, 2**columns, 2)]
    return [[*pick, columns] for pick in picks]


@given(
    lengths=st.integers(1, 7).flatmap(
        lambda columns: st.lists(
            st.lists(st.integers(1, 40), min_size=columns, max_size=columns), min_size=1, max_size=3
        )
    ),
    overhead=st.integers(0, 60),
)
def test_no_choice_of_passes_is_cheaper(lengths: list[list[int]], overhead: int) -> None:
    table = torch.tensor(lengths).sort(1).values
    counts, positions = widths(table, overhead)
    ends = torch.tensor(counts).cumsum(0).tolist()
    assert ends[-1] == table.shape[1]
    least = min(cost(table, other, overhead) for other in choices(table.shape[1]))
    assert cost(table, ends, overhead) == positions == least


def test_a_pass_for_every_length_where_passes_are_free_and_one_where_they_are_dear():
    lengths = torch.tensor([[2, 2, 3, 9], [2, 2, 5, 9]])
    assert widths(lengths, 0) == ([2, 1, 1], 8 + 10 + 18)
    assert widths(lengths, 10**6) == ([4], 72 + 10**6)
    assert widths(lengths[:, :0], 5) == ([0], 0)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes cost nothing."""
    monkeypatch.setattr("clients.passes.OVERHEAD", {"cpu": 0})


@pytest.mark.usefixtures("free")
def test_every_row_has_weight_once_and_every_client_as_many_rows_in_a_pass():
    examples = texts(24, labelled=True)
    rows = torch.full((3, 9), -1)
    short = 13 + int(examples.lengths(torch.arange(13, 24)).argmin())
    rows[0], rows[1, 2:6], rows[2, 8] = torch.arange(9), torch.arange(9, 13), short
    found = by_column(examples, rows, CPU).parts
    assert len(found) > 2
    for client in range(3):
        own = rows[client][rows[client] >= 0]
        weighed = torch.cat([part[client][~absent[client]] for part, absent in found])
        assert sorted(weighed.tolist()) == own.tolist()
        # What fills up is the client's own, and its shortest.
        filling = torch.cat([part[client][absent[client]] for part, absent in found])
        assert set(filling.tolist()) <= set(own.tolist())
        shortest = examples.lengths(own).min()
        assert examples.lengths(filling).eq(shortest).all()
    for part, absent in found:
        assert part.shape == absent.shape
        assert not absent.all(0).any()
        labels = gather(examples, part, CPU, absent)["labels"]
        assert torch.equal(labels == IGNORE, absent.flatten())


def test_rows_of_one_size_are_one_pass_in_their_own_order():
    rows = torch.tensor([[4, 1, 3], [0, 2, 5]])
    ((part, absent),) = by_column(vectors(6), rows, CPU).parts
    assert torch.equal(part, rows)
    assert not absent.any()
    ragged = torch.tensor([[4, 1, 3], [0, -1, -1]])
    ((part, absent),) = by_column(vectors(6), ragged, CPU).parts
    assert torch.equal(part[0], ragged[0])
    assert part[1].tolist() == [0, 0, 0]
    assert absent.sum() == 2


@pytest.mark.usefixtures("free")
def test_rows_by_themselves_are_parted_by_length_and_keep_their_owners():
    examples = texts(24, labelled=True)
    rows = torch.arange(24).view(3, 8).clone()
    rows[1, 3:] = -1
    found = by_row(examples, rows, CPU, 1).parts
    assert len(found) > 2
    pairs = [pair for part, owner in found for pair in zip(part.tolist(), owner.tolist())]  # noqa: B905
    expected = [(int(row), k) for k in range(3) for row in rows[k] if row >= 0]
    assert sorted(pairs) == expected
    for part, _ in found:
        assert len(examples.lengths(part).unique()) == 1
    ((part, owner),) = by_row(vectors(24), rows, CPU, 1).parts
    assert list(zip(part.tolist(), owner.tolist(), strict=True)) == expected
    ((part, owner),) = by_row(examples, torch.full((2, 3), -1), CPU, 1).parts
    assert len(part) == len(owner) == 0


@pytest.mark.usefixtures("free")
def test_a_pass_holds_no_more_copies_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clients.passes.LARGEST_PASS", 20)
    monkeypatch.setattr("clients.passes.OVERHEAD", {"cpu": 3})
    examples, rows = texts(24, labelled=True), torch.arange(24).view(3, 8)
    whole, parted = by_row(examples, rows, CPU, 1), by_row(examples, rows, CPU, 10)
    assert max(len(part) for part, _ in whole.parts) > 2
    assert max(len(part) for part, _ in parted.parts) == 2
    more = len(parted.parts) - len(whole.parts)
    assert parted.cost == whole.cost + 3 * more
    for place in (0, 1):
        joined = [torch.cat([pair[place] for pair in found.parts]) for found in (whole, parted)]
        assert torch.equal(*joined)
    assert max(len(part) for part, _ in by_row(examples, rows, CPU, 21).parts) == 1
