"""The prefix cache in tiers: radix tree, eviction policies and queues, pools, transfers."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving.kvcache', not {__name__!r}: that would duplicate its classes")
