"""Step graphs: declared workflows, their running state, steps to execution and expected reuse."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving.workflow', not {__name__!r}: that would duplicate its classes")
