"""The process that is a device's SuperNode: ``python -m fedsys.deployment.node FOLDER``.

It is Flower's own, with ``fedsys.deployment.gate`` around its loop, and starts a ClientApp for each
message (``fedsys.deployment.starter``). What people should hear goes to its standard output, an
object of JSON a line; the rest, ClientApps included, to its standard error. It ends with whoever
started it, and all that it has started ends with it.

Private names of Flower's SuperNode process are in this file only.
"""

import argparse
import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedsys.deployment.device import Device
from fedsys.deployment.policy import Policy
from fedsys.deployment.processes import descendants, kill, kill_group, when_orphaned
from fedsys.errors import ConfigError
from fedsys.json_lines import strict

if TYPE_CHECKING:
    from flwr.supernode.nodestate import NodeStateFactory

Keys = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]

HOST = "127.0.0.1"  # where ClientApps find their node
HEARD, ENDED, CONNECTED = "say", "exit", "connected"  # keys of the lines on standard output
_GRACE = 8.0  # seconds for a clean end, after which Flower itself would not wait either
_EXIT = re.compile(r"Exit Code: (\d+)\s*(.*?)(?:\n\nFor more information.*)?", re.DOTALL)
_API = re.compile(r"\[code: (\d+)\]")
# How lines of Flower's log begin.
_BEGUN = "SuperNode ID: "
_AWAY, _BACK = "Connection attempt failed", "Connection successful"


def main(argv: Sequence[str] | None = None) -> int:
    """Be the SuperNode until told to stop; return an exit code, 2 where the folder is at fault."""
    parser = argparse.ArgumentParser(prog="fedsys.deployment.node", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, help="process without which this one ends")
    words = parser.parse_args(argv)
    heard = Heard(_own_output())
    if words.parent is not None:
        when_orphaned(_end, words.parent)
    try:
        device = Device.load(words.folder)
        keys = _keys(device)
        Policy.load(device.policy)
    except ConfigError as error:
        heard.write(HEARD, str(error))
        return 2
    os.environ.update(environment(device))
    try:
        serve(device, keys, heard)
    finally:
        kill(descendants(os.getpid()))
    return 1  # whoever is told to stop leaves by an exception


def environment(device: Device) -> dict[str, str]:
    """Return what the processes of a device find in their environment."""
    # What this machine's processes say to each other is no business of a proxy's.
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    variables = {
        "NO_PROXY": direct,
        "no_proxy": direct,
        "FEDSYS_CACHE": str(device.state / "cache"),
        "FLWR_HOME": str(device.state / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Flower starts its parts by name.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    if device.settings.threads is not None:
        for library in ("OMP", "MKL", "OPENBLAS"):
            variables[f"{library}_NUM_THREADS"] = str(device.settings.threads)
    return variables


def serve(device: Device, keys: "Keys | None", heard: "Heard") -> None:
    """Be the SuperNode of ``device`` until it loses its server.

    Raises ``SystemExit`` when told to stop, and when it cannot connect.
    """
    # Flower reads some of its environment when it is imported.
    import flwr.supernode.start_client_internal as loop
    from flwr.common.constant import ISOLATION_MODE_PROCESS
    from flwr.supercore.exit import add_exit_handler
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import NodeStateFactory

    from fedsys.deployment.gate import Gate
    from fedsys.deployment.starter import Starter

    logging.getLogger("flwr").addHandler(heard)
    port = device.settings.port or _free_port()
    secret = secrets.token_bytes(32)
    add_exit_handler(lambda: kill(descendants(os.getpid())))
    states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    _start_api(states, secret, port)
    starter = Starter(f"{HOST}:{port}", secret, device.settings.memory_mb)
    gate = Gate(device, starter, partial(heard.write, HEARD))
    vars(loop).update(
        _pull_and_store_message=partial(gate.pull, loop._pull_and_store_message),
        _push_messages=partial(gate.push, loop._push_messages),
    )
    loop.start_client_internal(
        state_factory=states,
        server_address=device.settings.server,
        node_config=dict(device.node_config),
        root_certificates=(device.folder / "ca.crt").read_bytes() if device.secure else None,
        insecure=not device.secure,
        authentication_keys=keys,
        isolation=ISOLATION_MODE_PROCESS,  # ClientApps are started by us, who know the limits
        runtime_api_address=f"{HOST}:{port}",
        superexec_auth_secret=secret,
        runtime_dependency_install=False,
    )


def _start_api(states: "NodeStateFactory", secret: bytes, port: int) -> None:
    """Serve ClientApps in a thread that ends with the process; raises ``RuntimeError``."""
    import uvicorn
    from flwr.supernode.main import create_app

    app = create_app(state_factory=states, superexec_auth_secret=secret)
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=port, access_log=False))
    thread = threading.Thread(target=server.run, name="runtime-api", daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.05)
    if not server.started:
        raise RuntimeError(f"port {port} of {HOST} cannot be listened at")


class Heard(logging.Handler):
    """What whoever started this process hears of it, one JSON object a line."""

    def __init__(self, output: TextIO) -> None:
        """Write to ``output``."""
        super().__init__()
        self._output = output
        self._away = False  # the server, once there was a connection

    def write(self, kind: str, text: str, **more: object) -> None:
        """Say ``text``; whoever does not listen any more misses it."""
        with contextlib.suppress(OSError, ValueError):
            self._output.write(strict({kind: text, **more}) + "\n")
            self._output.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on of Flower's log what tells how it stands with the server."""
        text = record.getMessage()
        if text.startswith(_AWAY) and not self._away:
            self._away = True
            self.write(HEARD, "the server does not answer; trying again until it does")
        elif text.startswith(_BACK) and self._away:
            self._away = False
            self.write(HEARD, "the server answers again")
        elif text.startswith(_BEGUN):
            self.write(CONNECTED, text)
        elif ended := _EXIT.fullmatch(text):
            api = _API.search(text)
            self.write(
                ENDED, " ".join(ended[2].split()), code=int(ended[1]), api=api and int(api[1])
            )


def _own_output() -> TextIO:
    """Return standard output, which then is nobody else's: others get standard error."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own


def _keys(device: Device) -> Keys | None:
    """Return the device's keys, None where it has none; raises ``ConfigError``."""
    if not device.secure:
        return None
    path = device.folder / "device.key"
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError([f"{path}: cannot be read as a private key: {error}"]) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError([f"{path}: must be an ECDSA key, as enrolment makes it"])
    return key, key.public_key()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def _end() -> None:
    """End this process, as its own has gone, and all that it has started."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    kill(descendants(os.getpid()))
    if os.getpgid(0) == os.getpid():  # else others are in the group
        kill_group(os.getpid())
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
