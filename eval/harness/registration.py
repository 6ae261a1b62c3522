"""`import tenure.eval` makes lm-eval know the model type `tenure`, without importing lm-eval itself.

lm-eval finds models in a registry that other packages can only fill from Python. If lm-eval has filled it already, the
model type is added at once; if not, a finder on `sys.meta_path` waits for `lm_eval.models`, where lm-eval fills it,
adds the model type right after that, and is gone. The registry gets the name of a class, which is loaded when it is
asked for.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

MODEL_TYPE = "tenure"
_FILLED_BY = "lm_eval.models"


def tasks_folder() -> Path:
    """The folder of the tasks' YAML files, for lm-eval's `--include_path` and `TaskManager(include_path=...)`."""
    return Path(__file__).resolve().parent / "tasks"


def register() -> None:
    """Adds the model type to lm-eval's registry, now or as soon as there is one; more calls change nothing."""
    module = sys.modules.get(_FILLED_BY)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _add()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _add() -> None:
    from lm_eval.api import registry

    if MODEL_TYPE not in registry.model_registry:
        registry.model_registry.register(MODEL_TYPE, target=f"{__package__}.model:TenureLM")


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds `lm_eval.models` as the other finders do, once, with a loader that adds the model type afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _FILLED_BY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AddingLoader(spec.loader)
        return spec


class _AddingLoader(importlib.abc.Loader):
    """A loader that adds the model type when the module has been executed."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _add()
