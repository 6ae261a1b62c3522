"""Registry of policies by name."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from tenure.documents import shown, shown_name

from .policy import Policy

_CLASSES: dict[str, type[Policy]] = {}  # by name; filled by the package, before any of its modules can be imported


def register(*classes: type[Policy]) -> None:
    """Makes policies known by their names."""
    _CLASSES.update((policy.name, policy) for policy in classes)


def policy_names() -> tuple[str, ...]:
    """The names that `get_policy` accepts."""
    return tuple(sorted(_CLASSES))


def get_policy(policy: str | Policy, **options: Any) -> Policy:
    """The policy of that name, or an instance, with these options; others keep their values.

    Args:
        policy: a name, with or without options: "snapkv", "snapkv(window=16)", "defensive(value_norm=raw)".

    Raises:
        ValueError: no such policy, or no such option of it; the message lists those known.
    """
    if isinstance(policy, str):
        name, given = _parsed(policy)
        if name not in _CLASSES:
            raise ValueError(
                f"unknown policy {shown(name)}; known: {', '.join(policy_names())}, or an instance of Policy"
            )
        chosen, options = _CLASSES[name](), given | options
    elif isinstance(policy, Policy):
        chosen = policy
    else:
        raise ValueError(
            f"got {shown(policy)} as the policy; accepted: {', '.join(policy_names())}, or an instance of Policy"
        )
    known = [field.name for field in fields(chosen)]  # type: ignore[arg-type]  # policies are dataclasses
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"policy {chosen.name!r} has no option {', '.join(map(shown_name, unknown[:10]))}; known: "
            f"{', '.join(known) or 'none'}"
        )
    return replace(chosen, **options) if options else chosen  # type: ignore[type-var]


def policy_text(policy: Policy) -> str:
    """Text from which `get_policy` makes the policy: its name, with non-default options in brackets."""
    plain = type(policy)()
    changed = {one.name: getattr(policy, one.name) for one in fields(policy)}  # type: ignore[arg-type]
    changed = {name: value for name, value in changed.items() if value != getattr(plain, name)}
    options = ",".join(f"{name}={value}" for name, value in changed.items())
    return f"{policy.name}({options})" if options else policy.name


MAX_TEXT = 1000  # characters of a policy with its options
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False}
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The name, and the options of its brackets: numbers, True, False, None, or words."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text) if len(text) <= MAX_TEXT else None
    if match is None:
        raise ValueError(f"policy {shown(text)} is not understood: give a name, or NAME(OPTION=VALUE,...)")
    options = {}
    for part in filter(None, map(str.strip, (match[2] or "").split(","))):
        option, equals, value = map(str.strip, part.partition("="))
        if not equals or not value:
            raise ValueError(f"policy {shown(text)} is not understood at {shown(part)}: options are OPTION=VALUE")
        options[option] = _value(value)
    return match[1], options


def _value(text: str) -> Any:
    """A number, True, False, None, or the word itself, with or without quotes."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
