"""lm-eval with an evicting model: the model type `tenure`, its registration, and the contexts of known tasks."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .boundary import KNOWN, Boundaries
from .options import Options
from .registration import register, tasks_folder

__all__ = ["KNOWN", "Boundaries", "Options", "register", "tasks_folder"]
