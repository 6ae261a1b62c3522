"""lm-eval with an evicting model: the model type `tenure`, its registration, and the contexts of known tasks."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from typing import TYPE_CHECKING, Any

from .boundary import KNOWN, Boundaries
from .registration import register, tasks_folder

if TYPE_CHECKING:
    from .options import Options

__all__ = ["KNOWN", "Boundaries", "Options", "register", "tasks_folder"]

# Imported on first use, as it needs torch.
_NAMES = {
    "options": "Options",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value
