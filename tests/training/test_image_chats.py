"""Training on conversations with images: records, targets, one run of the tower, and the trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tenure.retention import RetentionGates, SoftEviction
from tenure.retention.image_inputs import image_inputs
from tenure.scripts.soak.tiny_served import IMAGE_TOKENS, image_processor
from tenure.training.batching import collate
from tenure.training.image_chats import load_image_chats
from tenure.training.objective import GateObjective

from ..tiny_vision import save_pictures, tiny_model


@pytest.fixture(scope="module")
def processor() -> Any:
    return image_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return tiny_model(processor)


def chat(*images: str, question: str = "What?", answer: str = "Blue.", intro: str = "Look: ") -> dict[str, Any]:
    parts = [{"type": "text", "text": intro}, *({"type": "image", "path": name} for name in images)]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


def write(folder: Path, *records: Any, name: str = "chats.jsonl") -> str:
    path = folder / name
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_targets_prompts_and_pixels_of_a_conversation(processor, tmp_path):
    save_pictures(tmp_path, 3)
    two = {
        "images": ["2.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}]},
            {"role": "assistant", "content": "B"},
            {"role": "user", "content": "C"},
            {"role": "assistant", "content": "D"},
        ],
    }
    source = load_image_chats(write(tmp_path, chat("0.png", "1.png"), two), processor, max_length=500, prompt_share=1.0)
    assert len(source) == 2
    for index in range(4):
        example, decode = source[index], processor.tokenizer.decode
        said = decode([i for i, wanted in zip(example.input_ids, example.loss_mask, strict=True) if wanted])
        images = example.input_ids.count(processor.image_token_id) // IMAGE_TOKENS
        assert example.inputs["pixel_values"].shape == (1, images, 3, 16, 16) and example.kind == "images"  # pyright: ignore[reportOptionalSubscript]
        if images == 2:
            assert said == "Blue.<|im_end|>"
            assert decode(example.input_ids[example.prompt_tokens :]).startswith("What?<|im_end|>")
        else:
            assert said == "B<|im_end|>D<|im_end|>"
            assert example.prompt_tokens == 0, "its last question is a turn of its own text alone"
    assert {source.name(0), source.name(1)} == {f"{tmp_path}/chats.jsonl record {n}" for n in (1, 2)}
    again = load_image_chats(str(tmp_path), processor, max_length=500, prompt_share=1.0)
    assert again.digest() == source.digest() and [again[i].input_ids for i in range(6)] == [
        source[i].input_ids for i in range(6)
    ]
    rest, held = source.held_out(1)
    assert len(rest) == len(held) == 1 and {len(rest[0].input_ids), len(held[0].input_ids)} == {
        len(source[0].input_ids), len(source[1].input_ids)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "it is not JSON"),
        ({"messages": []}, "it has no messages"),
        (chat("absent.png"), "there is no image file"),
        (chat("../0.png"), "is not in the data's folder"),
        (chat("/etc/passwd"), "is not in the data's folder"),
        (chat("http://127.0.0.1/x.png"), "is not in the data's folder"),
        (chat("link.png"), "is not in the data's folder"),
        (chat("bad.png"), "is no image; accepted"),
        (chat("0.png", question="an <image> here"), "the processor refuses it: "),
        ({**chat("0.png"), "images": ["1.png"]}, "for which there is no image part"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "an image part has no file"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "0.png"}]}]}, "type text or image"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nothing in it is said by the assistant"),
        ({"images": "0.png", **chat("0.png")}, "not a list of file names"),
    ],
)
def test_records_that_cannot_be_used_are_named(processor, tmp_path, record, message):
    folder = tmp_path / "data"
    folder.mkdir()
    save_pictures(folder, 2)
    save_pictures(tmp_path, 1)
    (folder / "bad.png").write_text("no picture")
    (folder / "link.png").symlink_to(tmp_path / "0.png")
    path = write(folder, chat("0.png"), record)
    with pytest.raises(ValueError, match=f"record 2 of chats.jsonl: .*{message}") as refused:
        load_image_chats(path, processor, max_length=500)
    assert "\n" not in str(refused.value)
    assert len(load_image_chats(path, processor, max_length=500, bad_records=1)) == 1


def test_data_that_is_none(processor, tmp_path):
    save_pictures(tmp_path, 1)
    for data, message in (
        (str(tmp_path), "holds no .jsonl file"),
        (str(tmp_path / "absent.jsonl"), "there is no file or folder"),
        (str(tmp_path / "0.png"), "has the suffix '.png'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_chats(data, processor, max_length=500)
    with pytest.raises(ValueError, match=r"none of the 1 conversations .*max_length=20"):
        load_image_chats(write(tmp_path, chat("0.png")), processor, max_length=20)


def runs_of(tower: Any) -> list[int]:
    """A list that grows with every forward of the tower."""
    counted: list[int] = []
    tower.register_forward_hook(lambda *_: counted.append(1))
    return counted


@pytest.mark.parametrize("prompt_share", [0.0, 1.0])
def test_the_objective_is_that_of_the_models_own_forward_and_runs_the_tower_once(processor, tmp_path, prompt_share):
    model = tiny_model(processor)
    save_pictures(tmp_path, 2)
    data = write(tmp_path, chat("0.png", "1.png", answer="Blue and red."))
    source = load_image_chats(data, processor, max_length=500, prompt_share=prompt_share)
    example = source[0]
    gates = RetentionGates.for_model(model, gate_width=4, initial_bias=40.0)  # β = 1: the student is the teacher
    counted = runs_of(model.model.vision_model)
    evictions = [SoftEviction(0.5, 0.5)] if prompt_share else []
    objective = GateObjective(model, gates, budget=1000.0, evictions=evictions)
    losses = objective(collate([example], 0))
    assert len(counted) == 1
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        logits = model(input_ids=ids, **example.inputs).logits.log_softmax(-1)  # pyright: ignore[reportCallIssue]
    target = torch.tensor(example.loss_mask)[1:]
    expected = -logits[0, :-1].gather(1, ids[0, 1:, None])[target].mean()
    if not prompt_share:
        assert math.isclose(float(losses.ntp), float(expected), rel_tol=1e-4)
        assert abs(float(losses.kl)) < 1e-4
    losses.total.backward()
    for parameter in gates.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
    # A prompt whose keys neither decay nor are evicted is the plain model, images included.
    plain = GateObjective(model, gates, budget=1000.0)(collate([example], 0))
    assert math.isclose(float(plain.ntp), float(expected), rel_tol=1e-3)


def test_other_pixels_give_another_loss(processor, model, tmp_path):
    save_pictures(tmp_path, 2)
    gates = RetentionGates.for_model(model, gate_width=4)
    losses = []
    for name in ("0.png", "1.png"):
        source = load_image_chats(write(tmp_path, chat(name)), processor, max_length=500)
        losses.append(float(GateObjective(model, gates, budget=0.5)(collate([source[0]], 0)).ntp.detach()))
    assert losses[0] != losses[1]


def test_the_decoders_arguments_give_the_models_own_output(processor, model, tmp_path):
    save_pictures(tmp_path, 2)
    example = load_image_chats(write(tmp_path, chat("0.png", "1.png")), processor, max_length=500)[0]
    ids = torch.tensor([example.input_ids])
    taken = image_inputs(model, ids, example.inputs)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        hidden = model.model.text_model(**taken.arguments, use_cache=False).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(input_ids=ids, **example.inputs).logits)  # pyright: ignore[reportCallIssue]
    with pytest.raises((ValueError, RuntimeError), match="tokens"):
        image_inputs(model, ids[:, :20], example.inputs)  # pyright: ignore[reportArgumentType]


def test_the_trainer_trains_on_images_and_resumes(processor, tmp_path):
    from tenure.training import TrainConfig, train

    save_pictures(tmp_path, 4)
    data = write(tmp_path, *(chat(f"{n}.png", f"{(n + 1) % 4}.png", answer=f"Number {n}.") for n in range(4)))
    source = load_image_chats(data, processor, max_length=500, prompt_share=0.5)
    options = {"batch_size": 2, "save_every": 2, "warmup_steps": 1, "gate_width": 4, "images": True, "budget": 0.5,
               "gradient_checkpointing": False, "prompt_share": 0.5}  # fmt: skip

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 3:
            raise InterruptedError

    def run(folder: str, progress: Any = None) -> Any:
        config = TrainConfig(output_dir=str(tmp_path / folder), steps=4, **options)
        return train(config, tiny_model(processor), source, progress=progress)

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("parts", stop)
    again = run("parts")
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("option", [{"pack": True}, {"context_parallel": 2}])
def test_settings_that_images_exclude(option):
    from tenure.training import TrainConfig

    with pytest.raises(ValueError, match="got images with"):
        TrainConfig(images=True, **option)
