"""The runs of a table, after their processes have ended."""

from fedsys.errors import RunError
from fedsys.reproduction.jobs import Job, Outcome, outcome
from fedsys.sweeps.processes import end_of_log, log_of


def finished(job: Job) -> Outcome:
    """Return what is left of a run that must be over."""
    found = outcome(job.folder)
    if found is None:
        said = "".join(f"\n  {line}" for line in end_of_log(job.folder, 5))
        ends = f", which ends:{said}" if said else ""
        raise RunError(f"{job.row.name}, seed {job.seed}: its log is {log_of(job.folder)}{ends}")
    return found
