"""Words of the generated tasks' keys; training has others (a test compares them)."""

from __future__ import annotations

import random
import uuid

from ..templates import ADJECTIVES, NOUNS

MORE_ADJECTIVES = (
    "abundant", "agile", "arctic", "austere", "bashful", "bleak", "blissful", "blunt", "breezy", "brittle",
    "candid", "cautious", "charming", "chilly", "clumsy", "coarse", "dapper", "dazzling", "dreary", "eager",
    "earnest", "elegant", "fabled", "faint", "feeble", "fierce", "frosty", "gaudy", "graceful", "grumpy", "hasty",
    "icy", "keen", "lavish", "lively", "lofty", "lush", "mellow", "misty", "muddy", "noble", "odd", "pale",
    "patient", "placid", "plump", "quaint", "quirky", "rustic", "shy", "slender", "sober", "sturdy", "subtle",
    "swift", "timid", "tranquil", "vivid", "weary", "witty", "zesty",
)  # fmt: skip
MORE_NOUNS = (
    "alcove", "anvil", "apricot", "badger", "bagpipe", "balcony", "banjo", "basin", "beacon", "beaver", "bonnet",
    "bramble", "buckle", "buffalo", "burrow", "cabbage", "caravan", "cavern", "cellar", "chimney", "cobbler",
    "comet", "coral", "cottage", "cradle", "cricket", "crumpet", "cushion", "cymbal", "dagger", "daisy", "dungeon",
    "easel", "fiddle", "flannel", "gazelle", "geyser", "goblet", "grotto", "hammock", "harpoon", "igloo", "inkwell",
    "jackal", "kimono", "lagoon", "lemur", "locket", "magpie", "mandolin", "mitten", "moose", "muffin", "narwhal",
    "nutmeg", "obelisk", "paddle", "parsnip", "pebble", "pelican", "pigeon", "poplar", "puffin", "quiver", "rafter",
    "raven", "sardine", "scarab", "sparrow", "spruce", "tadpole", "thimble", "tulip", "turnip", "vineyard",
    "weasel", "windmill", "yacht",
)  # fmt: skip
ALL_ADJECTIVES = ADJECTIVES + MORE_ADJECTIVES
ALL_NOUNS = NOUNS + MORE_NOUNS


class Keys:
    """Keys and values that are never given twice by one instance, as far as there are enough."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def word(self) -> str:
        """An adjective and a noun, `silent-walrus`; the lists make 7,800."""
        return self._new(lambda: f"{self._rng.choice(ALL_ADJECTIVES)}-{self._rng.choice(ALL_NOUNS)}")

    def number(self, digits: int = 7) -> str:
        """A number of so many digits, RULER's 7 by default."""
        return self._new(lambda: str(self._rng.randrange(10 ** (digits - 1), 10**digits)))

    def uuid(self) -> str:
        return self._new(lambda: str(uuid.UUID(int=self._rng.getrandbits(128), version=4)))

    def letters(self, count: int, alphabet: str) -> str:
        return self._new(lambda: "".join(self._rng.choices(alphabet, k=count)))

    def _new(self, draw) -> str:
        for _ in range(1000):
            text = draw()
            if text not in self._used:
                self._used.add(text)
                return text
        raise ValueError("the word lists have no more keys that differ: a document of fewer tokens needs fewer")
