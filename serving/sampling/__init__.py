"""Sampling of next tokens: parameters, one batched sampler, and the end of an answer by tokens or text."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving.sampling', not {__name__!r}: that would duplicate its classes")
