"""Storage of a layer's entries in contiguous segments or pages, and attention over either."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eviction.storage', not {__name__!r}: that would duplicate its classes")
