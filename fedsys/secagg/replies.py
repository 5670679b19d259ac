"""What a client answers in a round of secure aggregation.

Between two messages of a round its secrets lie in the record ``secagg`` of its ``state``: Flower's
``Context.state``, which a SuperNode keeps in memory for a process that lives for one message. It is
gone when the round is over, and made anew when a round begins: keys serve one round. A client that
loses it is lost to the round, and no other harm is done.
"""

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedsys.secagg.client import Client
from fedsys.secagg.parts import CLIENT, KEYS, PARCELS, SESSION, Request, Roster, number, put, raw
from fedsys.secagg.parts import take as taken
from fedsys.secagg.rounds import ASK_KEYS, ASK_SECRETS, ASK_SHARES, MASKED, SECAGG
from fedsys.secagg.settings import SecureAggregation

ACTIONS = (ASK_KEYS, ASK_SHARES, ASK_SECRETS)  # that ``reply`` answers


def reply(
    action: str, content: RecordDict, state: RecordDict, settings: SecureAggregation
) -> RecordDict:
    """Return the reply to ``train.<action>``, one of ``ACTIONS``; ``state`` goes on with it.

    Raises ``ValueError`` when the message is not of the round under way, comes twice or out of
    order, or asks for what must not be told.
    """
    asked = _asked(content)
    answer = ConfigRecord()
    if action == ASK_KEYS:
        client = Client(settings, raw(asked, SESSION), number(asked, CLIENT))
        answer[KEYS] = bytes(client.keys())
        state[SECAGG] = client.dump()
        return RecordDict({SECAGG: answer})
    client = _under_way(asked, state, settings)
    if action == ASK_SHARES:
        put(answer, PARCELS, client.share(Roster.of(asked)))
        state[SECAGG] = client.dump()
    else:
        shares = client.reveal(Request.of(asked))
        del state[SECAGG]
        shares.write(answer)
    return RecordDict({SECAGG: answer})


def check(content: RecordDict, state: RecordDict, settings: SecureAggregation) -> None:
    """Raise ``ValueError`` unless the train message is of the round under way in ``state``."""
    _under_way(_asked(content), state, settings)


def mask(
    delta: Tensor,
    content: RecordDict,
    state: RecordDict,
    settings: SecureAggregation,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """Return the arrays that stand for the update ``delta`` (d,) in the reply to a train message.

    It is clipped here, rounded with ``rng``, and masked; ``state`` goes on with it. Raises
    ``ValueError`` as ``reply`` does, and for an update that holds NaN or Inf.
    """
    asked = _asked(content)
    client = _under_way(asked, state, settings)
    quantiser = settings.quantiser
    clipped, was_clipped = quantiser.clip(delta.detach().cpu().double().numpy())
    numbers = np.append(quantiser.quantise(clipped, rng), np.int64(was_clipped))
    masked = client.mask(taken(asked, PARCELS), numbers)
    state[SECAGG] = client.dump()
    return {MASKED: torch.from_numpy(masked)}


def _asked(content: RecordDict) -> ConfigRecord:
    record = content.get(SECAGG)
    if not isinstance(record, ConfigRecord):
        raise ValueError("this client sends its update to a sum only, and the server asks for it")
    return record


def _under_way(asked: ConfigRecord, state: RecordDict, settings: SecureAggregation) -> Client:
    """Return the client of the round that the server speaks of."""
    kept = state.get(SECAGG)
    if not isinstance(kept, ConfigRecord):
        raise ValueError("no secure aggregation is under way at this client")
    client = Client.load(settings, kept)
    if client.session != raw(asked, SESSION):
        raise ValueError("the message is of another secure aggregation than is under way")
    return client
