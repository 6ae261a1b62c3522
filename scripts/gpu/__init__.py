"""What `bench_gpu` times: a case for each kernel, the card's ceilings, and the stopwatch."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.scripts.gpu', not {__name__!r}: a second name would give duplicate classes")
