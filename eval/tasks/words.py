"""Names and words that the tasks' facts are made of, and keys that never repeat within a case.

They belong to the evaluation: training draws its facts from other words and templates (a test compares the two), so
that a score measures what the gates learned about text, not a phrase they have seen.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

CITIES = (
    "Bratislava",
    "Reykjavik",
    "Ottawa",
    "Caracas",
    "Warsaw",
    "Budapest",
    "Copenhagen",
    "Stockholm",
    "Brussels",
    "Amsterdam",
    "Barcelona",
    "Calcutta",
    "Shanghai",
    "Singapore",
    "Bangkok",
    "Melbourne",
    "Seattle",
    "Memphis",
    "Atlanta",
    "Milan",
    "Venice",
    "Kampala",
    "Damascus",
    "Edinburgh",
)
PEOPLE = (
    "Tobias",
    "Marisol",
    "Desmond",
    "Yolanda",
    "Cedric",
    "Fatima",
    "Gustavo",
    "Henrietta",
    "Ignacio",
    "Jocelyn",
    "Kasimir",
    "Lucinda",
    "Malcolm",
    "Nadine",
    "Octavia",
    "Percival",
    "Rosalind",
    "Sheldon",
    "Thelma",
    "Ursula",
    "Vincent",
    "Winifred",
    "Zachary",
    "Theodore",
)
GEMS = (
    "ruby",
    "emerald",
    "sapphire",
    "topaz",
    "opal",
    "amethyst",
    "garnet",
    "onyx",
    "pearl",
    "jade",
    "agate",
    "beryl",
    "citrine",
    "moonstone",
    "peridot",
    "quartz",
)
ADJECTIVES = (
    "silent",
    "brave",
    "lonely",
    "nimble",
    "stormy",
    "tender",
    "wild",
    "broken",
    "distant",
    "hidden",
    "electric",
    "proud",
    "cosmic",
    "royal",
    "amber",
    "sunny",
    "foggy",
    "mighty",
    "fuzzy",
    "spicy",
)
NOUNS = (
    "walrus",
    "penguin",
    "lobster",
    "biscuit",
    "blossom",
    "canary",
    "dragon",
    "fountain",
    "iceberg",
    "lantern",
    "mammoth",
    "oyster",
    "panther",
    "pirate",
    "planet",
    "pretzel",
    "spider",
    "unicorn",
    "volcano",
    "wizard",
)
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

RESERVED_PHRASES = ("magic number", "passphrase", "access code", "vault", "treaty")
"""Phrases of the retrieval tasks that no training template may contain (compared without case)."""

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
    """Draws keys and values, none twice.

    Raises:
        ValueError: on drawing: the word lists or digits are used up.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def word(self) -> str:
        """An adjective and a noun, `silent-walrus`; the lists make 7,800."""
        return self._new(lambda: f"{self._rng.choice(ALL_ADJECTIVES)}-{self._rng.choice(ALL_NOUNS)}")

    def number(self, digits: int = 7) -> str:
        """A number of `digits` digits, RULER's 7 by default, that does not begin with 0."""
        return self._new(lambda: str(self._rng.randrange(10 ** (digits - 1), 10**digits)))

    def uuid(self) -> str:
        """A random UUID (version 4)."""
        return self._new(lambda: str(uuid.UUID(int=self._rng.getrandbits(128), version=4)))

    def letters(self, count: int, alphabet: str) -> str:
        """`count` letters of `alphabet`."""
        return self._new(lambda: "".join(self._rng.choices(alphabet, k=count)))

    def _new(self, draw: Callable[[], str]) -> str:
        for _ in range(1000):
            text = draw()
            if text not in self._used:
                self._used.add(text)
                return text
        raise ValueError("the word lists have no more keys that differ: a document of fewer tokens needs fewer")
