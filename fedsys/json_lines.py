"""A file with a JSON object a line, one for each round, written as a run goes."""

import json
import math
import os
from pathlib import Path
from typing import Any

from fedsys.errors import RunError

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class JsonLines:
    """A log of rounds; a line that a crash tore is as if it had not been written."""

    def __init__(self, path: Path) -> None:
        """Touch nothing yet."""
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; raises ``RunError`` when it cannot be written."""
        try:
            with self.path.open("a") as file:
                file.write(strict(line) + "\n")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error}") from error

    def read(self) -> list[dict[str, Any]]:
        """Return the lines, their numbers as they were; none when there is no file."""
        if not self.path.exists():
            return []
        lines = []
        with self.path.open() as file:
            for text in file:
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    break
                lines.append(with_numbers(line))
        return lines

    def keep(self, last_round: int) -> None:
        """Drop the lines of rounds after ``last_round``, and a torn one."""
        if self.path.exists():
            kept = [line for line in self.read() if line["round"] <= last_round]
            write_whole(self.path, "".join(strict(line) + "\n" for line in kept))


def strict(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as JSON, which has no infinity: "inf", "-inf" and "nan" stand for them."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def with_numbers(line: Any) -> Any:
    """Return an object with the numbers that ``strict`` wrote as text."""
    if not isinstance(line, dict):
        return line
    return {n: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for n, v in line.items()}


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
