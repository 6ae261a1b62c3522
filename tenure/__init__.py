"""Learned KV-cache eviction: train retention gates, generate and serve with only the entries that earned tenure.

The names below are imported from their packages on first use, so that `import tenure` stays fast and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenure.eviction import (
        Budget,
        Policy,
        RaggedCache,
        Session,
        evict,
        get_policy,
        policy_names,
    )
    from tenure.retention import CheckpointInfo, RetentionConfig, RetentionGates, attach
    from tenure.serving import (
        AgentSpec,
        Compression,
        EdgeSpec,
        Engine,
        Request,
        StepGraph,
        WorkflowSpec,
        build_system,
        system_names,
    )
    from tenure.training import TrainConfig, train

    __version__: str

__all__ = [
    "AgentSpec",
    "Budget",
    "CheckpointInfo",
    "Compression",
    "EdgeSpec",
    "Engine",
    "Policy",
    "RaggedCache",
    "Request",
    "RetentionConfig",
    "RetentionGates",
    "Session",
    "StepGraph",
    "TrainConfig",
    "WorkflowSpec",
    "__version__",
    "attach",
    "build_system",
    "evict",
    "get_policy",
    "policy_names",
    "system_names",
    "train",
]

_MODULES = {
    "retention": ("CheckpointInfo", "RetentionConfig", "RetentionGates", "attach"),
    "training": ("TrainConfig", "train"),
    "eviction": ("Budget", "Policy", "RaggedCache", "Session", "evict", "get_policy", "policy_names"),
    "serving": (
        "AgentSpec",
        "Compression",
        "EdgeSpec",
        "Engine",
        "Request",
        "StepGraph",
        "WorkflowSpec",
        "build_system",
        "system_names",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tenure")
    except PackageNotFoundError:
        return "0+unknown"
