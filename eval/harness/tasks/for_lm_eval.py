"""Functions for the YAML files of this folder; lm-eval runs this file by its path, so it imports by the full name."""

from tenure.eval.harness.generated_tasks import build, process_results
from tenure.eval.harness.turn_tasks import build_turns, process_turn

__all__ = ["build", "build_turns", "process_results", "process_turn"]
