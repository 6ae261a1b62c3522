"""The generated tasks as lm-eval's YAML; `tasks_folder()` of the package above is the value for `--include_path`."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")
