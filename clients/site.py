"""What a process holds for the clients it runs: one model, the data, the settings, the memories."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from torch import Tensor

from clients.cohort import LocalGradient
from clients.frozen import Frozen, FrozenStore
from clients.guard import Guard, Owner
from clients.passes import gather
from clients.private import Private
from clients.store import ClientStore, MemoryStore
from clients.training import LocalTraining
from fedsys import messages as wire
from fedsys.adapters import load_shared, shared_tensors
from fedsys.adapters.lora_sb import clipped_gradients
from fedsys.adapters.lowrank import base_weights, load_base, moved
from fedsys.arrays import tensor_of
from fedsys.codec import At, Codec
from fedsys.cohort import CohortModel
from fedsys.data.examples import Examples
from fedsys.data.shards import Shards
from fedsys.messages import arrays_of, config_of
from fedsys.params import Layout, Params, chained, digest
from fedsys.privacy.noise import grid, noised
from fedsys.secagg import SecureAggregation

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass
class Site:
    """What a process holds for the clients it runs: one model, the data, the settings."""

    model: CohortModel
    examples: Examples
    shards: Shards
    training: LocalTraining
    local_gradient: LocalGradient
    rounds: int
    seed: int
    device: torch.device
    evaluate_batch: int = 256
    init_examples: int | None = None  # rows of a client in the gradient phase; None: all
    codec: Codec | None = None
    store: ClientStore = field(default_factory=MemoryStore)
    frozen: FrozenStore | None = None  # where other processes of the client find what is frozen
    flips_below: int = 0  # clients below this number train on flipped labels
    num_classes: int = 0
    protects: bool = False  # its rows: nothing is trained then without a guard
    guard: Guard | None = None
    data: str = ""  # the data set's name, for the ledger
    owner_name: str | None = None  # in the ledger; None: by the data set and the client
    secagg: SecureAggregation | None = None  # updates leave for such a sum, or not at all
    hides_failures: bool = False  # an update that is not finite goes into a sum as zeros
    moved: bool = field(default=False, init=False)  # the base of the model, since it was built
    _fingerprints: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def basis(self) -> str:
        """The digest of all that is frozen and shared, as it is now; "" for a model without any."""
        shared = shared_tensors(self.model.model)
        return digest(shared) if shared else ""

    @cached_property
    def initial(self) -> Params:
        """x_0 as every client can derive it."""
        return self.model.layout.unpack(self.model.initial)

    def load(self, content: RecordDict) -> None:
        """Take over what is frozen in ``content``.

        Raises ``ValueError`` when the client then still holds something else than the server.
        """
        basis = str(config_of(content).get(wire.BASIS, ""))
        # "" asks for nothing in particular, but for a base as it was at the beginning.
        if basis == self.basis or not (basis or self.moved):
            return
        if basis and not _DIGEST.fullmatch(basis):  # it is to name a file, too
            raise ValueError(f"a basis is a digest, and the server names {basis!r:.40}")
        if self.frozen is not None and basis:
            self._recall(self.frozen.get(basis) or self.frozen.newest())
        if basis == self.basis:
            return
        if wire.FROZEN in content:
            self.take(wire.decode(arrays_of(content, wire.FROZEN)))
        elif wire.BASE in content:
            self.rebase(wire.decode(arrays_of(content, wire.BASE)), basis)
        elif wire.MOVES in content:
            self.move(wire.decode(arrays_of(content, wire.MOVES)))
        if basis != self.basis:
            raise ValueError("the frozen factors of this client are not those of the server")
        if self.frozen is not None and basis:
            model = self.model.model
            tensors = base_weights(model) if self.moved else shared_tensors(model)
            self.frozen.put(Frozen(basis, self.moved, tensors))

    def _recall(self, kept: Frozen | None) -> None:
        """Go on from what another process of this client was sent."""
        if kept is None:
            return
        if kept.is_base:
            self.rebase(kept.tensors, kept.basis)
        else:
            self.take(kept.tensors)

    def take(self, factors: Params) -> None:
        """Make ``factors`` the frozen factors of the model, unless they are already."""
        if digest(factors) == self.basis:
            return
        load_shared(self.model.model, factors)
        self.__dict__.pop("basis", None)

    def rebase(self, base: Params, basis: str) -> None:
        """Make ``base`` the frozen weights of the adapted layers, known as ``basis``."""
        load_base(self.model.model, base)
        self.basis, self.moved = basis, bool(basis)

    def move(self, moves: Params) -> None:
        """Move the frozen weights by the factors ``moves``."""
        self.rebase(moved(base_weights(self.model.model), moves), chained(self.basis, moves))

    def start(self, arrays: ArrayRecord, round: int = 0) -> Tensor:
        """Return x_t as one vector (size,)."""
        layout = self.model.layout
        if wire.PACKED in arrays:
            flat = tensor_of(arrays[wire.PACKED])
            if flat.shape != (layout.size,):
                raise ValueError("the packed vector does not fit this client's model")
            return flat.to(self.device)
        params = wire.decode(arrays)
        if self.codec is not None:
            params = self.codec.unpack(params, self.initial, At(self.seed, round, -1))
        return layout.pack(params).to(self.device)

    def starts(self, x: Tensor, clients: list[int]) -> Tensor:
        """Return x_t (size,), or one row a client (K, size) where the codec gives each its own."""
        if self.codec is None or not self.codec.personal:
            return x
        layout, codec = self.model.layout, self.codec
        return torch.stack([layout.pack(codec.begin(layout.unpack(x), n)) for n in clients])

    def remember(self, client: int, config: ConfigRecord) -> Params:
        """Return the memory that ``client`` has from the last round the server accepted."""
        accepted = int(str(config.get(wire.ACCEPTED, 0)))
        return self.store.load(client, accepted, wire.checkpoints_of(config))

    def batches(
        self, rows: list[Tensor], clients: list[int], round: int, private: tuple[Private, ...]
    ) -> list[Tensor]:
        """Return the rows of every local step of each client, by Poisson sampling if private."""
        training = self.training
        if private:
            return [
                p.lots(own, training.num_steps(len(own)))
                for p, own in zip(private, rows, strict=True)
            ]
        lengths = self.examples.lengths if training.group_by_length else lambda _: None
        return [
            training.batches(own, self.seed, round, client, lengths(own))
            for own, client in zip(rows, clients, strict=True)
        ]

    def noised_gradients(self, rows: Tensor, private: Private) -> Params:
        """Return the adapted layers' summed gradients of a lot of ``rows``, clipped and noised."""
        (lot,) = private.lots(rows, 1)
        batches = (gather(self.examples, row, self.device) for row in lot[lot >= 0])
        std = private.noise_multiplier * private.clipping_norm
        sums = clipped_gradients(self.model, batches, private.clipping_norm, grid(std))
        layout = Layout.of(sums)
        total = noised(layout.pack(sums), std, private.stream)
        return layout.unpack(total.to(self.model.layout.dtype))

    def rows(self, context: Context) -> Tensor:
        """Return the rows of the client that ``context`` belongs to."""
        client = partition_of(context)
        if not 0 <= client < len(self.shards):
            raise ValueError(f"no data for partition {client} of {len(self.shards)}")
        rows = self.shards.rows(client)
        if not len(rows):
            raise ValueError("this client has no examples")
        return rows

    def owner(self, client: int, rows: Tensor) -> Owner:
        """Return the client as the ledger knows it; ``rows`` are its rows."""

        def fingerprint() -> str:
            if client not in self._fingerprints:
                self._fingerprints[client] = self.examples.subset(rows).fingerprint()
            return self._fingerprints[client]

        name = self.owner_name or f"{self.data}#{self.shards.name(client)}"
        return Owner(name, self.data, fingerprint, len(rows))


def partition_of(context: Context) -> int:
    """Return which client's data the node of ``context`` holds."""
    return int(context.node_config["partition-id"])
