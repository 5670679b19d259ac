"""Text from the Hugging Face hub, or from any folder that ``datasets.load_dataset`` reads."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from fedsys.data.tables import Table, no_column
from fedsys.data.text import TextColumns
from fedsys.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Hub(TextColumns):
    """Text of a data set that ``datasets`` loads by ``path`` and ``name``.

    Evaluation rows come from ``eval_split``, of ``eval_path`` if that is given; without either
    they are held out of the training rows.
    """

    path: str  # a hub id or a local folder
    name: str | None = None  # the configuration, such as sst2 of glue
    split: str = "train"
    eval_path: str | None = None
    eval_split: str | None = None

    def check(self) -> list[str]:
        """Return the problems that can be found without loading."""
        problems = super().check()
        if importlib.util.find_spec("datasets") is None:
            problems.append('data=hf needs the package datasets: pip install "fedsys[text]"')
        return problems

    def read(self, needed: Sequence[str]) -> tuple[Table, Table | None]:
        """Return the tables of both splits; evaluation keeps only the columns it has use for."""
        own = None
        if self.eval_path is not None or self.eval_split is not None:
            path, split = self.eval_path or self.path, self.eval_split or self.split
            own = self._table(path, split, self._columns())
        return self._table(self.path, self.split, needed), own

    def _table(self, path: str, split: str, needed: Sequence[str]) -> Table:
        import datasets  # slow to import, and not there on an edge client

        name = f"{path}{f' ({self.name})' if self.name else ''}, split {split}"
        try:
            data = datasets.load_dataset(path, self.name, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{name} cannot be loaded: {error}") from error
        for column in needed:
            if column not in data.column_names:
                raise no_column(name, column, data.column_names)
        if len(data) == 0:
            raise DataError(f"{name} is empty, expected at least one row")
        label = data.features.get(self.label) if self.label else None
        classes = label.names if isinstance(label, datasets.ClassLabel) else []
        return Table(
            name,
            {column: list(data[column]) for column in needed},
            range(1, len(data) + 1),
            unit="row",
            label_names={str(index): text for index, text in enumerate(classes)},
        )
