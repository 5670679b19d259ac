"""A trained model on disk: an adapter in the layout of PEFT, or whole, read back and checked."""

from fedsys.exports.reading import check_export, read_export
from fedsys.exports.writing import write_adapter, write_merged

__all__ = ["check_export", "read_export", "write_adapter", "write_merged"]
