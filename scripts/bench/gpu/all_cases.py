"""The list of timed kernels and shapes: those of a layer of Qwen3-4B and Llama-3.1-8B, see docs/results/kernels.md."""

from __future__ import annotations

from .after_prompt_cases import AfterPrompt
from .case import LAYERS, KernelBenchCase
from .decoding import Append, RaggedDecode
from .evicting import Compaction, DefensiveScores, Selection, ValueNorms
from .moving import TierCopies
from .training import GatedAttention, Occupancy

CONTEXTS = (4096, 32768, 131072)
KEPT = (0.1, 0.2, 0.5)
SAMPLES = 64  # positions whose occupancy training looks at
QUICK = 32768  # the longest context with --quick


def all_cases(quick: bool) -> list[KernelBenchCase]:
    """In the order in which they are timed; the longest contexts come last."""
    cases = [case for length in CONTEXTS if length <= QUICK for case in _of_length(length)]
    return cases if quick else [*cases, *(case for length in CONTEXTS if length > QUICK for case in _of_length(length))]


def _of_length(n: int) -> list[KernelBenchCase]:
    first = n == CONTEXTS[0]
    cases: list[KernelBenchCase] = [GatedAttention(n), GatedAttention(n, backward=True)]
    cases += [AfterPrompt(n, bias) for bias in (False, True)]
    cases += [RaggedDecode(n, share) for share in KEPT]
    cases += [RaggedDecode(n, 0.2, q_len=16), Append(n, 1), Append(0, n), Compaction(n), DefensiveScores(n)]
    cases += [TierCopies(n, way) for way in ("gather", "scatter", "offload")]
    for model in LAYERS:
        cases += [Selection(model, n), ValueNorms(model, n)]
        cases += [Occupancy(model, n, SAMPLES, backward) for backward in (False, True)]
        if not first:
            cases += [Occupancy(model, n, None, backward) for backward in (False, True)]
    if first:
        cases.append(Occupancy("Qwen3-4B", n))
    return cases
