"""A reply examined in a process of its own.

To read a reply takes torch. A node that waits does without it, before a reply and after, which
is two hundred megabytes on a small device.
"""

import json
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fedsys.deployment.terms import Mark, Terms

_SECONDS = 300.0  # that an examination may take


def examine(
    said: Mark,
    contents: Mapping[str, bytes],
    asked: Mark,
    terms: Terms,
    policy: Path,
    ledger: Path,
) -> list[str]:
    """Return what ``examining.examine`` does; whatever goes wrong is raised."""
    question = {
        "said": said,
        "contents": {name: b64encode(content).decode() for name, content in contents.items()},
        "asked": asked,
        "terms": asdict(terms),
        "policy": str(policy),
        "ledger": str(ledger),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fedsys.deployment.apart"],
        input=json.dumps(question).encode(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=_SECONDS,
    )
    reasons: list[str] = json.loads(done.stdout)
    return reasons


def main() -> None:
    """Answer the question on stdin."""
    from fedsys.deployment import examining

    question = json.load(sys.stdin)
    contents = {name: b64decode(content) for name, content in question["contents"].items()}
    reasons = examining.examine(
        Mark(*question["said"]),
        contents,
        Mark(*question["asked"]),
        Terms(**question["terms"]),
        Path(question["policy"]),
        Path(question["ledger"]),
    )
    sys.stdout.write(json.dumps(reasons))


if __name__ == "__main__":
    main()
