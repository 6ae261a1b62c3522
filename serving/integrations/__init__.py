"""Other libraries: clients that declare an agent framework's step graph at the server and name its calls."""

if not __name__.startswith("tenure."):
    raise ImportError(
        f"import 'tenure.serving.integrations', not {__name__!r}: a second name would give duplicate classes"
    )
