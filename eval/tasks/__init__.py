"""Long-context tasks over given texts, of any exact length: retrieval, RULER's tasks, dialogues and recall."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")
