"""Benchmarks, comparisons with other libraries and compiled kernels; run from a checkout, not installed."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.scripts.bench', not {__name__!r}: a second name would give duplicate classes")
