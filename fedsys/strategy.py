"""The base of every strategy: Flower's Strategy done once, with pure hooks for a paper.

    d, s       = combine({Delta_n : n in S_t}, s)      how the cohort is merged
    x_{t+1}, s = step(x_t, d, s)                       the server optimizer

The defaults are FedAvg (McMahan et al. 2017, https://arxiv.org/abs/1602.05629, Algorithm 1). A
paper overrides ``init``, ``combine``, ``step`` and, for what it changes at the client,
``local_gradient``. State goes in and comes out as a tree of tensors, so a checkpoint is complete.
"""

import gc
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor, nn

from fedsys import messages, rounds
from fedsys.attacks import Attack
from fedsys.codec import Codec
from fedsys.defences import Defence
from fedsys.params import Layout, Params, add, weighted_mean
from fedsys.participation import Participation, Uniform
from fedsys.privacy.account import Account
from fedsys.records import EvaluateFn, NoRecorder, Recorder
from fedsys.rounds import Ask, Round
from fedsys.secagg import SecureAggregation
from fedsys.session import Session
from fedsys.snapshot import State
from fedsys.update import Update

log = logging.getLogger(__name__)

TIMEOUT = 3600.0  # seconds to wait for the replies of a round, as in Flower


@dataclass(kw_only=True)
class Strategy(FlowerStrategy):
    """Federated averaging, and the machinery every other strategy shares.

    The hyperparameters of a paper come first in its class; the fields below belong to the run.
    """

    needs_uniform = ""  # why ``weighting`` must be 'uniform', in a paper where it must

    server_lr: float = 1.0  # eta
    weighting: Literal["examples", "uniform"] = "examples"

    participation: Participation = field(default_factory=Uniform)
    seed: int = 0
    fraction_evaluate: float = 1.0  # of the clients, for evaluation on their own data
    min_clients: int = 1  # connected before a round may start
    patience: float = 600.0  # seconds to wait for them
    seats: int = 0  # clients there are, each known by its partition; 0: numbered as they come
    on_client_error: Literal["skip", "fail"] = "skip"
    layout: Layout | None = None  # how arrays are packed; None: named arrays, as any app sends them
    compression: Codec | None = None  # of what clients send, with its error feedback
    attack: Attack | None = None
    defence: Defence | None = None
    account: Account | None = None  # of the privacy that is spent
    secagg: SecureAggregation | None = None  # so that the server sees sums of updates only
    # How often each client takes part, (N,), where that is known.
    rates: Tensor | None = field(default=None, compare=False)

    _session: Session | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        if not 0 < self.server_lr < math.inf:
            raise ValueError(f"server_lr must be positive, got {self.server_lr}")
        if self.weighting not in ("examples", "uniform"):
            raise ValueError(f"weighting is 'examples' or 'uniform', got {self.weighting!r}")
        if self.needs_uniform and self.weighting != "uniform":
            name, why = type(self).__name__, self.needs_uniform
            raise ValueError(f"weighting must be 'uniform' in {name}, got 'examples': {why}")
        if self.secagg is not None and self.weighting != "uniform":
            raise ValueError("weighting must be 'uniform' with secagg: a sum has equal weights")
        if not 0 <= self.fraction_evaluate <= 1:
            raise ValueError(f"fraction_evaluate must be in [0, 1], got {self.fraction_evaluate}")
        if self.min_clients < 1:
            raise ValueError(f"min_clients must be at least 1, got {self.min_clients}")
        if self.on_client_error not in ("skip", "fail"):
            raise ValueError(f"on_client_error is 'skip' or 'fail', got {self.on_client_error!r}")

    # ---- what a paper overrides

    def bind(self, model: nn.Module) -> Self:
        """Return the strategy with what it must know of ``model``, adapters attached."""
        return self

    def init(self, params: Params, num_clients: int) -> State:
        """Return the strategy's state before the first round."""
        return ()

    def combine(self, updates: Iterable[Update], state: State) -> tuple[Params, State]:
        """Merge the updates, which arrive one by one in order of clients, into one direction."""
        return weighted_mean((self.weight(u), u.delta) for u in updates), state

    def step(self, params: Params, direction: Params, state: State) -> tuple[Params, State]:
        """Return the next global params; not called in a round without a direction."""
        return add(params, direction, self.server_lr), state

    def resize(self, state: State, num_clients: int) -> State:
        """Return the state for as many clients, as it is if there are no more than before.

        Clients that join later have the highest numbers.
        """
        return state

    def codec(self, initial: Params) -> Codec | None:
        """Return how x_t and the updates travel where that is not as they are; x_0 is given."""
        return self.compression

    def base(self) -> Params:
        """Return W_0 of the frozen layers that ``moves`` will move, or {}."""
        return {}

    def moves(self, direction: Params) -> Params:
        """Return factors ``layer.B.weight`` and ``layer.A.weight`` by which W += B A, or {}."""
        return {}

    def local_gradient(self, params: Params, start: Params) -> Params:
        """Return what is added to a client's gradient at ``params``; {} for nothing.

        ``params`` (K, *shape) holds a cohort of K clients, ``start`` (*shape) is x_t.
        """
        return {}

    def prepare(self, params: Params, ask: Ask) -> tuple[Params, Params]:
        """Return x_0 and the frozen factors that all clients share; runs before round 1.

        ``ask(action, shapes)`` sends ``train.<action>`` to a cohort and yields (client, arrays).
        """
        return params, {}

    @property
    def sends_factors(self) -> bool:
        """Whether a client gets the frozen factors at first contact, or derives them itself."""
        return True

    def train_config(self) -> dict[str, float]:
        """Return what every train message tells the client besides the round."""
        return {}

    def weight(self, update: Update) -> float:
        """Return an update's weight, up to a common factor."""
        return float(update.num_examples) if self.weighting == "examples" else 1.0

    # ---- Flower's methods, over the hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Draw the cohort of the round and address one message to each of its clients."""
        session = self._session
        if session is None or server_round <= session.now.round:  # somebody else's loop begins
            session = self._session = Session(self, grid, arrays, TIMEOUT, NoRecorder())
            session.prepare()
        session.take_over(arrays)
        current = session.open(server_round)
        settings = ConfigRecord({**config, **self.train_config(), messages.ROUND: server_round})
        return current.address("train", session.outgoing(settings))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, combine and step; (None, None) when no update could be used."""
        session = self._under_way()
        now, current = session.now, session.round
        direction = session.direction(replies)
        session.close(server_round)
        if not direction:
            return None, None
        params, now.state = self.step(now.params, direction, now.state)
        session.adopt(params, self.moves(direction))
        return session.arrays, current.train_metrics()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask ``fraction_evaluate`` of all clients to evaluate x_t on their own data."""
        session = self._under_way()
        asked = session.invitations.sample(self.fraction_evaluate, server_round)
        session.evaluation = Round(server_round, asked, arrays)
        if not asked:
            return []
        settings = ConfigRecord({**config, messages.ROUND: server_round})
        return session.evaluation.address("evaluate", session.contents(asked, arrays, settings))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the clients' metrics, averaged by examples, and accuracy's worst decile."""
        session = self._under_way()
        metrics = list(session.evaluation.metrics(replies, session.excluded))
        session.evaluation.close(session.excluded)
        return rounds.summarise(metrics)

    def summary(self) -> None:
        """Log the hyperparameters."""
        log.info("%s", self)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = TIMEOUT,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> Result:
        """Run rounds 1 to ``num_rounds``, or on from the recorder's last checkpoint.

        Takes Flower's arguments and returns Flower's result. Raises ``RunError`` when too few
        clients are connected or every client of a round failed, ``ClientFailure`` when one did
        and ``on_client_error`` is "fail".
        """
        self.summary()
        result = Result()
        session = Session(self, grid, initial_arrays, timeout, recorder or NoRecorder())
        self._session = session
        if not session.restore():
            session.prepare()
            session.evaluate(0, evaluate_fn, result)
        configs = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        gc.collect()
        gc.freeze()  # the model and the libraries stay: no collection need walk them in mid-round
        try:
            for server_round in range(session.now.round + 1, num_rounds + 1):
                session.run_round(server_round, num_rounds, configs, evaluate_fn, result)
        finally:
            gc.unfreeze()
        result.arrays = session.arrays
        return result

    def _under_way(self) -> Session:
        if self._session is None:
            raise RuntimeError("configure_train begins a run and comes first")
        return self._session
