"""The errors that somebody catches; everything else is a ValueError or TypeError."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """The configuration cannot be run; ``problems`` lists every reason, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(
            "the configuration has problems:\n" + "\n".join(f"  - {line}" for line in self.problems)
        )


class DataError(ValueError):
    """A data file is missing or malformed; the message names file, line and what was expected."""


class ClientFailure(RuntimeError):
    """A client's reply cannot be used; the message names the client and the reason."""

    def __init__(self, client: int, reason: str) -> None:
        self.client = client
        self.reason = reason
        super().__init__(f"client {client}: {reason}")

    @property
    def spent(self) -> bool:
        """Whether the client has refused because its privacy budget is spent."""
        return self.reason.startswith("PrivacyBudgetExceeded")


class RunError(RuntimeError):
    """A run cannot go on; the message says why and what to do."""


class Busy(RunError):
    """Another process holds what is needed; the message says what."""


class LedgerError(RunError):
    """The privacy ledger cannot be read, written or believed; the message says where and why."""


class PrivacyBudgetExceeded(Exception):
    """A client refuses to train, since it would spend more than its budget."""

    def __init__(self, client: str, epsilon: float, target: float) -> None:
        self.client = client
        self.epsilon = epsilon
        self.target = target
        super().__init__(
            f"client {client} would have spent epsilon {epsilon:.6g}, above its target {target:.6g}"
        )
