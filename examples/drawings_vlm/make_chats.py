"""Conversations with drawn pictures, to train gates on: `FOLDER/chats.jsonl` and its PNG files.

    python examples/drawings_vlm/make_chats.py FOLDER --count 240

Each has two to four pictures and written slips in running text, and a question about one of them. Wording, places and
numbers are others than those of the evaluation (`eval/tasks/picture_tasks.py`), the texts are the training half of the
essays.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tenure.eval.tasks.drawings import draw
from tenure.training.assets import resolve_texts

PLACES = (
    "kitchen", "garden", "attic", "office", "garage", "library", "cellar", "harbour", "museum", "station", "market",
    "school", "chapel", "bakery", "stable", "workshop",
)  # fmt: skip
QUESTIONS = {
    "number": "Which number was on the {} in the {}?",
    "word": "Which word was on the {} in the {}?",
    "shape": "Which shape, and of which colour, was on the {} in the {}?",
}
ANSWERS = {
    "number": "The {} in the {} had the number {} on it.",
    "word": "The {} in the {} had the word {} on it.",
    "shape": "The {} in the {} had a {} on it.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--filler", type=int, default=3, help="sentences between two items")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = " ".join(document.text for document in resolve_texts("demo", "train"))
    sentences = [one.strip() + "." for one in " ".join(texts.split()).split(". ") if 30 < len(one) < 160]
    lines = []
    for number in range(options.count):
        rng = random.Random(f"{options.seed}/{number}")
        count = rng.randint(2, 4)
        kinds = [rng.choice(("poster", "slip")) for _ in range(count)]
        places, drawings = rng.sample(PLACES, count), [draw(rng, split="train") for _ in range(count)]

        def filler(rng: random.Random = rng) -> str:
            start = rng.randrange(len(sentences) - options.filler)
            return " ".join(sentences[start : start + options.filler])

        parts = [{"type": "text", "text": f"{filler()}\n"}]
        for place, (kind, room, drawing) in enumerate(zip(kinds, places, drawings, strict=True)):
            if kind == "poster":
                name = f"{number}_{place}.png"
                drawing.image.save(options.folder / name)
                parts += [{"type": "text", "text": f"Poster in the {room}:"}, {"type": "image", "path": name}]
            else:
                parts.append({"type": "text", "text": f"Slip in the {room}: {drawing.caption}"})
            parts.append({"type": "text", "text": f"\n{filler()}\n"})
        asked = rng.randrange(count)
        kind, room, drawing = kinds[asked], places[asked], drawings[asked]
        parts.append({"type": "text", "text": "\n" + QUESTIONS[drawing.kind].format(kind, room)})
        answer = ANSWERS[drawing.kind].format(kind, room, drawing.answer)
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    (options.folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    print(f"wrote {options.folder / 'chats.jsonl'}: {len(lines)} conversations")


if __name__ == "__main__":
    main()
