"""Long-context tasks that are generated: RULER's kinds, dialogues and recall, over given text, of any exact length."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")
