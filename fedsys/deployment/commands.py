"""What Flower's processes are started with."""

import os
import sysconfig
from pathlib import Path

from fedsys.deployment.guarded import SECRET

# Of every Flower process: nothing is sent to others, nothing is installed.
FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def superlink(home: Path, host: str, port: int, insecure: bool) -> list[str]:
    """Return the arguments of flower-superlink; devices show keys, unless ``insecure``."""
    secure = [
        *("--ssl-ca-certfile", str(home / "ca.crt")),
        *("--ssl-certfile", str(home / "server.crt")),
        *("--ssl-keyfile", str(home / "server.key")),
        "--enable-supernode-auth",
    ]
    return [
        *("--host", host),
        *("--port", str(port)),
        *("--database", str(home / "state.db")),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(home / SECRET)),
        *(["--insecure"] if insecure else secure),
    ]


def superexec(home: Path, address: str, insecure: bool) -> list[str]:
    """Return the arguments of flower-superexec, whose SuperLink is at ``address``."""
    secure = ["--root-certificates", str(home / "ca.crt")]
    return [
        *("--runtime-api-address", address),
        *("--superexec-auth-secret-file", str(home / SECRET)),
        *(["--insecure"] if insecure else secure),
    ]


def environment(home: Path, address: str) -> dict[str, str]:
    """Return this process's environment, changed as Flower's processes at a server need it."""
    scripts = sysconfig.get_path("scripts")  # where superexec finds flwr-serverapp
    path = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    # Its own SuperLink is no place to ask a proxy for.
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY"), address.rpartition(":")[0]]))
    return {
        **os.environ,
        **FLOWER,
        "FLWR_HOME": str(home / "flwr"),
        "PATH": path,
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
    }
