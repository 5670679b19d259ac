"""Arithmetic on named tensors."""

import math
import pickle
from collections.abc import Callable
from copy import copy, deepcopy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fedsys.params import (
    Layout,
    Params,
    add,
    digest,
    norm,
    subtract,
    weighted_mean,
    weighted_sum,
)

NUMBERS = st.floats(-1e3, 1e3, width=32)
WEIGHTS = st.floats(0.125, 1e3)
SHAPES = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1
)


@st.composite
def updates(draw: st.DrawFn, most: int = 5) -> list[tuple[float, Params]]:
    """Draw (weight, params) of clients that share names and shapes."""
    shapes = draw(SHAPES)
    clients = draw(st.integers(1, most))
    return [
        (draw(WEIGHTS), {n: draw(tensors(s)) for n, s in shapes.items()}) for _ in range(clients)
    ]


def tensors(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    count = math.prod(shape)
    return st.lists(NUMBERS, min_size=count, max_size=count).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.float32).view(shape)
    )


def assert_close(found: Params, expected: Params, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)


# ---- means


@settings(deadline=None)
@given(updates(), st.randoms())
def test_mean_does_not_depend_on_the_order(terms, random):
    shuffled = random.sample(terms, len(terms))
    assert_close(weighted_mean(shuffled), weighted_mean(terms), atol=1e-9)


@settings(deadline=None)
@given(updates(), st.floats(1e-3, 1e3))
def test_mean_does_not_depend_on_the_unit_of_the_weights(terms, unit):
    scaled = [(unit * weight, params) for weight, params in terms]
    assert_close(weighted_mean(scaled), weighted_mean(terms), atol=1e-9)


@settings(deadline=None)
@given(updates(most=1), st.lists(WEIGHTS, min_size=1, max_size=5))
def test_mean_of_equals_is_their_value(terms, weights):
    ((_, params),) = terms
    mean = weighted_mean((weight, params) for weight in weights)
    assert_close(mean, {n: p.double() for n, p in params.items()}, atol=1e-9)


@settings(deadline=None)
@given(updates())
def test_mean_lies_between_the_extremes(terms):
    for name, value in weighted_mean(terms).items():
        stack = torch.stack([params[name].double() for _, params in terms])
        assert (value >= stack.amin(0) - 1e-9).all()
        assert (value <= stack.amax(0) + 1e-9).all()


def test_worked_mean():
    terms = [(1.0, {"w": torch.tensor([0.0, 4.0])}), (3.0, {"w": torch.tensor([4.0, 0.0])})]
    assert weighted_sum(terms)["w"].tolist() == [12.0, 4.0]
    assert weighted_mean(terms)["w"].tolist() == [3.0, 1.0]


def test_sums_are_taken_in_float64():
    # In float32 the small terms would be lost beside the large one.
    terms = [(1.0, {"w": torch.tensor(value)}) for value in (1e8, *[1.0] * 10, -1e8)]
    assert weighted_sum(terms)["w"].dtype == torch.float64
    assert weighted_sum(terms)["w"].item() == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_every_dtype_is_summed(dtype: torch.dtype):
    total = weighted_sum([(0.5, {"n": torch.tensor([1, 1]).to(dtype)})] * 3)
    assert total["n"].tolist() == [1.5, 1.5]


def test_no_terms_are_the_zero_vector():
    assert weighted_sum([]) == {}
    assert weighted_mean([]) == {}


def test_weights_that_cancel_leave_the_sum():
    terms = [(0.0, {"w": torch.tensor([1.0])})]
    assert weighted_mean(terms)["w"].tolist() == [0.0]


def test_terms_are_held_one_at_a_time_and_left_alone():
    alive = 0
    one = {"w": torch.ones(3)}

    def terms():
        nonlocal alive
        for _ in range(4):
            alive += 1
            yield 2.0, one
            alive -= 1

    assert weighted_sum(terms())["w"].tolist() == [8.0] * 3
    assert alive == 0
    assert one["w"].tolist() == [1.0] * 3


# ---- add, subtract, norm


def test_add_keeps_dtypes_and_what_has_no_direction():
    params = {
        "half": torch.tensor([1.0], dtype=torch.bfloat16),
        "count": torch.tensor([3]),
        "still": torch.tensor([7.0]),
    }
    direction = {"half": torch.tensor([0.5]), "count": torch.tensor([0.8])}
    moved = add(params, direction, 2.0)
    assert {n: v.dtype for n, v in moved.items()} == {n: v.dtype for n, v in params.items()}
    assert moved["half"].item() == 2.0
    assert moved["count"].item() == 5  # 4.6 to the nearest, not towards zero
    assert moved["still"] is params["still"]
    assert params["count"].item() == 3


def test_add_rounds_once():
    # Each half of the step alone is below half a unit in the last place of 1.
    ulp = 2.0**-23
    params, direction = {"w": torch.tensor([1.0])}, {"w": torch.tensor([0.4 * ulp])}
    assert add(params, direction, 2.0)["w"].item() == 1 + ulp


@settings(deadline=None)
@given(updates(most=1))
def test_subtract_is_the_inverse_of_add(terms):
    ((_, params),) = terms
    double = {n: p.double() for n, p in params.items()}
    twice = add(double, double)
    assert_close(subtract(twice, double), double, atol=0)


def test_norm_is_over_all_tensors():
    assert norm({"a": torch.tensor([[2.0, 3.0]]), "b": torch.tensor(6.0)}) == 7.0
    assert norm({}) == 0.0
    assert norm({"a": torch.full((1,), 1e30)}) == pytest.approx(1e30)


# ---- digests


@settings(deadline=None)
@given(updates(most=1))
def test_digest_knows_nothing_of_order_and_memory(terms):
    ((_, params),) = terms
    turned = dict(reversed(list(params.items())))
    assert digest(turned) == digest(params)
    views = {n: torch.stack([p, p], -1)[..., 0] for n, p in params.items()}
    assert digest(views) == digest(params)


def test_digest_knows_every_bit():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    next_up = torch.nextafter(torch.tensor(3.0), torch.tensor(4.0))
    others: list[Params] = [
        {},
        {"a": base["a"]},
        base | {"c": torch.zeros(0)},
        {"a": base["a"], "c": base["b"]},
        base | {"b": next_up},
        base | {"b": torch.tensor([3.0])},
        base | {"a": base["a"].flip(0)},
        base | {"a": base["a"].view(2, 1)},
        base | {"a": base["a"].view(torch.int32)},
        {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0])},
    ]
    assert len({digest(params) for params in [base, *others]}) == len(others) + 1
    assert digest({"z": torch.tensor(0.0)}) != digest({"z": torch.tensor(-0.0)})


# ---- layouts


@settings(deadline=None)
@given(updates())
def test_packing_and_back(terms):
    stack = [params for _, params in terms]
    layout = Layout.of(stack[0])
    flat = torch.stack([layout.pack(params) for params in stack])
    assert flat.shape == (len(stack), layout.size)
    for row, params in zip(flat, stack, strict=True):
        assert_close(layout.unpack(row), params, atol=0)
    assert_close(
        layout.unpack(flat), {n: torch.stack([p[n] for p in stack]) for n in stack[0]}, atol=0
    )
    for name, value in layout.unpack(flat[None, :0]).items():
        assert value.shape == (1, 0, *stack[0][name].shape)


def test_packing_takes_tensors_by_name():
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(())})
    assert layout.pack({"b": torch.tensor(3.0), "a": torch.tensor([1.0, 2.0])}).tolist() == [
        1,
        2,
        3,
    ]


def test_unpacked_tensors_share_the_memory():
    layout = Layout.of({"a": torch.zeros(2, 2), "b": torch.zeros(())})
    flat = torch.zeros(3, 5)
    for value in layout.unpack(flat).values():
        value += 1
    assert flat.eq(1).all()


def test_a_layout_of_nothing():
    layout = Layout.of({})
    assert layout.size == 0
    assert layout.pack({}).shape == (0,)
    assert layout.unpack(torch.zeros(0)) == {}


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"one dtype, got \['torch.float32', 'torch.int64'\]"):
        Layout.of({"a": torch.zeros(1), "n": torch.tensor([1])})


@given(st.lists(st.booleans(), min_size=1, max_size=5))
def test_views_of_one_vector_sum_to_the_same_bits(viewed: list[bool]) -> None:
    layout = Layout({"w": torch.Size([2, 3]), "b": torch.Size([4])}, torch.float32)
    draw = torch.Generator().manual_seed(len(viewed))
    flats = [torch.randn(layout.size, generator=draw) for _ in viewed]
    plain = [(0.3 * n, layout.unpack(flat)) for n, flat in enumerate(flats)]
    mixed = [
        (0.3 * n, layout.views(flat) if views else layout.unpack(flat))
        for n, (flat, views) in enumerate(zip(flats, viewed, strict=True))
    ]
    for how in (weighted_sum, weighted_mean):
        expected, found = how(plain), how(mixed)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def updated(params: Params) -> Params:
    other: Params = {}
    other.update(params)
    return other


def merged(params: Params) -> Params:
    other: Params = {}
    other |= params
    return other


LOOKS: list[Callable[[Params], object]] = [
    dict,
    list,
    len,
    bool,
    set,
    lambda params: {**params},
    lambda params: params | {"other": torch.ones(1)},
    lambda params: {"other": torch.ones(1)} | params,
    lambda params: params["b"],
    lambda params: params.get("b"),
    lambda params: "w" in params,
    lambda params: params.copy(),
    lambda params: updated(params),
    lambda params: merged(params),
    lambda params: list(reversed(params)),
    lambda params: list(params.items()),
    lambda params: [value.sum() for value in params.values()],
    lambda params: params.keys() == {"w", "b"},
    lambda params: dict(**params),
    lambda params: dict(copy(params)),
    lambda params: dict(deepcopy(params)),
    lambda params: dict(pickle.loads(pickle.dumps(params))),
    str,
]


@pytest.mark.parametrize("look", LOOKS)
def test_views_are_there_however_one_looks(look: Callable[[Params], object]) -> None:
    layout = Layout({"w": torch.Size([2, 3]), "b": torch.Size([4])}, torch.float32)
    flat = torch.randn(layout.size)
    assert str(look(layout.views(flat))) == str(look(layout.unpack(flat)))


def test_views_of_a_vector_of_another_size_are_never_zero() -> None:
    views = Layout({"w": torch.Size([2, 3])}, torch.float32).views(torch.zeros(5))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            len(views)


def test_views_share_the_vector_and_know_no_other_name() -> None:
    layout = Layout({"w": torch.Size([2, 3])}, torch.float32)
    flat = torch.zeros(6)
    views = layout.views(flat)
    flat += 1
    assert torch.equal(views["w"], torch.ones(2, 3))
    for name in ("b", "layout"):
        with pytest.raises(KeyError):
            views[name]


def test_a_sum_makes_the_views_of_no_term(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout({"w": torch.Size([2, 3])}, torch.float32)
    terms = [(1.0, layout.views(torch.ones(6))) for _ in range(3)]
    unpack, made = Layout.unpack, []
    monkeypatch.setattr(Layout, "unpack", lambda *args: made.append(1) or unpack(*args))
    total = weighted_sum(terms)
    assert torch.equal(total["w"], torch.full((2, 3), 3.0, dtype=torch.float64))
    assert made == [1]  # of the sum
