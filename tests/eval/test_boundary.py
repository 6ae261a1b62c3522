"""Where the context ends in the prompts of tasks that lm-eval ships, read from lm-eval's own files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval")

from tenure.eval.harness import Boundaries  # noqa: E402
from tenure.eval.harness.command import says_where  # noqa: E402

SHIPPED = Path(lm_eval.__file__).parent / "tasks"
DOC: dict[str, Any] = {
    "context": "The first paragraph. What is it about?\n\nThe last paragraph ends here.",
    "question": "Who wrote the last paragraph?",
    "input": "Who wrote the last paragraph of func_1(3)?",
    "answers": ["nobody"],
    "answer": "A",
    "choices": ["one", "two", "three", "four"],
    "options": ["one", "two", "three", "four"],
}
AGNOSTIC = Boundaries("agnostic")


def shipped(folder: str) -> list[tuple[str, Any]]:
    """(name, doc_to_text) of every task in a folder of lm-eval, `include` followed."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: ("function", node.value))
    found = []
    for path in sorted((SHIPPED / folder).glob("*.yaml")):
        config = yaml.load(path.read_text(), Loader)
        if "include" in config:
            config = yaml.load((path.parent / config["include"]).read_text(), Loader) | config
        if isinstance(config.get("task"), str):
            found.append((config["task"], config["doc_to_text"]))
    return found


def prompt_of(folder: str, text: Any, doc: dict[str, Any]) -> str:
    from lm_eval.utils import apply_template

    if isinstance(text, tuple):
        module, _, function = text[1].rpartition(".")
        return getattr(importlib.import_module(f"lm_eval.tasks.{folder}.{module}"), function)(doc)
    return apply_template(text, doc)


@pytest.mark.parametrize("folder", ["longbench", "longbench2", "babilong", "infinitebench"])
def test_shipped_tasks_say_where_their_question_begins(folder):
    doc = DOC | ({"input": DOC["context"]} if folder == "babilong" else {})
    tasks = shipped(folder)
    if not tasks:
        pytest.skip(f"this lm-eval has no {folder}")
    assert len(tasks) >= 11
    for name, text in tasks:
        prompt = prompt_of(folder, text, doc)
        if name in ("infinitebench_longbook_sum_en",):  # its prompt is the book alone
            with pytest.raises(ValueError, match="is not found after a context"):
                AGNOSTIC.find(prompt, doc, name)
            continue
        place = AGNOSTIC.find(prompt, doc, name)
        assert place is not None, name
        assert DOC["context"].rstrip() in prompt[:place], name
        assert "last paragraph ends here" not in prompt[place:], name
        asked = [doc[key] for key in ("question", "input") if doc[key] in prompt and doc[key] != doc["context"]]
        assert all(text in prompt[place:] for text in asked), name


def test_rulers_tasks_say_where_their_question_begins():
    """Templates are read from the sources: importing them takes extras of lm-eval."""

    def template(file: str) -> str:
        source = (SHIPPED / "ruler" / f"{file}.py").read_text()
        texts = re.findall(r'(?:"template": |TEMPLATE = )"""(.*?)"""', source, re.S)
        return texts[0].encode().decode("unicode_escape")

    needle = template("niah_utils")
    templates = {
        "niah_single_1": needle,
        "niah_multikey_3": needle.replace("are all", "is"),
        "ruler_vt": template("vt_utils"),
        "ruler_fwe": template("fwe_utils"),
        "ruler_qa_squad": template("qa_utils"),
        "ruler_cwe": template("cwe_utils"),
    }
    values = {"context": "CONTEXT", "query": "ship", "type_needle_v": "numbers", "num_v": 2}
    templates = {name: text.format(**values) for name, text in templates.items()}
    for name, prompt in templates.items():
        place = AGNOSTIC.find(prompt, {"input": prompt}, name)
        assert place is not None and prompt[:place].endswith("CONTEXT"), name


def test_the_document_decides_unless_the_user_does():
    doc = {"context": "A b c.", "question": "\n\nWhat?", "aware": False}
    prompt = "A b c.\n\nWhat?"
    assert Boundaries().find(prompt, doc, "any") == len("A b c.")
    assert Boundaries().find(prompt, doc | {"aware": True}, "any") is None
    assert Boundaries().find(prompt, {"text": prompt}, "any") is None
    assert Boundaries("aware").find(prompt, doc, "any") is None
    assert Boundaries("agnostic").find(prompt, doc | {"aware": True}, "any") == len("A b c.")
    # A chat template trims the question.
    assert Boundaries().find("<u>A b c. What?</u>", doc, "any") == len("<u>A b c. ")


def test_the_users_rule_comes_first():
    prompt = "Text. Q: one? Q: two?"
    assert Boundaries("agnostic", pattern=r"Q: ").find(prompt, {}, "longbench_qasper") == prompt.rindex("Q: two")
    assert Boundaries("agnostic", field="asked").find(prompt, {"asked": "Q: one?"}, "x") == prompt.index("Q: one")
    for rule, doc, message in (
        ({"pattern": "Z: "}, {}, "no context before a match of 'Z: '"),
        ({"pattern": "^Text"}, {}, "no context before a match"),
        ({"field": "asked"}, {"text": "", "other": ""}, "'asked' to find the question by; its fields are other, text"),
        ({"field": "asked"}, {"asked": "Q: three?"}, "is not found after a context"),
        ({"field": "asked"}, {"asked": " "}, "is not found after a context"),
        ({}, {"text": ""}, r"add question_field=NAME or question_pattern=REGEX to --model_args"),
    ):
        with pytest.raises(ValueError, match=message):
            Boundaries("agnostic", **rule).find(prompt, doc, "mine")


def test_known_tasks_need_not_be_loaded_to_be_checked():
    for task in ("tenure_vt", "ruler", "niah_single_1", "longbench_qasper", "longbench2_code", "babilong_qa1"):
        assert says_where(task)
    assert not says_where("gsm8k") and not says_where("local_generate")
