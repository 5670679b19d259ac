"""The policy of a device, put around the loop of Flower's SuperNode.

    in   receive, get_fab       a message, then the code and the settings of its run: judged before
                                anything is unpacked or started
    out  get_messages_legacy    a reply, all its bytes at hand: judged before any of them is sent

A refusal is an error reply with the reason. A ClientApp that takes too long, dies or returns
nothing is ended and answered for, so that the loop goes on. The policy is read at every step, and
holds from the moment its operator writes it.

Private names of Flower's loop are in this file only.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any, Protocol

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode.nodestate import NodeState
from flwr.supernode.start_client_internal import _insert_message

from fedsys.deployment.apart import examine
from fedsys.deployment.device import Device
from fedsys.deployment.disclosure import LAST_RUN
from fedsys.deployment.policy import Policy, PolicyError, level_of
from fedsys.deployment.terms import Mark, Refused, Terms, closed, of_rows, terms_of
from fedsys.deployment.told import told
from fedsys.deployment.unanswered import Unanswered
from fedsys.json_lines import strict, write_whole

log = logging.getLogger(__name__)

_UNUSABLE = "policy.yaml of this device cannot be used, so nothing runs on it"
_NO_STARTER = "what starts ClientApps has ended"
_LOST = "the message could not be fetched whole"
_RESTARTED = "the device was restarted before it had answered"
_POLL = 0.25  # seconds
_ENDING = 10.0  # seconds, after which a ClientApp that has replied is not waited for
_CODES = range(9)  # of Flower's errors


class Apps(Protocol):
    """The ClientApps of a device, each in a process of its own."""

    def can_start(self) -> bool:
        """Return whether there is anything that starts them."""

    def any_runs(self) -> bool:
        """Return whether one is running."""

    def end(self) -> None:
        """End those that are running, at once."""


class Gate:
    """Stands between one SuperNode and its server."""

    def __init__(self, device: Device, apps: Apps, say: Callable[[str], None]) -> None:
        """``say`` tells whoever is at the device."""
        self._device = device
        self._apps = apps
        self._say = say
        self._terms: dict[int, Terms] = {}  # by Flower's id of the run
        self._asked: Message | None = None  # the message in hand
        self._answer: Message | None = None  # to it, where no ClientApp is to answer
        self._deadline = 0.0
        self._unanswered = Unanswered(device.state)
        self._connected = False

    # ---- in

    def pull(self, flowers: Callable[..., int | None], **given: Any) -> int | None:
        """Do as Flower's ``_pull_and_store_message`` does, with what is allowed."""
        if not self._apps.can_start():
            raise RuntimeError(_NO_STARTER)
        self._asked = self._answer = None
        if not self._connected:
            self._connected = True
            if (left := self._unanswered.left()) is not None:
                return self._answer_for_another(left, given)
        runs: dict[int, Run] = {}

        def receive() -> tuple[Message, ObjectTree] | None:
            received: tuple[Message, ObjectTree] | None = given["receive"]()
            if received is not None:
                self._asked = received[0]
                self._unanswered.note(received[0])
                self._admit(received[0])
            return received

        def get_run(run_id: int) -> Run:
            runs[run_id] = given["get_run"](run_id)
            return runs[run_id]

        def get_fab(fab_hash: str, run_id: int) -> Fab:
            fab: Fab = given["get_fab"](fab_hash, run_id)
            self._let_in(runs[run_id], fab)
            return fab

        lost: list[Exception] = []
        mine = {"receive": receive, "get_run": get_run, "get_fab": get_fab}
        mine |= {n: _noting(lost, given[n]) for n in ("pull_object", "confirm_message_received")}
        try:
            run_id = flowers(**given | mine)
        except Refused as refusal:
            run_id = self._decline(refusal.code, str(refusal), given)
        if run_id is None and lost:
            log.warning("a message could not be fetched", exc_info=lost[0])
            run_id = self._decline(ErrorCode.CLIENT_APP_CRASHED, _LOST, given)
        if run_id is None and self._asked is not None:  # its run is over
            self._unanswered.forget()
        self._deadline = time.monotonic() + self._device.settings.seconds
        return run_id

    def _answer_for_another(self, left: Message, given: Mapping[str, Any]) -> int:
        """Answer a message that was in the hands of the node before this one."""
        self._asked = left
        self._say(f"to a {left.metadata.message_type} message: {_RESTARTED}")
        self._answer = self._error(
            given["state"], given["object_store"], ErrorCode.CLIENT_APP_CRASHED, _RESTARTED
        )
        return left.metadata.run_id

    def _admit(self, message: Message) -> None:
        """Raise ``Refused`` unless the message may be answered, as far as its run is known."""
        with closed():
            policy = self._policy()
            reasons = policy.of_message(message.metadata.message_type)
            terms = self._terms.get(message.metadata.run_id)
            if reasons := [*reasons, *(terms.reasons(policy) if terms else [])]:
                raise Refused(reasons)

    def _let_in(self, run: Run, fab: Fab) -> None:
        """Raise ``Refused`` unless the run may be taken part in."""
        with closed():
            policy, code = self._policy(), sha256(fab.content).hexdigest()
            if reasons := policy.of_code(code):
                raise Refused(reasons, ErrorCode.INVALID_FAB)
            terms = terms_of(run, fab.content, code)
            own = self._device.data is not None
            if reasons := [*terms.reasons(policy), *of_rows(terms.settings, own)]:
                raise Refused(reasons)
            self._terms[run.run_id] = terms
            self._device.state.mkdir(parents=True, exist_ok=True)
            write_whole(self._device.state / LAST_RUN, strict(asdict(terms), indent=1) + "\n")
        self._say(f"run {terms.run}: taking part")

    def _decline(self, code: int, reason: str, given: Mapping[str, Any]) -> int | None:
        """Answer the message in hand with ``reason``, and have it worked on by nobody."""
        message = self._in_hand()
        told = message.metadata
        self._say(f"no work on a {told.message_type} message: {reason}")
        try:
            given["confirm_message_received"](told.run_id, told.message_id)
        except RunNotRunningException:
            return None
        except Exception:  # the server then keeps what it need not keep
            log.warning("a refused message could not be confirmed", exc_info=True)
        self._answer = self._error(given["state"], given["object_store"], code, reason)
        return told.run_id

    # ---- out

    def push(self, flowers: Callable[..., None], **given: Any) -> None:
        """Do as Flower's ``_push_messages`` does, with what may leave."""
        judging = _Judging(given["state"], lambda: [self._reply(given["state"], store)])
        store: ObjectStore = given["object_store"]
        flowers(**given | {"state": judging})
        self._unanswered.forget()

    def _reply(self, state: NodeState, store: ObjectStore) -> Message:
        """Wait for the reply to the message in hand, and return it or what is sent instead."""
        asked, found = self._in_hand(), None
        while self._answer is None:
            # Looked at first: whoever ends has replied before.
            over = self._over(state)
            for reply in state.get_messages_legacy(is_reply=True):
                if found is None and _answers(reply, asked):
                    found = reply
                else:  # to nothing, or once more
                    _drop(reply, state, store)
            contents = None if found is None else _contents(found, store)
            if found is not None and contents is not None:
                return self._judged(found, contents, state, store)
            if over:
                if found is not None:
                    _drop(found, state, store)
                return self._give_up(over, state, store)
            time.sleep(_POLL)
        return self._answer

    def _over(self, state: NodeState) -> str | None:
        """Return why no reply will come any more; None as long as one may."""
        tasks = state.get_tasks(run_ids=[self._in_hand().metadata.run_id])
        stages = {task.status.status for task in tasks}
        if stages <= {Status.FINISHED}:
            return "the ClientApp ended without a reply"
        if Status.RUNNING in stages and not self._apps.any_runs():
            return "the ClientApp died"
        if time.monotonic() > self._deadline:
            return f"no reply within the {self._device.settings.seconds:g} seconds of this device"
        return None if self._apps.can_start() else _NO_STARTER

    def _give_up(self, why: str, state: NodeState, store: ObjectStore) -> Message:
        """End whatever works on the message in hand, and return an error reply."""
        asked = self._in_hand().metadata
        self._say(f"gave up a {asked.message_type} message: {why}")
        self._apps.end()
        for task in state.get_tasks(run_ids=[asked.run_id]):
            # Else Flower takes it for lost a minute later, and fails what is then in hand.
            if task.status.status != Status.FINISHED:
                state.finish_task(task.task_id, SubStatus.FAILED, why)
        store.delete(asked.message_id)
        return self._error(state, store, ErrorCode.CLIENT_APP_CRASHED, why)

    def _judged(
        self, reply: Message, contents: dict[str, bytes], state: NodeState, store: ObjectStore
    ) -> Message:
        """Return the reply if it may leave, and an error reply otherwise."""
        asked = self._in_hand().metadata
        try:
            with closed():
                policy, terms = self._policy(), self._terms[asked.run_id]
                if not reply.has_error():
                    self._await_the_end()
                    marks = Mark.of(reply.metadata), Mark.of(asked)
                    files = self._device.policy, self._device.ledger
                    if reasons := examine(marks[0], contents, marks[1], terms, *files):
                        raise Refused(reasons)
                    size = sum(map(len, contents.values()))
                    self._say(f"run {terms.run}: {size} bytes leave, to {asked.message_type}")
                    return reply
                private = policy.privacy != "none" or level_of(terms.settings) != "none"
                code, reason = reply.error.code, told(reply.error.reason, private)
        except Refused as refusal:
            code, reason = refusal.code, str(refusal)
        self._say(f"an error leaves, to {asked.message_type}: {reason}")
        _drop(reply, state, store)
        code = code if code in _CODES else ErrorCode.UNKNOWN
        return self._error(state, store, code, reason)

    def _await_the_end(self) -> None:
        """Let the ClientApp end: it and whoever reads its reply hold torch, one at a time."""
        until = time.monotonic() + _ENDING
        while self._apps.any_runs() and time.monotonic() < until:
            time.sleep(_POLL)

    # ---- both

    def _policy(self) -> Policy:
        """Return the policy as it stands now; raises ``Refused`` when there is none."""
        try:
            return Policy.load(self._device.policy)
        except PolicyError as error:
            self._say(str(error))
            raise Refused([_UNUSABLE]) from error

    def _in_hand(self) -> Message:
        if self._asked is None:
            raise RuntimeError("no message is in hand")
        return self._asked

    def _error(self, state: NodeState, store: ObjectStore, code: int, reason: str) -> Message:
        """Return an error reply to the message in hand, stored as Flower's loop sends them."""
        reply = Message(Error(code, reason), reply_to=self._in_hand())
        _insert_message(reply, state, store)
        return reply


class _Judging:
    """A SuperNode's state, but for its replies, which are those that may leave."""

    def __init__(self, state: NodeState, replies: Callable[[], list[Message]]) -> None:
        self._state = state
        self._replies = replies

    def get_messages_legacy(self, *, is_reply: bool) -> list[Message]:
        """Return the replies; the loop asks for nothing else."""
        if not is_reply:
            raise ValueError("only replies are sent")
        return self._replies()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def _noting(errors: list[Exception], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, whose errors are noted, except that the run is over."""

    def noted(*given: Any) -> Any:
        try:
            return call(*given)
        except RunNotRunningException:
            raise
        except Exception as error:
            errors.append(error)
            raise

    return noted


def _answers(reply: Message, asked: Message) -> bool:
    return bool(reply.metadata.reply_to_message_id == asked.metadata.message_id)


def _contents(reply: Message, store: ObjectStore) -> dict[str, bytes] | None:
    """Return all that would be sent, by Flower's ids; None as long as some of it is missing."""
    try:
        tree = store.get_object_tree(reply.metadata.message_id)
    except NoObjectInStoreError:
        return None
    found = {node.object_id: store.get(node.object_id) for node in iterate_object_tree(tree)}
    contents = {name: content for name, content in found.items() if content}
    return contents if len(contents) == len(found) else None


def _drop(reply: Message, state: NodeState, store: ObjectStore) -> None:
    """Forget a reply and all it holds."""
    state.delete_messages(message_ids=[reply.metadata.message_id])
    store.delete(reply.metadata.message_id)
