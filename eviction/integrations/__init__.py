"""Adapters to other libraries of KV-cache eviction."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eviction.integrations', not {__name__!r}: that would duplicate its classes")
