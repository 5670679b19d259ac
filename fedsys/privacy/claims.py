"""What a run folder says of the privacy that was spent, read without trust."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsys.errors import LedgerError
from fedsys.json_lines import JsonLines
from fedsys.privacy.entries import FILE, Head


class Line(NamedTuple):
    """What ``metrics.jsonl`` says of a round."""

    round: int
    clients: int  # whose updates were used
    epsilon: Any


class Claims:
    """The files of a run folder; those that cannot be read are among ``problems``."""

    def __init__(self, folder: Path) -> None:
        """Read everything but the ledger."""
        self.folder = folder
        self.problems: list[str] = []
        self.summary = self._object(folder / "summary.json")
        self.run: str | None = self._object(folder / "env.json").get("run")
        self.lines = self._metrics(folder / "metrics.jsonl")
        self.anchors = self._anchors()

    @property
    def ledger(self) -> Path:
        """The file that the run's configuration names."""
        try:
            config = OmegaConf.load(self.folder / "config.yaml")
            named = OmegaConf.select(config, "privacy.ledger")
        except (OSError, ValueError, OmegaConfBaseException):
            named = None
        return (Path(str(named)) if named else self.folder / "ledger") / FILE

    @property
    def apart(self) -> list[Path]:
        """The ledgers of clients that keep one each, where they can be seen from here."""
        return sorted(self.ledger.parent.glob(f"*/{FILE}"))

    @property
    def far(self) -> bool:
        """Whether clients were in processes of their own, which keep the ledgers."""
        privacy = self.summary.get("privacy")
        protected = str(privacy.get("protected")) if isinstance(privacy, dict) else ""
        elsewhere = self.summary.get("engine") in ("ray", "deployment")
        return elsewhere and protected.startswith("one record")

    @property
    def last(self) -> int:
        """The last round of ``metrics.jsonl``; 0 where there is none."""
        return self.lines[-1].round if self.lines else 0

    @property
    def completed(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.get("status") == "completed"

    def _object(self, path: Path) -> dict[str, Any]:
        """Return a file's JSON object, or {}: without a word where there is no file."""
        try:
            found = json.loads(path.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("it holds no object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append(f"{path} cannot be read: {error}")
            return {}
        return found

    def _metrics(self, path: Path) -> list[Line]:
        try:
            found = [
                Line(int(line["round"]), int(line["clients"]), line["epsilon"])
                for line in JsonLines(path).read()
            ]
            if any(a.round >= b.round for a, b in pairwise(found)):
                raise ValueError("its rounds do not rise")
        except (OSError, KeyError, TypeError, ValueError) as error:
            self.problems.append(f"{path} cannot be read: {type(error).__name__} {error}")
            return []
        return found

    def _anchors(self) -> dict[str, Head]:
        """Return the ledger's heads that the folder remembers, by who does."""
        said = {"summary.json": self.summary} if self.summary else {}
        for path in sorted(self.folder.glob("checkpoints/round_*/checkpoint.json")):
            said[path.parent.name] = self._object(path)
        anchors: dict[str, Head] = {}
        if self.far:
            return {}
        for name, content in said.items():
            try:
                anchors[name] = Head.of(content.get("ledger"))
            except LedgerError as error:
                self.problems.append(f"{name}: {error}")
        return anchors
