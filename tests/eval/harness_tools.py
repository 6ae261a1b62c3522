"""A tiny model on disk and tasks over local files, for the tests of lm-eval's model type `tenure`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXT = "day crew ship weather captain wrote down what happened else nothing was like the On"
WORDS = TEXT.split()


def passage(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_tasks(folder: Path) -> Path:
    """Three tasks over local JSON files: generation, multiple choice and perplexity."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "context": passage(number, 60 + 17 * number),
            "question": f"What did crew {number} write?",
            "answer": WORDS[number],
            "choices": [" day crew", " nothing", " the ship was like"],
        }
        for number in range(5)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {folder / "datasets"}
test_split: test
num_fewshot: 0
metadata:
  version: 1.0
"""
    generate = """
task: local_generate
output_type: generate_until
doc_to_text: "{{context}}\\n{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {do_sample: false, max_gen_toks: 12, until: ["\\n\\n\\n"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
    choose = """
task: local_choose
output_type: multiple_choice
doc_to_text: "{{context}}\\n{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
    perplexity = """
task: local_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
    for text in (generate, choose, perplexity):
        name = text.split("task: ")[1].split("\n")[0]
        (folder / f"{name}.yaml").write_text(text + shared)
    return folder


TASKS = ["local_generate", "local_choose", "local_perplexity"]


def run_tasks(model: str, arguments: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """lm-eval's results of the local tasks, with its samples."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    settings = {"tasks": TASKS, "batch_size": 3, "device": "cpu", "bootstrap_iters": 0} | options
    evaluate: Any = lm_eval.simple_evaluate
    results = evaluate(model=model, model_args=arguments, task_manager=manager, **settings)
    assert results is not None
    return dict(results)


def instance(kind: str, arguments: tuple, doc: dict[str, Any] | None = None, task: str = "probe") -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc=doc or {}, arguments=arguments, idx=0, metadata=(task, 0, 1))  # type: ignore[arg-type]
