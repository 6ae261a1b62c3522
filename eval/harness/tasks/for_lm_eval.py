"""Functions for the YAML files of this folder; lm-eval runs this file by its path, so it imports by the full name."""

from tenure.eval.harness.generated_tasks import build, process_results

__all__ = ["build", "process_results"]
