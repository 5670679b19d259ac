"""report.html: what a run or a sweep has found, on one page that needs nothing else."""

from fedsys.report.write import write_report

__all__ = ["write_report"]
