import numpy as np
import pytest
import torch

from fedsys.seeds import forked, generator, numpy_generator

NAMES = [
    (0, "batches", ()),
    (1, "batches", ()),
    (-1, "batches", ()),
    (0, "noise", ()),
    (0, "batches", (1,)),
    (0, "batches", (1, 1)),
    (0, "batches", (11,)),
    (0, "batches", (-1,)),
    (10, "batches", (1,)),
    (2**70, "batches", ()),
]


def torch_draw(seed, purpose, path):
    return torch.rand(4, generator=generator(seed, purpose, *path), dtype=torch.float64).tolist()


def numpy_draw(seed, purpose, path):
    return numpy_generator(seed, purpose, *path).random(4).tolist()


def forked_draw(seed, purpose, path):
    with forked(seed, purpose, *path):
        return torch.rand(4, dtype=torch.float64).tolist()


DRAWS = pytest.mark.parametrize("draw", [torch_draw, numpy_draw, forked_draw])


@DRAWS
def test_a_name_gives_the_same_numbers_whatever_was_drawn_before(draw):
    forwards = [draw(*name) for name in NAMES]
    torch.rand(5)
    backwards = [draw(*name) for name in reversed(NAMES)]
    assert forwards == backwards[::-1]


@DRAWS
def test_different_names_give_different_numbers(draw):
    assert len({tuple(draw(*name)) for name in NAMES}) == len(NAMES)


def test_neighbouring_names_are_uniform_and_uncorrelated():
    first = np.array([numpy_generator(0, "x", n).random(2) for n in range(4000)])
    for column in first.T:
        assert column.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * 4000))
        assert column.var() == pytest.approx(1 / 12, rel=0.1)
    assert abs(np.corrcoef(first.T)[0, 1]) < 4 / np.sqrt(4000)
    assert abs(np.corrcoef(first[1:, 0], first[:-1, 0])[0, 1]) < 4 / np.sqrt(4000)


def test_forked_leaves_the_global_generator_alone_even_after_an_error():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with forked(0, "x"):
        torch.rand(7)

    def fail():
        with forked(0, "x"):
            raise KeyError(torch.rand(7))

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.rand(3), expected)


def test_numpys_global_generator_does_not_matter():
    np.random.seed(0)
    first = numpy_draw(0, "x", ())
    np.random.seed(1)
    assert numpy_draw(0, "x", ()) == first
