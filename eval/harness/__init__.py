"""lm-eval with an evicting model: the model type `tenure`, its registration, and the contexts of known tasks."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from typing import TYPE_CHECKING

from tenure.lazy_names import lazy_names

from .boundary import KNOWN, Boundaries
from .registration import register, tasks_folder

if TYPE_CHECKING:
    from .options import Options

__all__ = ["KNOWN", "Boundaries", "Options", "register", "tasks_folder"]

# Imported on first use, as it needs torch.
_NAMES = {
    "options": "Options",
}
__getattr__ = lazy_names(__name__, _NAMES)
