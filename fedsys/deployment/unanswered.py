"""The message that a device works on, noted on disk until it is answered.

Whoever kills a node leaves its server waiting: for a minute, until it counts the device as lost,
or until the round's deadline, where the device is back before that is noticed. So the next node
answers, with an error, for the one before it.

Private names of Flower's messages are in this file only.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Proto

log = logging.getLogger(__name__)

FILE = "unanswered"  # in state/


class Unanswered:
    """At most one message."""

    def __init__(self, folder: Path) -> None:
        """Note it in ``folder``, which need not exist yet."""
        self._path = folder / FILE

    def note(self, message: Message) -> None:
        """Keep who is to be answered, and not what was said."""
        make: Any = Message  # its signature does not show the metadata
        bare = make(RecordDict(), metadata=message.metadata)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(message_to_proto(bare).SerializeToString())
        except OSError:  # a full disk: the server will have to wait
            log.warning("%s cannot be written", self._path, exc_info=True)

    def forget(self) -> None:
        """It is answered."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def left(self) -> Message | None:
        """Return the message that an earlier process has left; None where it left none."""
        try:
            message = message_from_proto(Proto.FromString(self._path.read_bytes()))
        except FileNotFoundError:
            return None
        except Exception:  # torn, in which case nothing can be done
            log.warning("%s cannot be read", self._path, exc_info=True)
            return None
        return message if message.metadata.message_id else None
