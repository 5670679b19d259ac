"""What the operator of a device permits, whatever a server asks: ``policy.yaml``.

Every check returns the reasons why not, and what cannot be judged is refused. Epsilon is judged at
``max_delta``, so that what has left is (max_epsilon, max_delta)-private whatever delta a run has.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from fedsys.deployment import strict
from fedsys.errors import ConfigError
from fedsys.privacy.accounting import epsilon, upper_bound
from fedsys.privacy.release import MOST_NOISE, NO_NOISE, Spent

Level = Literal["none", "client", "sample"]  # from the weakest: a server's promise, then our own
Names = tuple[str, ...] | Literal["any"]

FILE = "policy.yaml"
LEVELS: tuple[Level, ...] = get_args(Level)
_PROMISES: dict[str, Level] = {
    "fedsys.privacy.sample_level.SamplePrivacy": "sample",
    "fedsys.privacy.client_level.ClientPrivacy": "client",
}
_OURS = ("fedsys", "strategies", "clients")
_QUIET_STARTS = (None, "private", "public", "seeded_random")  # of an adapter, not from bare rows
_PUBLIC = ("partition-id", "num-partitions")  # what a roll call may learn


class PolicyError(ConfigError):
    """The policy cannot be used, and nothing may run; ``problems`` lists every reason."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a reply is that is about to leave."""

    kind: str  # of the message it answers, such as "train" or "train.gradient"
    level: Level  # what the run promises
    size: int  # bytes, all of it
    arrays: bool  # whether it holds any
    num_examples: int | None  # None: it says none, or nonsense
    metrics: frozenset[str] = frozenset()  # besides the number of examples
    unknown: tuple[str, ...] = ()  # parts that no reply of fedsys has
    spent: Spent | None = None  # all the client says it has released; None: it says nothing
    entered: Spent | None = None  # the same by its ledger; None: the reply is not entered there
    clipping_norm: float | None = None  # by its ledger


def _names(value: Any) -> bool:
    return value == "any" or all(re.fullmatch(r"\w+(\.\w+)*", name) for name in value)


def _or_null(value: Any, largest: float = math.inf) -> bool:
    return value is None or 0 < value < largest


_RANGES: strict.Ranges = {
    "code": (
        lambda value: all(re.fullmatch(r"[0-9a-f]{64}", name) for name in value),
        "is a list of the SHA-256 of bundles, 64 digits from 0 to f each",
    ),
    "strategies": (_names, "is any, or a list of class names"),
    "adapters": (_names, "is any, or a list of class names"),
    "max_epsilon": (_or_null, "must be above 0 and finite, or null"),
    "max_delta": (lambda value: _or_null(value, 1.0), "must be in (0, 1), or null"),
    "max_clipping_norm": (_or_null, "must be above 0 and finite, or null"),
    "max_bytes": (lambda value: value >= 1, "must be at least 1"),
    "min_examples": (lambda value: value >= 1, "must be at least 1"),
    "max_rounds": (lambda value: value is None or value >= 1, "must be at least 1, or null"),
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What may run on a device, and what may leave it."""

    code: tuple[str, ...]  # SHA-256 of the bundles that may run
    strategies: Names  # class names; those of other packages in full
    adapters: Names
    privacy: Level  # the least that is required
    max_epsilon: float | None  # None where no privacy is required
    max_delta: float | None
    max_clipping_norm: float | None
    max_bytes: int  # of one reply
    min_examples: int
    evaluate: bool  # whether metrics on the device's rows may leave it
    max_rounds: int | None

    def __post_init__(self) -> None:
        """Check ranges; raises ``PolicyError`` with all problems."""
        problems = strict.out_of_range(vars(self), _RANGES)
        if self.privacy not in LEVELS:
            problems.append(f"privacy must be one of {', '.join(LEVELS)}")
        elif self.privacy != "none":
            problems += [
                f"{name} must be given where privacy={self.privacy}"
                for name in ("max_epsilon", "max_delta", "max_clipping_norm")
                if getattr(self, name) is None
            ]
            if self.evaluate:
                problems.append(
                    f"evaluate=true with privacy={self.privacy}: metrics on the device's rows have"
                    " no noise, and would leave it"
                )
        if problems:
            raise PolicyError(problems)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the policy in a file; raises ``PolicyError`` with everything that is wrong."""
        return strict.load(path, cls, _RANGES, PolicyError)

    # ---- of a run, before any of its code is unpacked

    def of_run(
        self, code_hash: str, settings: Mapping[str, Any], bundled: Collection[str] = ()
    ) -> list[str]:
        """Return why a run may not be taken part in.

        ``settings`` is its composed configuration; ``bundled`` are the top-level modules that its
        bundle holds, by whose hash they are allowed.
        """
        reasons = self.of_code(code_hash)
        reasons += self._of_modules(settings.get("allow"), bundled)
        reasons += _of_class("strategy", settings, self.strategies)
        reasons += _of_class("adapter", settings, self.adapters)
        if not self.evaluate and _section(settings, "evaluate").get("clients") is not False:
            reasons.append("evaluate.clients must be false: metrics on own rows may not leave")
        rounds = settings.get("rounds")
        if self.max_rounds is not None and not _number(rounds, self.max_rounds):
            reasons.append(f"rounds is {_shown(rounds)}, at most {self.max_rounds}")
        if self.privacy != "none":
            reasons += self._of_promise(settings)
        return reasons

    def _of_modules(self, allow: Any, bundled: Collection[str]) -> list[str]:
        """Return why modules of a server's choice may not be imported."""
        if allow is None:
            return []
        if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
            return ["allow must be a list of modules"]
        named = [n for n in (self.strategies, self.adapters) if n != "any"]
        known = {*bundled, *(name.partition(".")[0] for n in named for name in n if "." in name)}
        odd = [name for name in allow if name.partition(".")[0] not in known]
        return [f"module {_shown(name)} is neither in the bundle nor allowed" for name in odd]

    def of_code(self, code_hash: str) -> list[str]:
        """Return why a bundle may not run."""
        if code_hash in self.code:
            return []
        return [f"the code {_shown(code_hash)[:16]} is not among those allowed"]

    def of_message(self, kind: str) -> list[str]:
        """Return why a message of type ``kind`` may not be answered at all."""
        if kind.partition(".")[0] in ("train", "query"):
            return []
        if kind.partition(".")[0] == "evaluate" and self.evaluate:
            return []
        return [f"messages of type {_shown(kind)} may not be answered"]

    def _of_promise(self, settings: Mapping[str, Any]) -> list[str]:
        promised = level_of(settings)
        if LEVELS.index(promised) < LEVELS.index(self.privacy):
            return [f"privacy is {promised}, and {self.privacy} is required"]
        privacy = _section(settings, "privacy")
        reasons = self._of_budget(privacy)
        if privacy.get("reproducible") is not False:
            reasons.append("privacy.reproducible must be false: who knows the seed sees the rows")
        start = _section(settings, "adapter").get("init")
        if (
            privacy.get("allow_unprotected_initialisation", False) is not False
            or start not in _QUIET_STARTS
        ):
            reasons.append(f"adapter.init is {_shown(start)}: sums of gradients without noise")
        return reasons

    def _of_budget(self, privacy: Mapping[str, Any]) -> list[str]:
        reasons = []
        target, noise = privacy.get("epsilon"), privacy.get("noise_multiplier")
        if target is None:  # judged by what is spent
            if not _number(noise, MOST_NOISE, above=NO_NOISE):
                reasons.append(f"privacy.noise_multiplier is {_shown(noise)}: that is no noise")
        elif not _number(target, self.max_epsilon):
            reasons.append(f"privacy.epsilon is {_shown(target)}, at most {self.max_epsilon:g}")
        delta = privacy.get("delta")
        if delta is not None and not _number(delta, self.max_delta):
            reasons.append(f"privacy.delta is {_shown(delta)}, at most {self.max_delta:g}")
        norm, limit = privacy.get("clipping_norm"), self.max_clipping_norm
        if not _number(norm, limit):
            reasons.append(f"privacy.clipping_norm is {_shown(norm)}, at most {limit:g}")
        if privacy.get("quantile") is not None:
            reasons.append("privacy.quantile must be null: clipping_norm would follow the updates")
        return reasons

    # ---- of a reply, before any of its bytes is sent

    def of_reply(self, facts: Facts) -> list[str]:
        """Return why a reply may not leave."""
        reasons = self.of_message(facts.kind)
        if facts.size > self.max_bytes:
            reasons.append(f"the reply has {facts.size} bytes, at most {self.max_bytes}")
        answers = facts.kind.partition(".")[0]
        if facts.arrays or answers == "evaluate" or facts.num_examples is not None:
            count = facts.num_examples
            if count is None or count < self.min_examples:
                # Not how many: it may be what the operator wants to hide.
                reasons.append(f"fewer than {self.min_examples} examples")
        if facts.unknown:
            reasons.append(f"the reply holds what no reply should: {facts.unknown[0]:.40}")
        if self.privacy != "none":
            reasons += self._of_spending(facts)
        return reasons

    def _of_spending(self, facts: Facts) -> list[str]:
        if LEVELS.index(facts.level) < LEVELS.index(self.privacy):
            return [f"privacy is {facts.level}, and {self.privacy} is required"]
        answers = facts.kind.partition(".")[0]
        reasons = []
        if facts.arrays and answers != "train":
            reasons.append(f"arrays leave in answer to train only, not to {answers}")
        if facts.level != "sample":
            return reasons
        if odd := sorted(facts.metrics - (set(_PUBLIC) if answers == "query" else set())):
            reasons.append(f"metric {odd[0]:.40} has no noise")
        if not facts.arrays:
            return reasons
        if facts.spent is None or facts.entered is None:
            return [*reasons, "the reply is not entered in the privacy ledger of this device"]
        if not _number(facts.clipping_norm, self.max_clipping_norm):
            reasons.append("it was clipped by more than max_clipping_norm")
        if not all(self.affords(spent) for spent in (facts.spent, facts.entered)):
            reasons.append(f"more than epsilon {self.max_epsilon:g} would have been spent")
        return reasons

    def affords(self, spent: Spent) -> bool:
        """Whether a client may have released ``spent``, where privacy is required."""
        limit, delta = self.max_epsilon or 0.0, self.max_delta or 0.0
        try:  # the bound is quick; the tight figure is for those near their end
            return bool(upper_bound(spent, delta) <= limit or epsilon(spent, delta) <= limit)
        except (ValueError, ArithmeticError):
            return False


def level_of(settings: Mapping[str, Any]) -> Level:
    """Return what a run promises; a class that is not known promises nothing."""
    return _PROMISES.get(str(_section(settings, "privacy").get("_target_")), "none")


def _of_class(group: str, settings: Mapping[str, Any], allowed: Names) -> list[str]:
    target = _section(settings, group).get("_target_")
    if not isinstance(target, str):
        return [f"{group} names no class"]
    package, _, _ = target.partition(".")
    name = target.rpartition(".")[2]
    known = {target} | ({name} if package in _OURS else set())
    if allowed == "any" or known & set(allowed):
        return []
    return [f"{group} {_shown(name)} is not among those allowed"]


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any, largest: float | None, above: float = 0.0) -> bool:
    """Return whether ``value`` is a number in (above, largest]; not where there is no largest."""
    if largest is None or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return above < value <= largest


def _shown(value: Any) -> str:
    """Return a value of the server's as a word of a reason."""
    return re.sub(r"[^\w .,+-]", "?", str(value))[:40] if value is not None else "null"
