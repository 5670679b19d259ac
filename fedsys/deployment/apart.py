"""A reply examined in a process of its own.

To read a reply takes torch. A node that waits does without it, before a reply and after, which
is two hundred megabytes on a small device.
"""

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Metadata

    from fedsys.deployment.policy import Policy
    from fedsys.deployment.terms import Terms

_SECONDS = 300.0  # that an examination may take


def examine(
    said: "Metadata",
    contents: Mapping[str, bytes],
    asked: "Metadata",
    terms: "Terms",
    policy: "Policy",
    ledger: Path,
) -> list[str]:
    """Return what ``examining.examine`` does; whatever goes wrong is raised."""
    question = pickle.dumps((said, dict(contents), asked, terms, policy, ledger))  # for ourselves
    command = [sys.executable, "-P", "-m", "fedsys.deployment.apart"]
    done = subprocess.run(
        command, input=question, stdout=subprocess.PIPE, check=True, timeout=_SECONDS
    )
    reasons: list[str] = json.loads(done.stdout)
    return reasons


def main() -> None:
    """Answer the question on stdin."""
    from fedsys.deployment import examining

    question = pickle.load(sys.stdin.buffer)
    sys.stdout.write(json.dumps(examining.examine(*question)))


if __name__ == "__main__":
    main()
