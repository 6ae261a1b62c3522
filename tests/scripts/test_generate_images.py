"""`tenure generate --image`: what it prints, keeps and refuses, on a tiny model of SmolVLM's class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenure.eval.pictures import PageDocument, PagePolicy, save_token_page
from tenure.scripts import cli
from tenure.scripts.loading import load_model, load_processor
from tenure.scripts.soak.tiny_served import IMAGE_TOKENS, image_processor

from ..browser import find_chromium, open_browser
from ..tiny_vision import save_pictures, save_with_gates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with gates, and three pictures."""
    root = tmp_path_factory.mktemp("vision")
    save_with_gates(root)
    save_pictures(root, 3)
    return root


def run(folder: Path, *arguments: str) -> int:
    command = ["generate", "--model", str(folder / "model"), "--gates", str(folder / "gates"), "--device", "cpu"]
    try:
        return cli.main([*command, "--max-new-tokens", "6", *arguments])
    except SystemExit as exit:
        return int(exit.code or 0)


def pictures(folder: Path, *numbers: int) -> list[str]:
    return ["--image", *(str(folder / f"{number}.png") for number in numbers)]


def test_the_full_cache_says_what_the_model_says(folder: Path, capsys: pytest.CaptureFixture[str]):
    model, _ = load_model(str(folder / "model"), "cpu")
    processor: Any = load_processor(str(folder / "model"))
    from tenure.images import open_image

    images = [open_image(folder / f"{number}.png") for number in (0, 2)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[images], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)  # pyright: ignore[reportCallIssue]
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert run(folder, "--prompt", "What?", "--policy", "full", *pictures(folder, 0, 2)) == 0
    out, err = capsys.readouterr()
    assert out.strip() == expected.strip() and f"of {2 * IMAGE_TOKENS} image tokens" in err
    assert run(folder, "--prompt", "What?", "--policy", "full", *pictures(folder, 1, 2)) == 0
    assert capsys.readouterr().out.strip() != expected.strip(), "other pictures give another answer"


@pytest.mark.parametrize("question", [(), ("--question", "Which colour is it?")])
def test_a_budget_with_and_without_a_question(folder: Path, capsys: pytest.CaptureFixture[str], question):
    arguments = ["--prompt", "A long text. " * 8, *question, *pictures(folder, 0, 1)]
    arguments += ["--budget", "20", "--sinks", "0", "--recent", "2", "--scope", "head", "--buffer", "200"]
    assert run(folder, *arguments) == 0
    plain = capsys.readouterr().err
    assert "in 1 evictions" in plain and f"of {2 * IMAGE_TOKENS} image tokens" in plain
    assert run(folder, *arguments, "--protect-images") == 0
    whole = 2 * IMAGE_TOKENS * 3 * 2
    assert f"{whole} of {whole} (100%)" in capsys.readouterr().err
    assert run(folder, *arguments, "--image-floor", "0.3") == 0
    kept = int(capsys.readouterr().err.partition("image tokens")[2].split("of")[0].strip(" │"))
    assert kept >= 6 * 3 * 2


def test_what_was_kept_is_drawn_by_modality(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    heat_map, page = tmp_path / "out" / "kept.png", tmp_path / "kept.html"
    arguments = ["--prompt", "A <b> text. " * 8, "--question", "Which colour?", *pictures(folder, 0, 1)]
    arguments += ["--budget", "20", "--recent", "2", "--scope", "head", "--buffer", "200"]
    assert run(folder, *arguments, "--heat-map", str(heat_map), "--page", str(page)) == 0
    shown = capsys.readouterr().err
    assert heat_map.read_bytes().startswith(b"\x89PNG") and shown.count("by layer") == 2
    data = json.loads(page.read_text().partition('<script type="application/json" id="data">')[2].partition("<")[0])
    (policy,) = data["policies"]
    of_images = [data["modalities"][kind] == "image" for kind in data["modalityOf"]]
    assert sum(of_images) == 2 * IMAGE_TOKENS and len(of_images) == len(data["texts"]) == len(policy["masks"])
    kept = sum(int(mask, 16).bit_count() for mask, image in zip(policy["masks"], of_images, strict=True) if image)
    assert f"{kept} of {2 * IMAGE_TOKENS * 3 * 2} (" in shown, "the report counts the same entries"
    assert data["answer"] is None and policy["correct"] is None and data["question"] == "Which colour?"
    assert run(folder, "--prompt", "x", "--policy", "knorm", "--page", str(tmp_path / "text.html")) == 0
    assert '"modalities":[]' in (tmp_path / "text.html").read_text(), "a page of text alone has no such part"


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_the_page_shows_modalities_in_a_browser(tmp_path: Path):
    mask = np.zeros((3, 2, 6), dtype=bool)
    mask[:, :, 0] = mask[1, 0, 2:5] = True
    document = PageDocument(["<i>", "a", "p", "p", "p", "b"], modalities={"image": ((2, 5),), "text": ((0, 2), (5, 6))})
    policies = [PagePolicy("these", mask, "yes"), PagePolicy("the others", ~mask, "no")]
    save_token_page(tmp_path / "page.html", document, policies, "")
    with open_browser(tmp_path / "profile") as browser:
        browser.load(tmp_path / "page.html", 900)
        titles = "[...document.querySelectorAll('#modalities h3')].map(title => title.textContent)"
        assert browser.evaluate(titles) == ["text 33.3% of 3 tokens", "image 16.7% of 3 tokens"]
        cells = "[...document.querySelectorAll('.shares')].map(strip => strip.children[1].title)"
        assert browser.evaluate(cells) == ["layer 1, head 0: 33.3% of the text tokens",
                                           "layer 1, head 0: 100.0% of the image tokens"]  # fmt: skip
        browser.evaluate("document.querySelectorAll('#tabs button')[1].click()")
        assert browser.evaluate(titles) == ["text 66.7% of 3 tokens", "image 83.3% of 3 tokens"]
        assert browser.evaluate("document.getElementById('document').textContent") == "<i>a▦▦▦b"
        assert browser.complaints() == []


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--image", "absent.png"], 1, "there is no image file 'absent.png'"),
        (["--image", "https://example.org/x.png"], 1, "got the address 'https://example.org/x.png' as an image"),
        (["--image", __file__], 1, "is no image; accepted: PNG, JPEG, WEBP, GIF, BMP"),
        (["--image", "x.png", "--raw"], 2, "--raw leaves it out: give one of them"),
        (["--protect-images"], 2, "are about the tokens of images: give --image"),
        (["--image", "x.png", "--image-floor", "1.5"], 2, "takes a share of the budget in (0, 1], got 1.5"),
        (["--image", "x.png", "--image-side", "0"], 2, "--image-side takes 1 or more pixels, got 0"),
        (["--heat-map", "kept.svg"], 1, "--heat-map is 'kept.svg'; accepted: a name that ends with .png"),
    ],
)
def test_what_is_refused(folder: Path, arguments, code, sentence, capsys: pytest.CaptureFixture[str]):
    assert run(folder, "--prompt", "What?", "--policy", "knorm", *arguments) == code
    out, err = capsys.readouterr()
    assert sentence in " ".join(err.split()) and out == "" and "Traceback" not in err


def test_text_that_spells_a_placeholder(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(folder, "--prompt", "an <image> of", "--policy", "knorm", *pictures(folder, 0)) == 1
    assert "got a text with '<image>', which stands for an image" in " ".join(capsys.readouterr().err.split())


def test_a_model_without_images(folder: Path, tiny_llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_llama.save_pretrained(tmp_path / "text")
    image_processor().tokenizer.save_pretrained(tmp_path / "text")
    arguments = ["--prompt", "x", "--policy", "knorm", *pictures(folder, 0), "--model", str(tmp_path / "text")]
    assert run(folder, *arguments) == 1
    assert "takes no images: its processor is a" in " ".join(capsys.readouterr().err.split())
