"""Many runs that differ in a few keys: a grid, its runs, and what came of them."""

from fedsys.sweeps.results import Results, read
from fedsys.sweeps.sweep import sweep
from fedsys.sweeps.tables import by_seed, failures

__all__ = ["Results", "by_seed", "failures", "read", "sweep"]
