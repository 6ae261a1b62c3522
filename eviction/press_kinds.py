"""Which presses of kvpress can run, and what each of them is asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

# Why a press cannot run, by the class that makes it so; subclasses are refused with it.
_OWN_EVICTIONS = "evicts while tokens are generated, which evict() does itself after every `buffer` tokens"
REFUSED = {
    "ThinKPress": "zeroes channels of the keys and evicts no entry",
    "KeyRerotationPress": "rotates the keys that it keeps to new positions, and a cache here keeps every key as it was "
    "written: give the press inside it",
    "MergingPress": "adds what it evicts to the values that it keeps: give the press inside it",
    "FinchPress": "cuts a delimiter token out of the prompt while the model runs; SnapKVPress has a window too",
    "KVzipPress": "runs the model over the prompt again to score it",
    "KVComposePress": "runs the model over the prompt again to score it",
    "DecodingPress": f"{_OWN_EVICTIONS}: give its base_press",
    "PrefillDecodingPress": f"{_OWN_EVICTIONS}: give its prefilling_press",
    "ComposedPress": "chains presses that have a ratio each, which one budget cannot set: give one of them",
}
# What a press loads for a model in `post_init_from_model`.
LOADED = {
    "DuoAttentionPress": "streaming_mask",
    "ExpectedAttentionStatsPress": "mu",
    "FastKVzipPress": "gates",
    "KVzapPress": "kvzap_model",
    "LUKVPress": "_budget_curves",
    "QFilterPress": "q_filters",
}


def kind_of(press: Any) -> str:
    """What a press is asked.

    Returns:
        "scores": its scores; a head keeps its best.
        "heads": the scores of the press inside it; the heads of a layer compete (AdaKV).
        "gates": scores that are comparable between layers (Fast KVzip).
        "threshold": the scores of the press inside it, of which low ones are never kept (DMS).
        "choice": which entries it keeps.
        "layers": which entries the press inside it keeps at the layer's own ratio.
        "": nothing, it does something else.
    """
    hook, call, compress = (_definer(press, name) for name in ("forward_hook", "__call__", "compress"))
    special = {"DMSPress": "threshold", "PerLayerCompressionPress": "layers", "FastKVzipPress": "gates"}
    if hook in special and call in ("BasePress", hook):
        return special[hook]
    if hook != "BasePress" or call != "BasePress" or compress == "BasePress":
        return ""
    return {"ScorerPress": "scores", "AdaKVPress": "heads"}.get(compress, "choice")


def refuse(press: Any) -> None:
    """Raises ValueError if the press, or one inside it, does more than select entries of a prompt."""
    for part in parts_of(press):
        names = class_names(part)
        reason = next((REFUSED[name] for name in names if name in REFUSED), "")
        if not reason and not kind_of(part):
            reason = "runs by hooks of its own; presses with a score() or compress() of their own are accepted"
        elif "DMSPress" in names and part.decoding:
            reason = f"{_OWN_EVICTIONS}: set decoding=False"
        elif "DMSPress" in names and part.threshold is None:
            reason = "has no threshold: give DMSPress(press, threshold=…)"
        if reason:
            raise ValueError(f"{type(part).__name__} cannot run under evict(): it {reason}")


def require_loaded(press: Any) -> None:
    """Raises ValueError if the press, or one inside it, has not loaded what it needs for a model."""
    for part in parts_of(press):
        for name in class_names(part):
            if name in LOADED and getattr(part, LOADED[name], None) is None:
                raise ValueError(f"{name} needs its {LOADED[name]} for a model: give from_press(press, model)")


def class_names(press: Any) -> list[str]:
    """The names of its class and of those that one inherits from, nearest first."""
    return [kind.__name__ for kind in type(press).__mro__]


def _definer(press: Any, method: str) -> str:
    return next(kind.__name__ for kind in type(press).__mro__ if method in vars(kind))


def parts_of(press: Any) -> Iterator[Any]:
    """A press and those inside it."""
    yield press
    for value in vars(press).values():
        if _is_press(value):
            yield from parts_of(value)


def copied(press: Any) -> Any:
    """A copy whose options, and those of the presses inside it, may be set; tensors and modules are shared."""
    twin = copy.copy(press)
    for name, value in vars(press).items():
        if _is_press(value):
            vars(twin)[name] = copied(value)
        elif isinstance(value, dict | list):
            vars(twin)[name] = copy.copy(value)
    return twin


def described(value: Any) -> str:
    """A press's class and options as text, without its ratio; what is no plain value by its identity."""
    if _is_press(value):
        options = {name: one for name, one in vars(value).items() if name != "compression_ratio"}
        return f"{type(value).__name__}({', '.join(f'{name}={described(one)}' for name, one in options.items())})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {described(one)}' for name, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(described, value))}]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return f"<{type(value).__name__} {id(value):#x}>"


def _is_press(value: Any) -> bool:
    from kvpress import BasePress  # pyright: ignore[reportMissingImports]

    return isinstance(value, BasePress)
