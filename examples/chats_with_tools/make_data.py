"""A chat set with tools and a folder of prose: `FOLDER/chats.jsonl.gz` and `FOLDER/prose/*.txt`.

    python examples/chats_with_tools/make_data.py FOLDER --chats 200

Every chat has an assistant with two tools, two or three requests that it answers with them, and at the end a question
about an earlier result, which the assistant answers from the conversation. Names, numbers and wording are drawn at
random; tool calls have OpenAI's form. The prose is the training half of the demo's essays.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenure.training.assets import resolve_texts

CITIES = (
    "Bergen", "Porto", "Graz", "Leeds", "Turin", "Gdansk", "Nantes", "Malmo", "Bilbao", "Tartu", "Split", "Utrecht",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SKIES = ("sunny", "cloudy", "foggy", "windy", "snowing", "raining")
ITEMS = ("lamps", "chairs", "kettles", "tents", "bicycles", "mirrors", "carpets", "ladders", "pianos", "buckets")
EVENTS = ("dentist", "choir practice", "budget review", "parents' evening", "chess club", "house viewing")


@dataclass(frozen=True)
class Use:
    """One use of a tool: what the user asks, its arguments and result, the answer, and a later question about it."""

    request: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    answer: str
    later: str
    recalled: str


def weather(rng: random.Random) -> Use:
    city, day, sky, degrees = rng.choice(CITIES), rng.choice(DAYS), rng.choice(SKIES), rng.randint(-8, 34)
    return Use(
        rng.choice(("What will the weather be in {} on {}?", "I'm in {} on {}. Which weather do I pack for?")).format(
            city, day
        ),
        {"city": city, "day": day}, {"sky": sky, "celsius": degrees},
        f"It will be {sky} in {city} on {day}, at {degrees} degrees.",
        f"How warm did you say it gets in {city} on {day}?", f"{degrees} degrees, and {sky}.",
    )  # fmt: skip


def find_train(rng: random.Random) -> Use:
    start, end = rng.sample(CITIES, 2)
    hour, minute, platform = rng.randint(5, 22), rng.choice((2, 14, 27, 38, 51)), rng.randint(1, 18)
    time = f"{hour}:{minute:02d}"
    return Use(
        rng.choice(("When does the next train from {} to {} leave?", "How do I get from {} to {}?")).format(start, end),
        {"start": start, "destination": end}, {"departure": time, "platform": platform},
        f"The next train from {start} to {end} leaves at {time} from platform {platform}.",
        f"From which platform does my train to {end} leave?", f"From platform {platform}, at {time}.",
    )  # fmt: skip


def stock(rng: random.Random) -> Use:
    item, count, shelf = rng.choice(ITEMS), rng.randint(0, 900), f"{rng.choice('ABCDEFGH')}{rng.randint(10, 99)}"
    return Use(
        rng.choice(("How many {} do we have?", "Check the stock of {}.", "Are there any {} left?")).format(item),
        {"item": item}, {"count": count, "shelf": shelf},
        f"There are {count} {item} on shelf {shelf}.",
        f"On which shelf were the {item}?", f"On shelf {shelf}.",
    )  # fmt: skip


def add_event(rng: random.Random) -> Use:
    title, day, hour, code = rng.choice(EVENTS), rng.choice(DAYS), rng.randint(8, 20), rng.randint(1000, 9999)
    return Use(
        rng.choice(("Put {} into my calendar, {} at {} o'clock.", "Please remind me of {}: {}, {} o'clock.")).format(
            title, day, hour
        ),
        {"title": title, "day": day, "hour": hour}, {"status": "saved", "event": code},
        f"Done: {title} on {day} at {hour} o'clock is saved as event {code}.",
        f"What was the number of the event {title}?", f"Event {code}, on {day} at {hour} o'clock.",
    )  # fmt: skip


TOOLS: dict[str, tuple[Callable[[random.Random], Use], str, dict[str, str]]] = {
    "weather": (weather, "The weather of a city on a day.", {"city": "string", "day": "string"}),
    "find_train": (find_train, "The next train between two cities.", {"start": "string", "destination": "string"}),
    "stock": (stock, "The number of an item in the warehouse, and its shelf.", {"item": "string"}),
    "add_event": (
        add_event, "Saves an event in the calendar.", {"title": "string", "day": "string", "hour": "integer"},
    ),
}  # fmt: skip


def definition(name: str) -> dict[str, Any]:
    """A tool as OpenAI's clients declare it."""
    _, description, arguments = TOOLS[name]
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def chat(rng: random.Random) -> dict[str, Any]:
    """A record with `tools` and `messages`."""
    names = rng.sample(sorted(TOOLS), 2)
    messages: list[dict[str, Any]] = []
    uses = [(name, TOOLS[name][0](rng)) for name in rng.choices(names, k=rng.randint(2, 3))]
    for number, (name, use) in enumerate(uses):
        function = {"name": name, "arguments": json.dumps(use.arguments)}
        messages += [
            {"role": "user", "content": use.request},
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": f"call_{number}", "content": json.dumps(use.result)},
            {"role": "assistant", "content": use.answer},
        ]  # fmt: skip
    earlier = rng.choice(uses[:-1])[1]
    messages += [{"role": "user", "content": earlier.later}, {"role": "assistant", "content": earlier.recalled}]
    return {"tools": [definition(name) for name in names], "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chats", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prose = options.folder / "prose"
    prose.mkdir(parents=True, exist_ok=True)
    for document in resolve_texts("demo", "train"):
        (prose / f"{document.name}.txt").write_text(document.text)
    records = [chat(random.Random(f"{options.seed}/{number}")) for number in range(options.chats)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (options.folder / "chats.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"wrote {len(records)} chats and {len(list(prose.iterdir()))} texts to {options.folder}")


if __name__ == "__main__":
    main()
