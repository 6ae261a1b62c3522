"""Continuous batching over the tiers, without a model and without a clock of its own."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving.scheduler', not {__name__!r}: that would duplicate its classes")
