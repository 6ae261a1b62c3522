"""Trains the tower of `build_model.py` on drawings, with the text model frozen.

    python examples/drawings_vlm/train_tower.py --captions 4000 --answers 1500 --output examples/drawings_vlm/tower.safetensors

Two stages, on one CPU core:

1. *Captions.* The 16 tokens of an image are taught to lie nearest to the text model's own input embeddings of a
   sentence that says what the image shows, repeated until there are 16 of them. The text model does not run, so a step
   is cheap; it learns to read.
2. *Answers.* Cross-entropy of the answer to a question about the image, through the frozen text model. The tokens are
   free to leave the embeddings of the captions.

Numbers that the test asks about (one in ten, `drawings.held_out`) are never drawn.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_model import IMAGE_TOKENS, make_model, make_processor
from safetensors.torch import save_file
from torch.nn import functional as F

from tenure.eval.tasks.drawings import COLOURS, SHAPES, WORDS, Drawing, draw
from tenure.training.assets import demo_model


def pixels(drawings: list[Drawing]) -> torch.Tensor:
    """fp32 `(batch, 1, 3, 64, 64)`, as the processor gives them for images of this size (a test compares)."""
    values = np.stack([np.asarray(drawing.image, dtype=np.float32) for drawing in drawings])
    return torch.from_numpy((values / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).unsqueeze(1).contiguous()


def image_tokens(model: Any, drawings: list[Drawing]) -> torch.Tensor:
    """`(batch, 16, hidden_size)`."""
    features = model.model.get_image_features(pixels(drawings)).pooler_output
    return torch.stack(list(features)).float()


def caption_ids(tokenizer: Any, drawing: Drawing) -> list[int]:
    """The caption's token ids, over and over, one for each image token."""
    ids = tokenizer(" " + drawing.caption, add_special_tokens=False)["input_ids"]
    return (ids * IMAGE_TOKENS)[:IMAGE_TOKENS]


def train_on_captions(model: Any, tokenizer: Any, rng: random.Random, steps: int, batch: int) -> Iterator[str]:
    table = model.get_input_embeddings().weight.detach().float()
    everything = [*WORDS, *SHAPES, *COLOURS, *map(str, range(10)), "It shows the number word a."]
    used = sorted({i for text in everything for i in tokenizer(" " + text, add_special_tokens=False)["input_ids"]})
    place = {token: number for number, token in enumerate(used)}
    known = table[used]
    # Squared distance, in units in which two different embeddings are about 8 apart: the softmax over it is sharp.
    scale = 8.0 / torch.pdist(known).square().mean()
    optimizer, schedule = optimisation(model, steps, 1e-3)
    for step in range(steps):
        drawings = [draw(rng, split="train") for _ in range(batch)]
        target = torch.tensor([[place[i] for i in caption_ids(tokenizer, one)] for one in drawings])
        given = image_tokens(model, drawings)
        logits = -scale * torch.cdist(given.flatten(0, 1), known).square()
        loss = F.cross_entropy(logits, target.flatten()) + 0.1 * F.mse_loss(given, known[target]) / known.var()
        update(model, optimizer, schedule, loss)
        if step % 50 == 0:
            right = (logits.argmax(-1).view_as(target) == target).all(-1).float().mean()
            yield f"captions {step} loss {loss.item():.3f} whole captions {right:.2f}"


def train_on_answers(model: Any, processor: Any, rng: random.Random, steps: int, batch: int) -> Iterator[str]:
    optimizer, schedule = optimisation(model, steps, 3e-4)
    ends = "<|im_end|>"
    for step in range(steps):
        drawings = [draw(rng, split="train") for _ in range(batch)]
        before, after, targets = [], [], []
        for one in drawings:
            text = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"\n{one.question}"}]}],
                add_generation_prompt=True,
            )
            start, _, rest = text.partition("<image>")
            prompt = processor.tokenizer(rest, add_special_tokens=False)["input_ids"]
            answer = processor.tokenizer(f"{one.answer}{ends}", add_special_tokens=False)["input_ids"]
            before.append(processor.tokenizer(start + "<fake_token_around_image><global-img>")["input_ids"])
            after.append([*processor.tokenizer("<fake_token_around_image>")["input_ids"], *prompt, *answer])
            targets.append([-100] * (len(after[-1]) - len(answer)) + answer)
        width = max(map(len, after))
        ids = torch.tensor([one + [0] * (width - len(one)) for one in after])
        labels = torch.tensor([one + [-100] * (width - len(one)) for one in targets])
        embed = model.get_input_embeddings()
        embeds = torch.cat([embed(torch.tensor(before)), image_tokens(model, drawings), embed(ids)], dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model.text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            aimed = labels != -100
            chosen = hidden[:, -width - 1 : -1][aimed]
            logits = model.lm_head(chosen).float()
        loss = F.cross_entropy(logits, labels[aimed])
        update(model, optimizer, schedule, loss)
        if step % 20 == 0:
            right = (logits.argmax(-1) == labels[aimed]).float().mean()
            yield f"answers {step} loss {loss.item():.3f} tokens right {right:.3f}"


def optimisation(model: Any, steps: int, rate: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.02)
    warmup = min(100, steps // 10 + 1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(model: Any, optimizer: torch.optim.Optimizer, schedule: Any, loss: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    schedule.step()


def save(model: Any, path: Path) -> None:
    """Tower and connector in fp16."""
    state = model.model.state_dict()
    save_file({k: v.half().contiguous() for k, v in state.items() if not k.startswith("text_model.")}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=4000, help="steps of the first stage")
    parser.add_argument("--answers", type=int, default=1500, help="steps of the second stage")
    parser.add_argument("--batch", type=int, default=32, help="images a step of the first stage")
    parser.add_argument("--answer-batch", type=int, default=16, help="images a step of the second stage")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    source = demo_model()
    processor = make_processor(source)
    model = make_model(source, processor.image_token_id, options.start)
    model.requires_grad_(False)
    model.model.vision_model.requires_grad_(True)
    model.model.connector.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{count / 1e6:.2f} M parameters to train", flush=True)
    stages = (
        train_on_captions(model, processor.tokenizer, rng, options.captions, options.batch),
        train_on_answers(model, processor, rng, options.answers, options.answer_batch),
    )
    for stage in stages:
        for line in stage:
            print(f"{line} cpu {time.process_time():.0f} s", flush=True)
            save(model, options.output)
        save(model, options.output)


if __name__ == "__main__":
    main()
