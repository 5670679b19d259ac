"""The privacy that a run spends: epsilon, what it is an epsilon of, and a server's part in it.

Clients that protect their rows say themselves what they have spent (``clients.guard``). A server
that protects its clients adds the noise, and enters in its ledger whom a round has cost what.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from fedsys.errors import LedgerError, RunError
from fedsys.params import Params, add
from fedsys.privacy.accounting import Figures, check, largest
from fedsys.privacy.canary_clients import CanaryClients
from fedsys.privacy.client_level import ClientPrivacy, clipped_sum
from fedsys.privacy.ledger import Ledger, NewEntry
from fedsys.privacy.noise import Stream, stream
from fedsys.privacy.release import Release, Spent, Statement, Unit, merged
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
            "keep secret": "partition.json, partition.png, ledger/: counts, hashes of rows",
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
        ledger = self.ledger
        entries = [
            NewEntry(
                run=self.run,
                round=charge.round,
                client=_name(charge.client),
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
        # Noise from a seed is the same again where a round is done again: that release is entered.
        again = self.privacy.reproducible
        ledger.append([e for e in entries if not (again and _entered(ledger, e))])

    def known(self, spent: Mapping[int, Spent]) -> Mapping[int, Spent]:
        """Return the spending of the clients of ``spent`` as the ledger has it.

        It is more where an earlier run has used the ledger, or where a round was done again since
        its checkpoint was lost with the process.
        """
        if self.ledger is None:
            return spent
        everyone = self.ledger.spent(_name(EVERYONE))
        own = {client: self.ledger.spent(_name(client)) for client in spent if client != EVERYONE}
        known = {client: merged((*everyone, *releases)) for client, releases in own.items()}
        return {**known, EVERYONE: everyone} if EVERYONE in spent else known

    def open(self, ledger: Ledger, amplified: bool) -> None:
        """Enter charges in ``ledger`` from now on.

        Raises ``LedgerError`` where it charges clients one by one, and this run all of them
        together: nobody could say what the one who has spent most has spent.
        """
        others = ledger.clients - {_name(EVERYONE)}
        if amplified and others:
            raise LedgerError(
                f"{ledger.path} charges clients one by one, and privacy=client with Poisson"
                " participation charges everyone; set another privacy.ledger"
            )
        self.ledger = ledger


def _entered(ledger: Ledger, entry: NewEntry) -> bool:
    return ledger.find(entry.run, entry.round, entry.client, entry.reply)


def _name(client: int) -> str:
    return "everyone" if client == EVERYONE else str(client)


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

    def epsilon(self, spent: Mapping[int, Spent]) -> float:
        """Return the largest epsilon of the clients of ``spent``, by the ledger once it is open."""
        return super().epsilon(self.enter.known(spent))

    def figures(self, spent: Mapping[int, Spent]) -> Figures | None:
        """Return the figures of three accountants for whoever of them has spent most."""
        return super().figures(self.enter.known(spent))

    def admitted(self, cohort: Mapping[int, int], spent: Mapping[int, Spent]) -> dict[int, int]:
        """Return who of {client: node} can pay for one more round.

        Raises ``RunError`` when no client of the federation can.
        """
        step = self._step
        if not self.amplified:
            own = self.enter.known({client: spent.get(client, ()) for client in cohort})
            # Many have spent the same, which is looked at once.
            able = {s for s in set(own.values()) if self.privacy.affords(s, step, self.delta)}
            return {client: node for client, node in cohort.items() if own[client] in able}
        everyone = self.enter.known({EVERYONE: spent.get(EVERYONE, ())})[EVERYONE]
        if not self.privacy.affords(everyone, step, self.delta):
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
        noise = self._noise(round)
        multiplier = self.planned.noise_multiplier
        if self.canaries is not None:
            updates = chain(updates, self.canaries.updates(params, round))
        direction, memory = self.privacy.merge(
            updates, params, memory, self.expected_cohort, multiplier, noise
        )
        return direction, memory, self._charged(asked, round, noise)

    def release(
        self, total: Params, bound: float, asked: Iterable[int], round: int
    ) -> tuple[Params, dict[int, Release]]:
        """Return the noised direction of a sum, as ``merge`` does, and what the round cost whom.

        No client has moved ``total`` by more than ``bound``, which is at least clipping_norm.
        """
        noise = self._noise(round)
        if self.canaries is not None:
            planted, _ = clipped_sum(self.canaries.updates(total, round), total, bound, cell=0.0)
            total = add(total, planted)
        direction = self.privacy.release(
            total, bound, self.expected_cohort, self.planned.noise_multiplier, noise
        )
        return direction, self._charged(asked, round, noise)

    def releases(self, asked: Collection[int]) -> bool:
        """Whether a round with ``asked`` has anything to hide: who took part, or what they sent."""
        return self.amplified or bool(asked)

    def _noise(self, round: int) -> Stream:
        return stream(self.seed if self.reproducible else None, "client privacy", round)

    def _charged(self, asked: Iterable[int], round: int, noise: Stream) -> dict[int, Release]:
        """Return what a round with this ``noise`` costs whom, which is then in the ledger."""
        costs = dict.fromkeys([EVERYONE] if self.amplified else asked, self._step)
        self.enter([Charge(n, round, cost, f"{noise.id}/{n}") for n, cost in costs.items()])
        return costs

    @property
    def hides_cohorts(self) -> bool:
        """Whether the epsilon needs that nobody can tell who took part in a round."""
        return self.amplified and not self.reproducible

    def facts(self) -> dict[str, str]:
        """Return what has to be said beside every epsilon."""
        if not self.amplified:
            return super().facts()
        secret = "the run folder but for adapter/: it tells who took part"
        return {**super().facts(), "keep secret": secret}

    @property
    def _step(self) -> Release:
        return replace(self.planned, steps=1)
