"""Operations of the eviction runtime: Triton kernels on CUDA and C kernels for the CPU, with plain twins."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eviction.ops', not {__name__!r}: a second name would give duplicate classes")
