"""Tables of csv, tsv, jsonl, json and parquet files, each also gzipped.

A file that is not what its extension says raises DataError with file, line and what was expected.
"""

import csv
import difflib
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import DataError

Column = list[Any]


@dataclass(frozen=True)
class Table:
    """Columns of a file, and where each row stands in it."""

    name: str
    columns: dict[str, Column]
    places: Sequence[int]  # 1-based
    unit: str = "line"
    label_names: dict[str, str] = field(default_factory=dict)  # where the source names its labels

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)

    def subset(self, rows: NDArray[np.int64]) -> "Table":
        """Return the table that holds ``rows`` only."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, places=[self.places[i] for i in rows])

    def label_name(self, value: str) -> str:
        """Return what a label is called."""
        return self.label_names.get(value, value)

    def where(self, row: int) -> str:
        """Return the place of ``row`` as a reader would look for it."""
        return f"{self.name}, {self.unit} {self.places[row]}"

    def texts(self, column: str) -> list[str]:
        """Return ``column`` as strings; DataError where a value is neither text nor a number."""
        values = self.columns[column]
        for row, value in enumerate(values):
            if not isinstance(value, str | int | float):
                kind = "null" if value is None else type(value).__name__
                raise DataError(f"{self.where(row)}: {column!r} is {kind}, expected text")
        return [str(value) for value in values]

    def keys(self, column: str) -> np.ndarray:
        """Return ``column`` as an array (n,) of integers or strings that can be grouped by."""
        values = self.columns[column]
        if all(type(value) is int for value in values):
            return np.array(values, dtype=np.int64)
        return np.array(self.texts(column))


def no_column(name: str, missing: str, present: Sequence[str]) -> DataError:
    """Return the error for a column that ``name`` lacks, with the nearest that it has."""
    near = difflib.get_close_matches(missing, present, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"{name} has no column {missing!r}, only {', '.join(present)}{hint}")


def extension(path: Path) -> str:
    """Return the extension in lower case without ``.gz``, such as ``.csv``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")


def file_problems(field: str, path: str, extensions: Sequence[str]) -> list[str]:
    """Return why ``path`` cannot be read: no such file, or an extension that nobody knows."""
    file = Path(path)
    if extension(file) not in extensions:
        return [f"{field}: {path} has an unknown extension, expected {', '.join(extensions)}"]
    if not file.is_file():
        return [f"{field}: there is no file {path}"]
    return []


def read_table(path: str, needed: Sequence[str]) -> Table:
    """Return the columns ``needed`` of the file at ``path``."""
    problems = file_problems("path", path, EXTENSIONS)
    if problems:
        raise DataError(problems[0])
    table = _READERS[extension(Path(path))](path, needed)
    if len(table) == 0:
        raise DataError(f"{path} is empty, expected at least one row")
    return table


def read_bytes(path: str) -> bytes:
    """Return the content of a file, decompressed if its name ends in ``.gz``."""
    try:
        if not path.lower().endswith(".gz"):
            return Path(path).read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is no complete gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _text(path: str) -> str:
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: expected UTF-8, {error.reason}") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: texts may hold the other line separators that it knows.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _csv_records(path: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # documents may be long
    start = 1
    try:
        for record in reader:
            if record:
                yield start, record
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _tsv_records(path: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(_text(path)):
        yield number, line.split("\t")


def _delimited(path: str, needed: Sequence[str], records: Iterator[tuple[int, list[str]]]) -> Table:
    header = next(records, (1, []))[1]
    if not header:
        raise DataError(f"{path} is empty, expected a line of column names")
    for name in needed:
        if name not in header:
            raise no_column(path, name, header)
    rows, places = [], []
    for place, record in records:
        if len(record) != len(header):
            expected = f"expected {len(header)} fields ({', '.join(header)})"
            raise DataError(f"{path}, line {place}: {expected}, found {len(record)}")
        rows.append(record)
        places.append(place)
    indices = {name: header.index(name) for name in needed}
    return Table(path, {n: [row[i] for row in rows] for n, i in indices.items()}, places)


def _objects(path: str, needed: Sequence[str], rows: list[Any], table: Table) -> Table:
    present: list[str] = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{table.where(index)}: expected an object, found {row!r:.40}")
        present = present or list(row)
        for name in needed:
            if name in row:
                continue
            if index == 0:
                raise no_column(path, name, present)
            raise DataError(
                f"{table.where(index)}: expected the keys of row 1, {name!r} is missing"
            )
    table.columns.update({name: [row[name] for row in rows] for name in needed})
    return table


def _read_jsonl(path: str, needed: Sequence[str]) -> Table:
    rows, places = [], []
    for number, line in _lines(_text(path)):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: expected one JSON object a line, {error.msg} at"
                f" character {error.pos + 1}"
            ) from error
        places.append(number)
    return _objects(path, needed, rows, Table(path, {}, places))


def _read_json(path: str, needed: Sequence[str]) -> Table:
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path} is empty, expected a JSON array of objects")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: bad JSON, {error.msg}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}, line 1: expected a JSON array of objects (json lines: .jsonl)")
    places = range(1, len(rows) + 1)
    return _objects(path, needed, rows, Table(path, {}, places, unit="element"))


def _read_parquet(path: str, needed: Sequence[str]) -> Table:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f'{path} needs pyarrow: pip install "fedsys[text]"') from error
    try:
        file = parquet.ParquetFile(pa.BufferReader(read_bytes(path)))
        for name in needed:
            if name not in file.schema_arrow.names:
                raise no_column(path, name, file.schema_arrow.names)
        table = file.read(columns=list(needed))
    except pa.ArrowException as error:
        raise DataError(f"{path} is no readable parquet file: {error}") from error
    columns = {name: table.column(name).to_pylist() for name in needed}
    return Table(path, columns, range(1, file.metadata.num_rows + 1), unit="row")


_READERS: dict[str, Callable[[str, Sequence[str]], Table]] = {
    ".csv": lambda path, needed: _delimited(path, needed, _csv_records(path)),
    ".tsv": lambda path, needed: _delimited(path, needed, _tsv_records(path)),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
EXTENSIONS = tuple(_READERS)
