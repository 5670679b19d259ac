"""The two processes of a server: ``python -P -m fedsys.deployment.guarded KIND HOME ARGUMENTS``.

superlink   Flower's SuperLink, with a guard before its Control API
superexec   Flower's superexec, which starts the ServerApps

Flower 1.41 serves three APIs at one port: the Fleet API, where SuperNodes prove who they are; the
Runtime API, where ServerApps show a token of their own and superexec a secret; and the Control
API, where without Flower's paid accounts nobody has to prove anything, so that whoever reaches the
port may submit code. Accounts come in by ``ControlAuthnPlugin``, and this module sets one that
knows a single account: the one who can read ``control.token`` in the server home.

Private names of Flower's server processes are in this file only.
"""

import hmac
import secrets
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from flwr.supercore.auth.typing import AccountInfo
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

from fedsys.deployment.pki import locked, write_file

TOKEN = "control.token"
SECRET = "superexec.secret"

_MAIN = {
    "superlink": ("flwr.superlink.cli.flower_superlink", "flower_superlink"),
    "superexec": ("flwr.supercore.cli.flower_superexec", "flower_superexec"),
}
KINDS = tuple(_MAIN)
_PLUGIN = "load_control_authn_plugin"


class Guard(NoOpControlAuthnPlugin):
    """Lets in who shows the token, as Flower's one account without a name."""

    def __init__(self, token: str) -> None:
        """Know the token."""
        self._token = token.encode()

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Return whether the request shows the token, and whose it then is."""
        shown = [text.encode() if isinstance(text, str) else text for _, text in metadata]
        if len(shown) != 1 or not hmac.compare_digest(shown[0], self._token):
            return False, None
        return super().validate_tokens_in_metadata(metadata)


def secret(path: Path) -> str:
    """Return the secret at ``path``; it is made, for the owner's eyes only, if there is none."""
    with locked(path.with_name(".secrets.lock")):
        if not path.exists():
            write_file(path, secrets.token_hex(32).encode(), 0o600)
        return path.read_text()


def main(words: Sequence[str]) -> None:
    """Become the process that ``words`` name; return when it is over."""
    kind, home, *arguments = words
    place, name = _MAIN[kind]
    module = import_module(place)
    if kind == "superlink":
        _guard(vars(module), secret(Path(home) / TOKEN))
    sys.argv = [f"flower-{kind}", *arguments]
    getattr(module, name)()


def _guard(names: dict[str, object], token: str) -> None:
    if _PLUGIN not in names:  # never run without, should Flower come to load it elsewhere
        raise RuntimeError(f"this version of Flower has no {_PLUGIN}; install flwr 1.41")
    names[_PLUGIN] = lambda: Guard(token)


if __name__ == "__main__":
    main(sys.argv[1:])
