"""What a SuperLink is asked over its Control API: devices, runs and their logs.

The API is protobuf over HTTP at the SuperLink's one port. Whoever may use it may run code at the
server and at every device, so each call carries the token of the server home, see
``fedsys.deployment.guarded``. Flower's private names for the API are in this file only.
"""

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.proto import control_pb2 as api
from flwr.proto.fab_pb2 import Fab
from flwr.proto.transport_pb2 import Scalar

from fedsys.deployment.bundle import Bundle
from fedsys.deployment.pki import public_line
from fedsys.errors import RunError

_TIMEOUT = 10.0  # seconds for an answer
_FRAME = 4  # bytes that say how long a message of a stream is
_LOST = (
    "No heartbeat received from the task",
    "Task failed with unknown error.",  # it ended by a signal; a failure would say its exception
)


class Message(Protocol):
    """A protobuf message."""

    def SerializeToString(self) -> bytes:
        """Return it as bytes."""
        ...

    def ParseFromString(self, content: bytes) -> object:
        """Read it from bytes."""
        ...


ResponseT = TypeVar("ResponseT", bound=Message)


class Node(NamedTuple):
    """A SuperNode that the SuperLink knows."""

    id: int
    name: str  # of its device; empty where nobody registered it
    key: bytes  # public, PEM
    online: bool
    registered: bool  # not any more once it is revoked


class RunStatus(NamedTuple):
    """How a run stands; texts are Flower's."""

    status: str  # pending, starting, running or finished
    sub_status: str  # of a finished run: completed, failed or stopped
    details: str  # of a failure

    @property
    def finished(self) -> bool:
        """Return whether the run is over, for better or worse."""
        return self.status == "finished"

    @property
    def lost(self) -> bool:
        """Return whether the run is over because its ServerApp was killed."""
        return self.finished and self.details in _LOST


class Control:
    """The Control API at ``address``; over TLS if the certificate of an authority is given.

    Every method raises ``OSError`` when nobody answers, and ``RunError`` when the SuperLink
    refuses.
    """

    def __init__(self, address: str, token: str, authority: Path | None) -> None:
        """Open no connection yet; raises ``OSError`` when the certificate cannot be read."""
        self._url = f"{'https' if authority else 'http'}://{address}/v1/control/"
        self._headers = {"Authorization": f"Bearer {token}"}
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if authority:
            context = ssl.create_default_context(cafile=str(authority))
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def nodes(self) -> list[Node]:
        """Return every SuperNode, revoked ones included."""
        answer = self._call("list-nodes", api.ListNodesRequest(), api.ListNodesResponse)
        return [
            Node(n.node_id, n.name, n.public_key, n.status == "online", n.status != "unregistered")
            for n in answer.nodes_info
        ]

    def register(self, name: str, key: bytes) -> int:
        """Let the SuperNode that has ``key`` in; return its id."""
        request = api.RegisterNodeRequest(public_key=key, name=name)
        return self._call("register-node", request, api.RegisterNodeResponse).node_id

    def unregister(self, node: int) -> None:
        """Never let a SuperNode in again; its key is burnt."""
        request = api.UnregisterNodeRequest(node_id=node)
        self._call("unregister-node", request, api.UnregisterNodeResponse)

    def submit(self, bundle: Bundle, settings: Mapping[str, str]) -> int:
        """Start a run of ``bundle``; return its id."""
        request = api.StartRunRequest(
            fab=Fab(hash_str=bundle.hash, content=bundle.content),
            override_config={key: Scalar(string=text) for key, text in settings.items()},
        )
        answer = self._call("start-run", request, api.StartRunResponse)
        if not answer.run_id:
            raise RunError("the SuperLink did not take the run; its log says why")
        return answer.run_id

    def status(self, run: int) -> RunStatus:
        """Return how a run stands."""
        answer = self._call("list-runs", api.ListRunsRequest(run_id=run), api.ListRunsResponse)
        found = answer.run_dict[run].status
        return RunStatus(found.status, found.sub_status, found.details)

    def unfinished(self) -> dict[int, str]:
        """Return the runs that are not over, each with its folder."""
        answer = self._call("list-runs", api.ListRunsRequest(), api.ListRunsResponse)
        return {
            run: known.override_config["out"].string if "out" in known.override_config else ""
            for run, known in answer.run_dict.items()
            if known.status.status != "finished"
        }

    def stop(self, run: int) -> None:
        """End a run that is not over."""
        self._call("stop-run", api.StopRunRequest(run_id=run), api.StopRunResponse)

    def log(self, run: int) -> str:
        """Return what the ServerApp of a finished run wrote."""
        request = api.StreamLogsRequest(run_id=run)
        text, body = "", self._send("stream-logs", request)
        while len(body) >= _FRAME:
            end = _FRAME + int.from_bytes(body[:_FRAME], "big")
            text += api.StreamLogsResponse.FromString(body[_FRAME:end]).log_output
            body = body[end:]
        return text

    def _call(self, name: str, request: Message, kind: type[ResponseT]) -> ResponseT:
        answer = kind()
        answer.ParseFromString(self._send(name, request))
        return answer

    def _send(self, name: str, request: Message) -> bytes:
        asked = urllib.request.Request(
            self._url + name,
            data=request.SerializeToString(),
            headers={"Content-Type": "application/protobuf", **self._headers},
        )
        try:
            with self._opener.open(asked, timeout=_TIMEOUT) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                if error.code >= 500:  # a hiccup, such as a database that is locked
                    raise ConnectionError(f"{error.code} in answer to {name}") from None
                raise RunError(f"the SuperLink refuses {name}: {_reason(error)}") from None
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__} in the answer to {name}") from error


def public_pem(path: Path) -> bytes:
    """Return the public key in an OpenSSH file as Flower sends it; raises ``ConfigError``."""
    key = load_ssh_public_key(public_line(path).encode())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    parts = [said.get(k) for k in ("detail", "extra")] if said else []
    told = "; ".join(str(part) for part in parts if part) or text.strip()
    return f"{told} (HTTP {error.code})"
