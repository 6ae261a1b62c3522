"""`tenure bench kvpress`: compare the entries that each policy keeps with kvpress, run in a separate Python."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..output import write_rows
from .benching import BenchRow, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...eviction import Policy

# Where agreement need not be complete, and why.
REASONS = {
    "lagkv": "ties: what must stay scores 1, ranks repeat",
    "pyramidkv": "kvpress's average is no whole number",
}
DEFENSIVE = ("defensive", "layer_defensive")  # by a press of our own


@dataclass
class KvpressBenchConfig:
    """Compare the entries that each policy keeps of essay prompts with kvpress.

    kvpress has no DefensiveKV: a press of our own, written from the released rules, stands in for it there.

    kvpress pins an older transformers: make an environment for it (`python -m venv kvp; kvp/bin/pip install kvpress`)
    and give its Python. Both sides run the same prompts in float32 without protected tokens.
    """

    python: Annotated[Path, tyro.conf.arg(metavar="PYTHON")]
    """Python of an environment that has kvpress."""
    model: str = "demo"
    """Local folder, or `demo`."""
    prompts: int = 3
    """Number of essays of the evaluation split."""
    tokens: int = 1024
    """Tokens per essay."""
    shares: tuple[float, ...] = (0.2, 0.35, 0.5)
    """Shares of the entries to keep."""
    json: str | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if min(self.prompts, self.tokens) < 1:
            raise ValueError("--prompts and --tokens accept 1 or more")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"--shares accepts numbers between 0 and 1, got {self.shares}")


def main(config: KvpressBenchConfig) -> int:
    from ...training.assets import essays, resolve_model
    from ..loading import load_model

    model, tokenizer = load_model(config.model, device="cpu", dtype="float32")
    texts = [document.text for document in essays("eval")]
    prompts = [ids for text in texts if len(ids := tokenizer(text).input_ids) >= config.tokens][: config.prompts]
    if len(prompts) < config.prompts:
        raise ValueError(f"only {len(prompts)} essays have {config.tokens} tokens; --prompts asks for {config.prompts}")
    prompts = [ids[: config.tokens] for ids in prompts]
    theirs = kept_by_kvpress(config.python, str(resolve_model(config.model)), prompts, config.shares)
    ours = list(kept_by_us(model, prompts, config.shares))
    rows = [
        BenchRow(
            f"{name}/{share:.0%}",
            mean,
            None,
            least,
            "same",
            config.prompts,
            REASONS.get(name, ">= 0.99"),
        )
        for name in theirs[0]
        for index, share in enumerate(config.shares)
        for mean, least in [agreement([one[name][index] for one in ours], [one[name][index] for one in theirs])]
    ]
    title = f"{config.model}: of what kvpress keeps of {config.tokens} tokens, what tenure keeps; ratio: worst layer"
    show(rows, title)
    if config.json:
        write_rows(rows, config.json)
    return 0


def agreement(ours: list[list[list[list[int]]]], theirs: list[list[list[list[int]]]]) -> tuple[float, float]:
    """Share of kvpress's kept entries that tenure keeps too: overall, and in the worst layer of any prompt.

    Args:
        ours, theirs: `[prompt][layer][head]` lists of positions.
    """
    layers = []
    for one, other in zip(ours, theirs, strict=True):
        for mine, other_heads in zip(one, other, strict=True):
            common = sum(len(set(a) & set(b)) for a, b in zip(mine, other_heads, strict=True))
            layers.append((common, sum(map(len, other_heads))))
    return sum(c for c, _ in layers) / sum(n for _, n in layers), min(c / n for c, n in layers)


def policies() -> dict[str, Policy]:
    """The policy for each name of `kvpress_kept.presses`."""
    from ...eviction import H2O, get_policy

    names = ("snapkv", "adakv", "criticalkv", "ada_criticalkv", "pyramidkv", "expected_attention")
    names += ("keydiff", "lagkv", "knorm", "tova", "streaming_llm", *DEFENSIVE)
    return {name: get_policy(name) for name in names} | {"observed_attention": H2O(recent=0.0, average=True)}


def kept_by_us(
    model: PreTrainedModel, prompts: list[list[int]], shares: tuple[float, ...]
) -> Iterator[dict[str, list]]:
    """`[policy][share][layer][head]` lists of kept positions, for each prompt."""
    import torch

    from ...eviction import evict
    from ...eviction.presets import make_plan

    for prompt in prompts:
        kept: dict[str, Any] = {}
        with torch.no_grad(), evict(model, "full", observe=policies().values()) as session:
            cache = session.new_cache()
            session.extend(cache, prompt, logits_to_keep=1)
            for name, policy in policies().items():
                kept[name] = []
                for share in shares:
                    fork = cache.fork()
                    if name in DEFENSIVE:  # whole entries of all heads that compete, as its code counts them
                        fork.plan = make_plan(policy, share, preset="defensivekv")
                        fork.compress()
                    else:
                        fork.compress(policy, share, sinks=0, recent=0)
                    layers = [fork.kept(index)[0] for index in fork.report().layer_indices]
                    kept[name].append([[head.tolist() for head in layer] for layer in layers])
        yield kept


def kept_by_kvpress(
    python: Path, model: str, prompts: list[list[int]], shares: tuple[float, ...]
) -> list[dict[str, list]]:
    """The same for each prompt, from `kvpress_kept` in another Python.

    Raises:
        ValueError: that Python does not run it; the message ends with the last line it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder, "job.json"), Path(folder, "out.json")
        job.write_text(json.dumps({"model": model, "prompts": prompts, "shares": shares}))
        script = Path(__file__).with_name("kvpress_kept.py")
        try:
            done = subprocess.run([str(python), "-I", str(script), str(job), str(out)], capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"--python {python} cannot be run: {error}") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ValueError(f"--python {python} could not run kvpress: {last}")
        return json.loads(out.read_text())
