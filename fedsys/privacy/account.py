"""The privacy that a run spends: epsilon, what it is an epsilon of, and a server's part in it.

Clients that protect their rows say themselves what they have spent (``clients.guard``). A server
that protects its clients adds the noise, and enters in its ledger whom a round has cost what.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from fedsys.errors import LedgerError, RunError
from fedsys.params import Params
from fedsys.privacy.accounting import Figures, check, largest
from fedsys.privacy.canary_clients import CanaryClients
from fedsys.privacy.client_level import ClientPrivacy
from fedsys.privacy.ledger import Ledger, NewEntry
from fedsys.privacy.noise import stream
from fedsys.privacy.release import Release, Spent, Statement, Unit
from fedsys.update import Update


@dataclass(frozen=True)
class Account:
    """The largest epsilon of all clients, at one delta."""

    statement: Statement
    reproducible: bool = False  # the noise follows from the seed: a test, and no protection

    @property
    def unit(self) -> Unit:
        """What is protected: a record, or a client with all its records."""
        return self.statement.unit

    @property
    def delta(self) -> float:
        """The delta of every epsilon shown."""
        return self.statement.delta

    def start(self) -> Params:
        """Return what the server's protection remembers before round 1."""
        return {}

    def epsilon(self, spent: Mapping[int, Spent]) -> float:
        """Return the federation's epsilon: clients hold different records, so the largest."""
        return largest(spent, self.delta)[0]

    def figures(self, spent: Mapping[int, Spent]) -> Figures | None:
        """Return the figures of three accountants for the client that has spent most.

        Raises ``AccountingError`` when they disagree by more than they can.
        """
        _, client = largest(spent, self.delta)
        return None if client is None else check(spent[client], self.delta)

    def facts(self) -> dict[str, str]:
        """Return what has to be said beside every epsilon."""
        noise = "from the seed: a test, which protects nobody" if self.reproducible else "secure"
        said = self.statement
        return {
            "protected": f"one {said.unit}: {said.adjacency}",
            "amplification": f"{said.sampling} sampling" if said.sampling == "Poisson" else "none",
            "accountant": said.accountant,
            "delta": f"{said.delta:.3g}",
            "initialisation": said.initialisation,
            "noise": noise,
        }


EVERYONE = -1  # whom a round costs where each client takes part by a coin of its own


@dataclass(frozen=True)
class Charge:
    """What a round of the server cost a client."""

    client: int
    round: int
    release: Release
    stream: str  # id of the noise, the same for all clients of a round


@dataclass
class ServerBook:
    """Enters the charges of a server's rounds in its ledger, once that is open."""

    privacy: ClientPrivacy
    delta: float
    data: str  # the data set's name
    num_clients: int
    run: str = ""
    ledger: Ledger | None = None

    def __call__(self, charges: Sequence[Charge]) -> None:
        """Enter ``charges``; raises ``LedgerError`` when that cannot be done."""
        if self.ledger is None:
            raise LedgerError("a round of a private server cannot be entered: no ledger is open")
        self.ledger.append(
            [
                NewEntry(
                    run=self.run,
                    round=charge.round,
                    client="everyone" if charge.client == EVERYONE else str(charge.client),
                    data=self.data,
                    fingerprint="",
                    num_examples=self.num_clients,
                    mechanism="client",
                    release=charge.release,
                    clipping_norm=self.privacy.clipping_norm,
                    target=self.privacy.epsilon,
                    delta=self.delta,
                    stream=charge.stream if charge.release.noise_multiplier else "",
                )
                for charge in charges
            ]
        )


@dataclass(frozen=True)
class ClientAccount(Account):
    """The account of a server that protects clients, and the noise it adds to every round."""

    privacy: ClientPrivacy = field(kw_only=True)
    planned: Release = field(kw_only=True)  # what a client will have released in the end
    expected_cohort: float = field(kw_only=True)  # m, canaries included
    amplified: bool = field(kw_only=True)  # nobody knows who took part
    seed: int = field(kw_only=True)
    enter: ServerBook = field(kw_only=True, compare=False)
    canaries: CanaryClients | None = field(kw_only=True, default=None)

    def start(self) -> Params:
        """Return the clipping norm, where it adapts."""
        return self.privacy.start()

    def admitted(self, cohort: Mapping[int, int], spent: Mapping[int, Spent]) -> dict[int, int]:
        """Return who of {client: node} can pay for one more round.

        Raises ``RunError`` when no client of the federation can.
        """
        step = self._step
        if not self.amplified:
            # Many have spent the same, which is looked at once.
            every = {spent.get(client, ()) for client in cohort}
            able = {own for own in every if self.privacy.affords(own, step, self.delta)}
            return {c: node for c, node in cohort.items() if spent.get(c, ()) in able}
        if not self.privacy.affords(spent.get(EVERYONE, ()), step, self.delta):
            raise RunError(f"the budget of privacy.epsilon={self.privacy.epsilon} is spent")
        return dict(cohort)

    def merge(
        self,
        updates: Iterable[Update],
        params: Params,
        memory: Params,
        asked: Iterable[int],
        round: int,
    ) -> tuple[Params, Params, dict[int, Release]]:
        """Return the noised direction, the next memory, and what the round cost whom.

        All of it is in the ledger when this returns.
        """
        noise = stream(self.seed if self.reproducible else None, "client privacy", round)
        multiplier = self.planned.noise_multiplier
        if self.canaries is not None:
            updates = chain(updates, self.canaries.updates(params, round))
        direction, memory = self.privacy.merge(
            updates, params, memory, self.expected_cohort, multiplier, noise
        )
        costs = dict.fromkeys([EVERYONE] if self.amplified else asked, self._step)
        self.enter([Charge(n, round, cost, f"{noise.id}/{n}") for n, cost in costs.items()])
        return direction, memory, costs

    @property
    def _step(self) -> Release:
        return replace(self.planned, steps=1)
