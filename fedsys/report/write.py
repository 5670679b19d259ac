"""From a folder to its report."""

from pathlib import Path

from fedsys.errors import ConfigError
from fedsys.json_lines import write_whole
from fedsys.report.page import Page, as_html
from fedsys.report.run import page_of_run
from fedsys.report.sweep import page_of_sweep
from fedsys.sweeps.results import INDEX, read, write_table

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Write report.html of the run or sweep in ``folder``, and its pictures; return its path.

    A run that is not complete is reported as far as it went. Raises ``ConfigError`` for any other
    folder, ``ModuleNotFoundError`` without matplotlib and Jinja.
    """
    path = folder / REPORT
    write_whole(path, as_html(_page(folder)))
    return path


def _page(folder: Path) -> Page:
    if (folder / INDEX).is_file():
        results = read(folder)
        write_table(results)
        return page_of_sweep(results)
    if (folder / "config.yaml").is_file():
        return page_of_run(folder)
    raise ConfigError(
        [f"{folder}: is the folder of no run and no sweep, it has no config.yaml and no {INDEX}"]
    )
