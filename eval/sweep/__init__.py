"""Many cells on many cases, resumable: the settings, the units of work, and the folder of their records."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .process_pool import run_units
from .sweep_config import SweepConfig
from .sweep_folder import SweepFolder
from .units import Failure, Unit, UnitRunner, all_units, export_cases

__all__ = ["Failure", "SweepConfig", "SweepFolder", "Unit", "UnitRunner", "all_units", "export_cases", "run_units"]
