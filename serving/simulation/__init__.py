"""Simulates serving: the real cache, scheduler and policies on a virtual clock, with payloads without data."""

if not __name__.startswith("tenure."):
    raise ImportError(
        f"import 'tenure.serving.simulation', not {__name__!r}: a second name would give duplicate classes"
    )
