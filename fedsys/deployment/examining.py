"""A reply as a SuperNode holds it, examined before it leaves.

Private names of Flower's objects are in this file only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedsys.deployment.facts import Asked, facts_of
from fedsys.deployment.policy import Policy, level_of
from fedsys.deployment.terms import Mark, Terms


def examine(
    said: Mark,
    contents: Mapping[str, bytes],
    asked: Mark,
    terms: Terms,
    policy: Path,
    ledger: Path,
) -> list[str]:
    """Return why a reply to ``asked``, marked as ``said``, may not leave.

    ``contents`` are all the bytes of it that would be sent, by Flower's ids. Raises
    ``PolicyError`` when the file ``policy`` cannot be used.
    """
    if said[1:] != asked[1:]:
        return ["the reply is not marked as one to the message"]
    message = inflate_object_from_contents(said.message_id, dict(contents))
    if not isinstance(message, Message) or not message.has_content():
        return ["the reply holds nothing that could be judged"]
    about = Asked(
        kind=asked.kind,
        level=level_of(terms.settings),
        run=terms.run,
        round=int(asked.group) if asked.group.isdecimal() else None,
        summed=_is_summed(terms.settings),
    )
    facts = facts_of(message, about, sum(map(len, contents.values())), ledger)
    rules = Policy.load(policy)
    return [*terms.reasons(rules), *rules.of_reply(facts)]


def _is_summed(settings: Mapping[str, Any]) -> bool:
    secagg = settings.get("secagg")
    return isinstance(secagg, Mapping) and secagg.get("_target_") is not None
