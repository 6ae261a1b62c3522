"""The `tenure` command and its sub-commands, one module each."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.scripts', not {__name__!r}: a second name would give duplicate classes")
