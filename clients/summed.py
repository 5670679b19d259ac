"""A client whose update leaves masked, as a part of a sum: ``fedsys.secagg`` at a site."""

import logging
from collections.abc import Callable

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict

from clients.site import Site, partition_of
from fedsys import messages as wire
from fedsys.messages import arrays_of, config_of
from fedsys.secagg import SecureAggregation, replies
from fedsys.seeds import numpy_generator

log = logging.getLogger(__name__)

Train = Callable[[list[Message], list[Context]], list[Message]]
Refuse = Callable[[Message, Exception], Message]


def answer(
    action: str, site: Callable[[Context], Site], message: Message, context: Context
) -> Message:
    """Return the reply to ``train.<action>``, which is about keys and no update.

    Raises ``ValueError`` for what must not be answered.
    """
    content = replies.reply(action, message.content, context.state, _settings(site(context)))
    return Message(content, reply_to=message)


def train_masked(
    site: Site, train: Train, refuse: Refuse, messages: list[Message], contexts: list[Context]
) -> list[Message]:
    """Train whom the server asks for a part of a sum, and mask what ``train`` replies.

    Nothing is masked before it is made: a reply that is kept for a second time is kept in the
    clear, as masks serve once.
    """
    made: dict[int, Message] = {}
    able = []
    for place, (message, context) in enumerate(zip(messages, contexts, strict=True)):
        try:  # before the training, which may have a price
            replies.check(message.content, context.state, _settings(site))
            able.append(place)
        except ValueError as error:
            made[place] = refuse(message, error)
    trained = train([messages[p] for p in able], [contexts[p] for p in able]) if able else []
    for place, reply in zip(able, trained, strict=True):
        try:
            if reply.has_content():
                _mask(site, messages[place], contexts[place], reply.content)
            made[place] = reply
        except ValueError as error:
            made[place] = refuse(messages[place], error)
    return [made[place] for place in range(len(messages))]


def _mask(site: Site, message: Message, context: Context, content: RecordDict) -> None:
    """Replace x_n in a reply's ``content`` by what stands for x_n - x_t in the sum."""
    # In the dtype of both, as the server would take it from replies in the clear.
    delta = site.start(arrays_of(content)) - site.start(arrays_of(message.content))
    client, round = partition_of(context), int(str(config_of(message.content)[wire.ROUND]))
    if site.hides_failures and not delta.isfinite().all():
        log.warning("client %d: an update that is not finite counts as zeros", client)
        delta = torch.zeros_like(delta)
    rng = numpy_generator(site.seed, "secagg", round, client)
    masked = replies.mask(delta, message.content, context.state, _settings(site), rng)
    content[wire.ARRAYS] = wire.encode(masked)
    count = content.metric_records[wire.METRICS][wire.NUM_EXAMPLES]
    content[wire.METRICS] = MetricRecord({wire.NUM_EXAMPLES: count})  # a loss is nobody's business


def _settings(site: Site) -> SecureAggregation:
    if site.secagg is None:
        raise ValueError("this client takes part in no secure aggregation: it has no secagg=true")
    return site.secagg
