"""Cases of `bench_gpu`, one per kernel, with the card's measured ceilings and the stopwatch."""

if not __name__.startswith("tenure."):
    raise ImportError(
        f"import 'tenure.scripts.bench.gpu', not {__name__!r}: a second name would give duplicate classes"
    )
