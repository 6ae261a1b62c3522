"""Random load with fault injection on the serving system; run from a checkout, not installed."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.scripts.soak', not {__name__!r}: a second name would give duplicate classes")
