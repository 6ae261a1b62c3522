"""Drawn pictures, the tasks about them, and cells compared on prompts with images."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tenure.eval.cells import parse_cells
from tenure.eval.image_prompts import image_prompt
from tenure.eval.pictures import kept_mask
from tenure.eval.runner import evaluate
from tenure.eval.tasks.drawings import COLOURS, KINDS, SHAPES, SIZE, WORDS, draw, held_out
from tenure.eval.tasks.picture_tasks import PICTURE_TASKS, PictureCases
from tenure.eviction import evict, kept_by_modality, modality_ranges
from tenure.scripts.soak.tiny_served import IMAGE_TOKENS, image_processor

from ..tiny_vision import tiny_model


@pytest.fixture(scope="module")
def processor() -> Any:
    return image_processor()


@pytest.fixture(scope="module")
def tiny(processor: Any) -> Any:
    return tiny_model(processor)


def test_drawings_show_what_they_say():
    for seed in range(60):
        kind = KINDS[seed % 3]
        made, same = (draw(random.Random(seed), kind) for _ in range(2))
        assert made.kind == kind and made.image.mode == "RGB" and made.image.size == (SIZE, SIZE)
        assert made.answer == same.answer and made.image.tobytes() == same.image.tobytes()
        pixels = np.asarray(made.image).reshape(-1, 3).astype(int)
        if kind == "shape":
            colour, shape = made.answer.split()
            assert shape in SHAPES
            inked = (pixels == COLOURS[colour]).all(1).mean()
            assert 0.02 < inked < 0.6, "the named colour is in the picture"
        elif kind == "word":
            assert made.answer in WORDS
        # Ink stays clear of the edge: nothing is cut off.
        square = np.asarray(made.image).astype(int)
        edge = np.concatenate([square[0], square[-1], square[:, 0], square[:, -1]])
        assert (edge == edge[0]).all()
    with pytest.raises(
        ValueError, match="kind 'cat' and split 'test'; accepted: number, word, shape, and train or test"
    ):
        draw(random.Random(0), "cat")  # type: ignore[arg-type]


def test_numbers_of_the_two_splits_are_different():
    numbers = range(100, 1000)
    share = sum(map(held_out, numbers)) / len(numbers)
    assert 0.07 < share < 0.13
    for split in ("train", "test"):
        drawn = {int(draw(random.Random(seed), "number", split).answer) for seed in range(80)}
        assert {held_out(number) for number in drawn} == {split == "test"}


def test_cases_hold_their_items_and_ask_about_one(processor, texts):
    cases = PictureCases(processor, texts, filler=1, seed=3)
    for name, task in PICTURE_TASKS.items():
        kinds = set()
        for index in range(6):
            case = cases.case(name, index)
            context = processor.tokenizer.decode(case.context_ids)
            question = processor.tokenizer.decode(case.question_ids)
            pictures = task.items.count("picture")
            assert case.context_ids.count(processor.image_token_id) == pictures * IMAGE_TOKENS
            assert case.inputs["pixel_values"].shape == (1, pictures, 3, 16, 16)
            assert context.count("Picture from") == pictures
            assert context.count("Note from") == task.items.count("note")
            assert f"{task.items[0]} from {case.key}" in question and question.endswith(
                ("shows the number", "shows the word", "shows a")
            )
            said = processor.tokenizer.decode([*case.question_ids, *case.answer_ids])
            assert said.endswith(f" {case.answer}.")
            assert (case.answer in context) == (task.items[0] == "note")
            kinds.add(question.rpartition("shows ")[2])
            if task.items[0] == "picture":
                (start, stop), label = case.facts[0], f"Picture from {case.key}:<fake_token_around_image><global-img>"
                assert processor.tokenizer.decode(case.context_ids[:start]).endswith(label)
                assert set(case.context_ids[start:stop]) == {processor.image_token_id} and stop - start == IMAGE_TOKENS
            again = cases.case(name, index)
            assert again == case and torch.equal(again.inputs["pixel_values"], case.inputs["pixel_values"])
        assert len(kinds) == 3, "each kind of drawing is asked about in turn"
    with pytest.raises(ValueError, match="unknown task 'cats'; known tasks: picture, pictures"):
        cases.case("cats", 0)


def test_a_prompt_is_what_the_processor_makes_of_the_whole(processor):
    images = [draw(random.Random(seed)).image for seed in (1, 2)]
    made = image_prompt(processor, ["One: ", images[0], " two: ", images[1], "."], "Which?")
    parts = [{"type": "text", "text": "One: "}, {"type": "image"}, {"type": "text", "text": " two: "},
             {"type": "image"}, {"type": "text", "text": ".Which?"}]  # fmt: skip
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    whole = processor(text=[text], images=[images], return_tensors="pt")
    assert [*made.context_ids, *made.rest] == whole["input_ids"][0].tolist()
    assert torch.equal(made.extra["pixel_values"], whole["pixel_values"]) and "attention_mask" not in made.inputs
    with pytest.raises(ValueError, match="got a text with '<image>', which stands for an image"):
        image_prompt(processor, [images[0], "an <image>"])


def test_cells_are_compared_on_images_and_unevicted_is_full(processor, tiny, texts):
    cases = list(PictureCases(processor, texts, filler=1, seed=1).cases(["pictures", "mixed_note"], 1))
    cells = parse_cells(["full", "snapkv(window=4):head", "knorm:global"], [0.5])
    records = evaluate(tiny, processor.tokenizer, cases, cells)
    assert len(records) == 6 and all(record.finite for record in records)
    full = [record for record in records if record.policy == "full"]
    assert all(record.kl == 0.0 and record.kept_share == 1.0 for record in full)
    assert all(record.kl > 0 and 0.4 < record.kept_share <= 0.5 for record in records if record.policy != "full")
    # The full cache's answer is the plain model's: greedy tokens of transformers itself.
    case = cases[0]
    ids = torch.tensor([[*case.context_ids, *case.question_ids]])
    plain = tiny.generate(ids, **case.inputs, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    text = processor.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert full[0].prediction.startswith(text) or text.startswith(full[0].prediction)


@torch.no_grad()
def test_what_each_modality_kept(processor, tiny):
    image = draw(random.Random(4)).image
    made = image_prompt(processor, ["A picture ", image, " and another ", image, " here."])
    ids = torch.tensor([made.context_ids])
    (ranges,) = modality_ranges(tiny.config, ids)
    assert sum(stop - start for start, stop in ranges["image"]) == 2 * IMAGE_TOKENS and len(ranges["image"]) == 2
    assert sum(stop - start for spans in ranges.values() for start, stop in spans) == ids.shape[1]
    segments = 3 * 2
    for options in ({"protect": ranges["image"]}, {"token_floors": [(ranges["image"], 0.4)], "sinks": 0, "recent": 0}):
        with evict(tiny, "streaming_llm", 16, "head", buffer=0, **options) as session:  # pyright: ignore[reportArgumentType]
            cache = session.new_cache()
            session.extend(cache, made.context_ids, inputs=made.extra)
            text, pictures = kept_by_modality(cache, ranges)
            assert (text.modality, pictures.modality) == ("text", "image")
            assert pictures.tokens == 2 * IMAGE_TOKENS and pictures.full_entries == 2 * IMAGE_TOKENS * segments
            assert text.entries + pictures.entries == cache.entries
            where = torch.zeros(ids.shape[1], dtype=torch.bool)
            for start, stop in ranges["image"]:
                where[start:stop] = True
            mask = torch.from_numpy(kept_mask(cache))
            torch.testing.assert_close(pictures.head_shares, mask[..., where].double().mean(-1))
            torch.testing.assert_close(text.head_shares, mask[..., ~where].double().mean(-1))
            assert pictures.entries == (2 * IMAGE_TOKENS if "protect" in options else 6) * segments
            session.extend(cache, [70, 71])
            assert kept_by_modality(cache, ranges)[0].tokens == text.tokens + 2, "tokens read later are text"
    # Padding is not counted, and rows have ranges of their own.
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    assert modality_ranges(tiny.config, padded, (padded != 0).long()) == [ranges]
    with pytest.raises(ValueError, match=r"got input_ids \(1, 2, 3\)"):
        modality_ranges(tiny.config, torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="got the modality 'smell'; accepted: text, image, video, audio"):
        kept_by_modality(cache, {"smell": ((0, 1),)})
