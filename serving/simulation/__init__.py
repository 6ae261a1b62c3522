"""A simulator of serving: the real tree, tiers, scheduler and policies on a virtual clock, with phantom KV."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving', not {__name__!r}: a second name would give duplicate classes")
