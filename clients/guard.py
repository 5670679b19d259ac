"""What stands between a client's private training and the wire: its budget, ledger and replies.

charge   how much noise this client's steps take, and whether it can pay for the round
known    the reply of this very round that was stored before, to be sent again as it is
keep     store the replies, enter them in the ledger; only then may they be sent
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache

from clients.private import Private
from clients.replies import ReplyStore, key_of
from clients.training import LocalTraining
from fedsys.params import Params, digest
from fedsys.privacy.ledger import Ledger, NewEntry, afford
from fedsys.privacy.noise import Stream, stream
from fedsys.privacy.release import Release, Spent, merged
from fedsys.privacy.sample_level import SamplePrivacy

log = logging.getLogger(__name__)

Start = tuple[str, str]  # the digests of x_t and of what is frozen


@dataclass(frozen=True)
class Owner:
    """Whose rows they are."""

    name: str  # under which everything the client ever releases is added up
    data: str  # the data set's name
    fingerprint: Callable[[], str]  # of the client's rows
    num_examples: int


@dataclass(frozen=True)
class Answer:
    """A private reply about to be sent: arrays, metrics, and what it cost."""

    arrays: Params
    metrics: dict[str, float]
    stream: str  # id of its noise
    spent: Spent  # all that the client has released, with this

    @property
    def digest(self) -> str:
        """The SHA-256 of the arrays."""
        return digest(self.arrays)


@dataclass(frozen=True)
class Charge:
    """What one client's answer to one round will cost."""

    client: int
    owner: Owner
    round: int
    key: str  # of what the answer depends on
    mechanism: str
    release: Release
    stream: Stream


@dataclass
class Guard:
    """Keeps the promise of ``privacy`` for the clients of a process."""

    privacy: SamplePrivacy
    ledger: Ledger
    replies: ReplyStore
    run: str  # the run's id
    delta: float
    rounds: int  # of the run
    seed: int
    initial_rows: int | None = 0  # of a client in the gradient phase; None: all, 0: no such phase
    _plans: Callable[[int, int, int], Release] = field(init=False, repr=False)
    _latest: int = field(default=0, init=False, repr=False)  # round with a reply

    def __post_init__(self) -> None:
        """Plan the noise of clients of equal size once."""
        self._plans = lru_cache(maxsize=None)(self._plan)

    def charge(
        self, client: int, owner: Owner, training: LocalTraining, round: int, start: Start
    ) -> Charge:
        """Return the charge of a round of ``training`` from ``start``.

        Raises ``PrivacyBudgetExceeded`` when the client cannot pay for it.
        """
        steps = training.num_steps(owner.num_examples)
        plan = self._plans(owner.num_examples, training.batch_size, steps)
        release = Release(plan.noise_multiplier, plan.sample_rate, steps)
        return self._charged(client, owner, round, start, "dp-sgd", release)

    def initial_charge(self, client: int, owner: Owner, start: Start) -> Charge:
        """Return the charge of the noised sum of gradients before round 1."""
        (release,) = self._initial(owner.num_examples)
        return self._charged(client, owner, 0, start, "initialisation", release)

    def private(self, charge: Charge) -> Private:
        """Return what the training of ``charge`` needs."""
        release, rows = charge.release, charge.owner.num_examples
        return Private(
            self.privacy.clipping_norm,
            release.noise_multiplier,
            release.sample_rate,
            release.sample_rate * rows,
            charge.stream,
        )

    def known(self, charge: Charge) -> Answer | None:
        """Return the answer that was stored for ``charge``, entered in the ledger if need be."""
        found = self.replies.get(charge.client, charge.round, charge.key)
        if found is None:
            return None
        arrays, said = found
        spent = merged(Release(*release) for release in said["spent"])
        answer = Answer(arrays, said["metrics"], said["stream"], spent)
        entry = self._entry(charge, answer)
        if not self._entered(entry):
            # What was noted then may be less than what other runs have spent since.
            answer = replace(answer, spent=self._with(charge))
            self.ledger.append([entry])
        return answer

    def answer(self, charge: Charge, arrays: Params, metrics: dict[str, float]) -> Answer:
        """Return the answer to ``charge``, which is not yet kept."""
        return Answer(arrays, metrics, charge.stream.id, self._with(charge))

    @contextmanager
    def silent(self, charges: Sequence[Charge], alone: bool) -> Iterator[None]:
        """Let nothing but the fact of a failure leave the block, and that not unpaid.

        What went wrong may tell of the rows. Of several clients, unless one is asked ``alone``, it
        is not known whose failure it is: nothing has left them then, and they are asked one by one.
        """
        try:
            yield
        except Exception as error:
            log.exception("private training failed")
            if alone:
                (charge,) = charges
                self.ledger.append([self._entry(charge, Answer({}, {}, charge.stream.id, ()))])
            raise RuntimeError("the client failed, and does not say why") from error

    def keep(self, charges: Sequence[Charge], answers: Sequence[Answer]) -> None:
        """Store ``answers`` and enter what they cost; nothing may leave when this raises."""
        for charge, answer in zip(charges, answers, strict=True):
            self._latest = charge.round
            spent = [astuple(release) for release in answer.spent]
            said = {"metrics": answer.metrics, "stream": answer.stream, "spent": spent}
            self.replies.put(charge.client, charge.round, charge.key, answer.arrays, said)
        entries = [self._entry(*pair) for pair in zip(charges, answers, strict=True)]
        # The very same reply, made again from a seed after a crash, has been paid for; one that
        # other noise happened to lead to has not.
        again = self.privacy.reproducible
        self.ledger.append([e for e in entries if not (again and self._entered(e))])

    def prune(self, checkpoints: Sequence[int]) -> None:
        """Drop replies that a server with these checkpoints will never ask for again."""
        if not checkpoints:  # it keeps none, and never goes back
            self.replies.prune(None, self._latest)
            return
        oldest = min(checkpoints)
        # Round 0 is no checkpoint: the run may begin again, with its initialisation.
        self.replies.prune(None, oldest + 1 if oldest else 0)

    def spent(self, owner: Owner) -> Spent:
        """Return all that the client has released, to be said with a sum that has no noise.

        Raises ``ValueError`` where such a sum may not leave the client, whoever asks for it.
        """
        if not self.privacy.allow_unprotected_initialisation:
            raise ValueError(
                "this client's rows are private: it sends no gradients without noise; see"
                " privacy.allow_unprotected_initialisation"
            )
        return self.ledger.spent(owner.name)

    def _charged(
        self,
        client: int,
        owner: Owner,
        round: int,
        start: Start,
        mechanism: str,
        release: Release,
    ) -> Charge:
        key = key_of(self.run, round, *start)
        seed = self.seed if self.privacy.reproducible else None
        noise = stream(seed, mechanism, round, client)
        charge = Charge(client, owner, round, key, mechanism, release, noise)
        if not self._paid(charge):
            target = self.privacy.epsilon
            afford(owner.name, self.ledger.spent(owner.name), [release], target, self.delta)
        return charge

    def _plan(self, num_examples: int, lot: int, steps: int) -> Release:
        rounds = self.privacy.rounds or self.rounds
        rate = min(1.0, lot / num_examples)
        before = self._initial(num_examples)
        return self.privacy.plan(rate, rounds * steps, self.delta, before)

    def _initial(self, num_examples: int) -> Spent:
        if self.initial_rows == 0:
            return ()
        rows = num_examples if self.initial_rows is None else self.initial_rows
        return (self.privacy.initial(min(1.0, rows / num_examples), self.delta),)

    def _with(self, charge: Charge) -> Spent:
        """Return all that the client will have released with ``charge``."""
        return merged((*self.ledger.spent(charge.owner.name), charge.release))

    def _paid(self, charge: Charge) -> bool:
        """Whether the answer to ``charge`` is stored and entered: it may leave once more."""
        found = self.replies.get(charge.client, charge.round, charge.key)
        if found is None:
            return False
        # One that a kill left unentered is not paid for: another run may have spent the budget.
        return self.ledger.find(self.run, charge.round, charge.owner.name, digest(found[0]))

    def _entered(self, entry: NewEntry) -> bool:
        return self.ledger.find(entry.run, entry.round, entry.client, entry.reply)

    def _entry(self, charge: Charge, answer: Answer) -> NewEntry:
        owner = charge.owner
        return NewEntry(
            run=self.run,
            round=charge.round,
            client=owner.name,
            data=owner.data,
            fingerprint=owner.fingerprint(),
            num_examples=owner.num_examples,
            mechanism=charge.mechanism,
            release=charge.release,
            clipping_norm=self.privacy.clipping_norm,
            target=self.privacy.epsilon,
            delta=self.delta,
            stream=answer.stream if charge.release.noise_multiplier else "",
            reply=answer.digest,
        )
