"""What keeps an experiment's privacy: the account it is shown by, and the ledgers it is kept in."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from clients.guard import Guard
from clients.replies import DiskReplies, MemoryReplies
from fedsys.compose import TARGET, option
from fedsys.config import Experiment
from fedsys.data import Shards
from fedsys.errors import ConfigError
from fedsys.participation import Participation
from fedsys.privacy.account import Account, ClientAccount, ServerBook
from fedsys.privacy.canary_clients import CanaryClients
from fedsys.privacy.client_level import ClientPrivacy, amplification, expected_cohort
from fedsys.privacy.entries import FILE
from fedsys.privacy.ledger import Ledger
from fedsys.privacy.release import Initialisation, Statement, check_delta
from fedsys.run_folder import id_of

if TYPE_CHECKING:
    from fedsys.federation import Federation


def account_of(
    experiment: Experiment, shards: Shards, participation: Participation
) -> Account | None:
    """Return how the run's epsilon is shown and, at a private server, made; None if nothing is."""
    if experiment.privacy is None:
        return None
    if isinstance(experiment.privacy, ClientPrivacy):
        return _client_account(experiment, experiment.privacy, len(shards), participation)
    privacy = experiment.privacy
    largest = max(1, int(shards.sizes().max()))  # the server knows nothing of rows on devices
    delta = 1 / (2 * largest) if privacy.delta is None else privacy.delta
    check_delta(delta, largest)
    known: dict[str, Initialisation] = {"private": "included", "client_sum": "excluded"}
    initialisation = known.get(_init(experiment), "not private data")
    if getattr(experiment.model, "pretrained", False) and getattr(
        experiment.data, "source_is_private", False
    ):
        initialisation = "excluded"
    statement = Statement(
        unit="record", delta=delta, sampling="Poisson", initialisation=initialisation
    )
    return Account(statement, privacy.reproducible)


def _client_account(
    experiment: Experiment, privacy: ClientPrivacy, clients: int, participation: Participation
) -> ClientAccount:
    delta = privacy.delta_of(clients)
    check_delta(delta, clients)
    amplified = amplification(participation) is not None
    expected, canaries = expected_cohort(participation, clients), None
    if (count := privacy.canaries) is not None:
        rate = expected / clients
        canaries = CanaryClients(count, rate, privacy.clipping_norm, experiment.seed)
        expected += count * rate
    planned = privacy.plan(participation, experiment.rounds, delta)
    privacy.split(planned.noise_multiplier, expected)  # raises where the plan cannot be
    statement = Statement(
        unit="client",
        delta=delta,
        sampling="Poisson" if amplified else "none claimed",
        initialisation="not private data",
    )
    return ClientAccount(
        statement,
        privacy.reproducible,
        privacy=privacy,
        planned=planned,
        expected_cohort=expected,
        amplified=amplified,
        seed=experiment.seed,
        enter=ServerBook(privacy, delta, data_name(experiment), clients),
        canaries=canaries,
    )


def _init(experiment: Experiment) -> str:
    return getattr(experiment.adapter, "init", "")


def data_name(experiment: Experiment) -> str:
    """Return the data set's name, under which clients' spending is added up."""
    data = experiment.resolved["data"]
    path = data.get("path")
    if path is not None and Path(path).exists():
        path = Path(path).absolute()  # the same file is the same data, wherever a run is started
    parts = (option("data", data[TARGET]) or data[TARGET], path, data.get("name"))
    return " ".join(str(part) for part in parts if part)


def protected(
    federation: "Federation", clients_here: bool
) -> AbstractContextManager[Ledger | None]:
    """Return the ledger that this process keeps, to be held while it trains; None if none is."""
    ledger = protect_server(federation)
    if ledger is None and clients_here:
        experiment = federation.experiment
        if any((kept := ledger_folder(experiment)).glob(f"*/{FILE}")):
            raise ConfigError(
                [f"privacy.ledger: {kept} holds ledgers of single clients, as on Ray: name another"]
            )
        ledger = protect_clients(
            federation,
            id_of(experiment.out) or "",
            experiment.out,
            ledger_folder(experiment),
            durable=False,
        )
    return ledger or nullcontext()


def protect_clients(
    federation: "Federation", run: str, folder: Path, ledger: Path, durable: bool = True
) -> Ledger | None:
    """Open the ``ledger`` of clients that protect their rows: nothing leaves them but through it.

    It is held until it is closed; None where no row is protected. Replies are kept in ``folder``;
    ``durable`` ones outlast a loss of power, and not only of the process. Raises ``LedgerError``.
    """
    experiment, site = federation.experiment, federation.site
    account = federation.strategy.account
    if account is None or account.unit != "record":
        return None
    opened = Ledger(ledger)
    # Without checkpoints nobody comes back for a reply.
    kept = experiment.checkpoint.every
    site.guard = Guard(
        experiment.privacy,
        opened,
        DiskReplies(folder / "replies", durable) if kept else MemoryReplies(),
        run=run,
        delta=account.delta,
        rounds=experiment.rounds,
        seed=experiment.seed,
        initial_rows=site.init_examples if _init(experiment) == "private" else 0,
    )
    return opened


def protect_server(federation: "Federation") -> Ledger | None:
    """Open the ledger of a server that protects its clients, as ``protect_clients`` does theirs."""
    account = federation.strategy.account
    if not isinstance(account, ClientAccount):
        return None
    account.enter.run = id_of(federation.experiment.out) or ""
    ledger = Ledger(ledger_folder(federation.experiment))
    account.enter.open(ledger, account.amplified)
    return ledger


def ledger_folder(experiment: Experiment) -> Path:
    """Return where the ledger is that this run reads and writes."""
    named = getattr(experiment.privacy, "ledger", None)
    return Path(named or experiment.out / "ledger")
