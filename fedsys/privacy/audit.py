"""What an attack on a finished run proves, or suggests, about its epsilon.

One run, m canaries, each among the training rows with probability 1/2. After training, r of the m
coins are guessed, v of them rightly. If training was (epsilon, delta)-DP, then

    P[V >= v] <= P[B >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= B < v] / i,

    B ~ Binomial(r, 1 / (1 + exp(-epsilon))).

The largest epsilon at which the right-hand side is at most 1 - confidence is a lower bound of the
true one with that confidence, if r was fixed before the scores were seen.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023,
https://arxiv.org/abs/2305.08846. Andrew et al., "One-shot Empirical Privacy Estimation
for Federated Learning", ICLR 2024, https://arxiv.org/abs/2302.03098, for ``one_shot``.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from fedsys.privacy.gaussians import gaussians_epsilon, largest

Method = Literal["one-run bound", "one-shot estimate"]


@dataclass(frozen=True)
class Guess:
    """How many coins are guessed: the highest scores as in, the lowest as out; fixed beforehand.

    The scores between are left alone. A threshold chosen by how well it does proves nothing.
    """

    inside: int  # k+
    outside: int  # k-

    def __post_init__(self) -> None:
        for name in ("inside", "outside"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} counts guesses, got {getattr(self, name)}")

    @classmethod
    def quarters(cls, canaries: int) -> Self:
        """Return the usual plan: the highest quarter is in, the lowest is out."""
        return cls(canaries // 4, canaries // 4)

    @property
    def total(self) -> int:
        """How many coins are guessed: r."""
        return self.inside + self.outside

    def __call__(self, scores: Tensor) -> Tensor:
        """Return 1 (in), -1 (out) or 0 (no guess) for each of ``scores`` (m,); equals by place.

        Raises ``ValueError`` for more guesses than scores and for a score that is no number.
        """
        if self.total > len(scores):
            raise ValueError(f"{self.total} guesses need as many canaries, got {len(scores)}")
        if scores.isnan().any():
            raise ValueError("a score is not a number")
        order = scores.argsort(stable=True)
        guesses = torch.zeros(len(scores), dtype=torch.int8)
        guesses[order[: self.outside]] = -1
        guesses[order[len(scores) - self.inside :]] = 1
        return guesses


@dataclass(frozen=True)
class Audit:
    """The epsilon that is claimed beside the one that was measured, at the same delta."""

    claimed: float  # inf: none
    measured: float
    delta: float
    method: Method
    canaries: int
    guesses: int | None = None  # of a bound
    correct: int | None = None
    confidence: float | None = None

    @property
    def contradicts(self) -> bool:
        """Whether the claim is refuted: an estimate never refutes one."""
        return self.confidence is not None and self.measured > self.claimed


def audit(
    scores: Tensor,
    coins: Tensor,
    guess: Guess,
    claimed: float,
    delta: float,
    confidence: float = 0.95,
) -> Audit:
    """Return the one-run audit of ``scores`` (m,) against ``coins`` (m,) bool."""
    guesses = guess(scores)
    correct = int(((guesses == 1) & coins | (guesses == -1) & ~coins).sum())
    measured = lower_bound(len(coins), guess.total, correct, delta, confidence)
    return Audit(
        claimed,
        measured,
        delta,
        "one-run bound",
        len(coins),
        guess.total,
        correct,
        confidence,
    )


def estimate(cosines: Tensor, dimension: int, claimed: float, delta: float) -> Audit:
    """Return the one-shot estimate from the ``cosines`` (k,) of the canaries that took part."""
    measured = one_shot(cosines, dimension, delta)
    return Audit(claimed, measured, delta, "one-shot estimate", len(cosines))


def lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """Return the epsilon that ``correct`` of ``guesses`` right guesses prove; 0.0 if they do not.

    ``canaries`` >= ``guesses`` >= ``correct`` >= 0 are m, r and v of the module; ``delta`` is in
    [0, 1), ``confidence`` in (0, 1). Raises ``ValueError`` otherwise.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"correct <= guesses <= canaries are counts, got {correct}, {guesses}, {canaries}"
        )
    _check(delta, confidence)
    log_choose = _log_choose(guesses)
    level = math.log1p(-confidence)
    return largest(
        lambda epsilon: _log_chance(log_choose, canaries, correct, delta, epsilon) <= level
    )


def _log_chance(
    log_choose: Tensor, canaries: int, correct: int, delta: float, epsilon: float
) -> float:
    """Return the logarithm of the right-hand side of the module's inequality."""
    if correct == 0:
        return 0.0
    right = torch.arange(len(log_choose), dtype=torch.float64)
    # log q and log(1 - q) without forming q, of which large epsilons leave nothing.
    log_q = -math.log1p(math.exp(-epsilon))
    log_pmf = log_choose + right * log_q + right.flip(0) * (log_q - epsilon)
    tail = log_pmf[correct:].logsumexp(0)
    if delta == 0:
        return tail.item()
    below = log_pmf[:correct].flip(0).logcumsumexp(0)  # [i - 1]: log P[v - i <= B < v]
    worst = (below - right[1 : correct + 1].log()).max()
    return torch.logaddexp(tail, worst + math.log(2 * canaries * delta)).item()


def _log_choose(total: int) -> Tensor:
    """Return the logarithms of the binomial coefficients of ``total``, (total + 1,)."""
    k = torch.arange(total + 1, dtype=torch.float64)
    factorial = torch.lgamma(k + 1)
    return factorial[-1] - factorial - factorial.flip(0)


def one_shot(cosines_in: Tensor, dimension: int, delta: float) -> float:
    """Return the epsilon at ``delta`` that the cosines of canary clients suggest.

    Each canary client sent a random direction in R^``dimension``; ``cosines_in`` (k,) are those
    directions' cosines with the final displacement of the model. A direction that nobody sent has a
    cosine near N(0, 1 / dimension); those sent get a Gaussian fitted. The result is the larger of
    the two epsilons, of either against the other: an estimate, not a bound.
    """
    if len(cosines_in) < 2:
        raise ValueError(f"a Gaussian is fitted to at least 2 cosines, got {len(cosines_in)}")
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1, got {dimension}")
    _check(delta)
    cosines = cosines_in.double()
    spread = 1 / math.sqrt(dimension)
    shift, width = cosines.mean().item() / spread, cosines.std().item() / spread
    if width == 0:
        return math.inf
    return gaussians_epsilon(shift, width, delta)


def _check(delta: float, confidence: float = 0.5) -> None:
    if not 0 <= delta < 1:
        raise ValueError(f"delta is a probability in [0, 1), got {delta}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a probability in (0, 1), got {confidence}")
