"""A paper's figures with ours beside them: tables of runs, the runs, and what is to be said."""

from fedsys.reproduction.result import Result
from fedsys.reproduction.runs import reproduce
from fedsys.reproduction.show import keep, listing, sections
from fedsys.reproduction.tables import Table, every, find
from fedsys.sweeps.processes import cores

__all__ = ["Result", "Table", "cores", "every", "find", "keep", "listing", "reproduce", "sections"]
