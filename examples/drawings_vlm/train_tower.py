"""Trains the tower of `build_model.py` on drawings, with the text model frozen.

    python examples/drawings_vlm/train_tower.py --output examples/drawings_vlm/tower.safetensors

The 16 tokens of an image are taught to be the text model's own input embeddings of a sentence that says what the image
shows, repeated until there are 16 of them. The text model itself does not run, so a step is cheap (0.15 s of one core).
First the right embedding has to be the nearest one (cross-entropy over distances): the tower learns to read. Then the
connector, a linear map, is set to the least-squares solution that brings the tokens close to the right embeddings: to
the text model, an embedding that is merely the nearest one is something else.

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
        error = F.mse_loss(given, known[target]) / known.var()
        loss = F.cross_entropy(logits, target.flatten()) + 0.1 * error
        update(model, optimizer, schedule, loss)
        if step % 50 == 0:
            right = (logits.argmax(-1).view_as(target) == target).all(-1).float().mean()
            yield f"{step} loss {loss.item():.3f} error {error.item():.3f} whole captions {right:.2f}"


@torch.no_grad()
def fit_connector(model: Any, tokenizer: Any, rng: random.Random, count: int, ridge: float = 1e-4) -> float:
    """Sets the connector to the least-squares map from the tower's features to the captions' embeddings.

    A token's error counts relative to its embedding's distance from the mean: digits lie close together.

    Args:
        count: drawings.
        ridge: added to the diagonal, relative to its mean.

    Returns:
        The mean relative squared error that is left.
    """
    table = model.get_input_embeddings().weight.detach()
    projection = model.model.connector.modality_projection.proj
    features: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, given: features.append(given[0].flatten(0, 1)))
    ids = []
    for _ in range(0, count, 50):
        drawings = [draw(rng, split="train") for _ in range(50)]
        image_tokens(model, drawings)
        ids += [token for drawing in drawings for token in caption_ids(tokenizer, drawing)]
    handle.remove()
    target = torch.tensor(ids)
    x, y = torch.cat(features).double(), table[target].double()
    weight = 1 / (y - table[target.unique()].double().mean(0)).square().sum(-1, keepdim=True)
    gram = x.T @ (x * weight)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, x.T @ (y * weight))
    projection.weight.copy_(solution.T)
    return float(((x @ solution - y).square() * weight).sum(-1).mean())


def optimisation(model: Any, steps: int, rate: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.02)
    warmup = min(100, steps // 10 + 1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / max(1, steps))))

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
    parser.add_argument("--steps", type=int, default=4000, help="of the first stage")
    parser.add_argument("--fit", type=int, default=3000, help="drawings of the second stage")
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--start", type=Path, help="weights to continue from")
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
    for line in train_on_captions(model, processor.tokenizer, rng, options.steps, options.batch):
        print(f"{line} cpu {time.process_time():.0f} s", flush=True)
        save(model, options.output)
    print(f"relative error {fit_connector(model, processor.tokenizer, rng, options.fit):.4f}")
    save(model, options.output)


if __name__ == "__main__":
    main()
