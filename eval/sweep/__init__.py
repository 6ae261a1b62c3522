"""Many cells on many cases, resumable: what is swept, how units of work run, and how their records are kept."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .config import SweepConfig
from .export import export_cases
from .pool import run_units
from .store import Store
from .units import Failure, Unit, all_units
from .work import UnitRunner

__all__ = ["Failure", "Store", "SweepConfig", "Unit", "UnitRunner", "all_units", "export_cases", "run_units"]
