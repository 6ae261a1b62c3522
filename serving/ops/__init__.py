"""Operations of the tiers: Triton kernels on CUDA, each with a plain twin that runs elsewhere."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving.ops', not {__name__!r}: a second name would give duplicate classes")
