"""A reply as a SuperNode holds it, examined before it leaves.

Private names of Flower's objects are in this file only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message, Metadata
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedsys.deployment.facts import Asked, facts_of
from fedsys.deployment.policy import Policy, level_of
from fedsys.deployment.terms import Terms


def examine(
    said: Metadata,
    contents: Mapping[str, bytes],
    asked: Metadata,
    terms: Terms,
    policy: Policy,
    ledger: Path,
) -> list[str]:
    """Return why a reply to ``asked``, which has the metadata ``said``, may not leave.

    ``contents`` are all the bytes of it that would be sent, by Flower's ids.
    """
    if (said.message_type, said.group_id) != (asked.message_type, asked.group_id):
        return ["the reply is not marked as one to the message"]
    message = inflate_object_from_contents(said.message_id, dict(contents))
    if not isinstance(message, Message) or not message.has_content():
        return ["the reply holds nothing that could be judged"]
    about = Asked(
        kind=asked.message_type,
        level=level_of(terms.settings),
        run=terms.run,
        round=int(asked.group_id) if asked.group_id.isdecimal() else None,
        summed=_is_summed(terms.settings),
    )
    facts = facts_of(message, about, sum(map(len, contents.values())), ledger)
    return [*terms.reasons(policy), *policy.of_reply(facts)]


def _is_summed(settings: Mapping[str, Any]) -> bool:
    secagg = settings.get("secagg")
    return isinstance(secagg, Mapping) and secagg.get("_target_") is not None
