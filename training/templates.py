"""Sentences that state the facts of synthetic training documents, and the questions about them.

Evaluation uses other sentences and other words (single and multi-key needles, three-word secrets, the essay needle), so
nothing here may contain one of `HELD_OUT`; a test compares the two sets.
"""

from dataclasses import dataclass

HELD_OUT = ("magic", "vault", "access code", "passphrase", "best thing to do", "badge", "locker", "treaty")
"""Wordings reserved for evaluation: no statement, question or word of the vocabulary contains one of them."""


@dataclass(frozen=True)
class Family:
    """Sentences that state a `value` under a `key`, each with the question that asks for it.

    `key`, `value` and `extra` name what is drawn for the slots (see `facts.draw`); `extra` is a word that all
    members of a group share. `templates` holds (statement, question) pairs, with an answer sentence as third where
    the statement itself would not answer the question naturally.
    """

    kind: str
    key: str
    value: str
    templates: tuple[tuple[str, ...], ...]
    extra: str | None = None


FAMILIES: tuple[Family, ...] = (
    Family(
        "number",
        "site",
        "digits",
        (
            ("The reference number of the {key} is {value}.", "What is the reference number of the {key}?"),
            ("The {key} is registered under the number {value}.", "Under which number is the {key} registered?"),
            ("The PIN for the front door of the {key} is {value}.", "What is the PIN for the front door of the {key}?"),
            ("The account number used by the {key} is {value}.", "What is the account number used by the {key}?"),
            (
                "The alarm at the {key} is switched off with {value}.",
                "With what is the alarm at the {key} switched off?",
            ),
        ),
    ),
    Family(
        "number",
        "person",
        "digits",
        (
            ("{key}'s membership number is {value}.", "What is {key}'s membership number?"),
            ("The lucky number of {key} is {value}.", "What is the lucky number of {key}?"),
            ("The employee number of {key} is {value}.", "What is the employee number of {key}?"),
        ),
    ),
    Family(
        "identifier",
        "item",
        "alphanumeric",
        (
            ("The serial number of the {key} is {value}.", "What is the serial number of the {key}?"),
            ("The {key} carries the inventory tag {value}.", "Which inventory tag does the {key} carry?"),
            (
                "The {key} was shipped with tracking number {value}.",
                "With which tracking number was the {key} shipped?",
            ),
            ("The {key} is listed in the catalogue as {value}.", "How is the {key} listed in the catalogue?"),
            ("The spare part for the {key} is {value}.", "What is the spare part for the {key}?"),
        ),
    ),
    Family(
        "phrase",
        "person",
        "three_words",
        (
            ('{key}\'s recovery phrase is "{value}".', "What is {key}'s recovery phrase?"),
            ('The wifi password of {key} is "{value}".', "What is the wifi password of {key}?"),
            ('{key} greets visitors with the words "{value}".', "With which words does {key} greet visitors?"),
            ('The title of {key}\'s new novel is "{value}".', "What is the title of {key}'s new novel?"),
            ("The code words that {key} wrote down are {value}.", "What are the code words that {key} wrote down?"),
        ),
    ),
    Family(
        "color",
        "person",
        "color",
        (
            ("The color of {key}'s {extra} is {value}.", "What is the color of {key}'s {extra}?"),
            ("{key} owns a {value} {extra}.", "Which color of {extra} does {key} own?"),
            ("Last spring {key} bought a {value} {extra}.", "Which color of {extra} did {key} buy last spring?"),
            ("{key} was seen with a {value} {extra}.", "With which color of {extra} was {key} seen?"),
        ),
        "object",
    ),
    Family(
        "belonging",
        "person",
        "item",
        (
            ("{key} inherited a {value}.", "What did {key} inherit?"),
            ("{key} keeps a {value} on the roof.", "What does {key} keep on the roof?"),
            ("{key} won a {value} in the raffle.", "What did {key} win in the raffle?"),
            ("{key} brought a {value} to the birthday party.", "What did {key} bring to the birthday party?"),
        ),
    ),
    Family(
        "city",
        "person",
        "city",
        (
            ("{key} was born in {value}.", "In which city was {key} born?"),
            ("{key} spent the summer in {value}.", "In which city did {key} spend the summer?"),
            ("The sister of {key} lives in {value}.", "In which city does the sister of {key} live?"),
            ("{key} opened a small shop in {value}.", "In which city did {key} open a small shop?"),
        ),
    ),
    Family(
        "job",
        "person",
        "job",
        (
            ("{key} works as a {value}.", "What does {key} work as?"),
            ("{key} was a {value} before retiring.", "What was {key} before retiring?"),
            ("{key} is training to become a {value}.", "What is {key} training to become?"),
            ("The cousin of {key} is a {value}.", "What is the profession of the cousin of {key}?"),
        ),
    ),
    Family(
        "date",
        "gathering",
        "date",
        (
            ("The {key} will take place on {value}.", "On which date will the {key} take place?"),
            ("Tickets for the {key} go on sale on {value}.", "On which date do tickets for the {key} go on sale?"),
            ("The {key} was postponed to {value}.", "To which date was the {key} postponed?"),
            ("Registration for the {key} closes on {value}.", "On which date does registration for the {key} close?"),
        ),
    ),
    Family(
        "time",
        "city",
        "time",
        (
            ("The last train to {key} leaves at {value}.", "At what time does the last train to {key} leave?"),
            ("The ferry from {key} arrives at {value}.", "At what time does the ferry from {key} arrive?"),
            (
                "The call with the {key} team starts at {value}.",
                "At what time does the call with the {key} team start?",
            ),
            ("The night market in {key} closes at {value}.", "At what time does the night market in {key} close?"),
        ),
    ),
    Family(
        "price",
        "item",
        "price",
        (
            ("The {key} costs {value}.", "How much does the {key} cost?"),
            ("The {key} was sold at the auction for {value}.", "For how much was the {key} sold at the auction?"),
            ("The repair of the {key} cost {value}.", "How much did the repair of the {key} cost?"),
            ("The {key} is insured for {value}.", "For how much is the {key} insured?"),
        ),
    ),
    Family(
        "phone",
        "company",
        "phone",
        (
            ("The phone number of {key} is {value}.", "What is the phone number of {key}?"),
            ("{key} can be reached at {value}.", "At which number can {key} be reached?"),
            ("Complaints about {key} are taken at {value}.", "At which number are complaints about {key} taken?"),
            ("The fax number printed by {key} is {value}.", "What is the fax number printed by {key}?"),
        ),
    ),
    Family(
        "quote",
        "person",
        "saying",
        (
            ('"{value}," said {key}.', "What did {key} say?", '{key} said: "{value}."'),
            ('{key} wrote on the wall: "{value}."', "What did {key} write on the wall?"),
            ('{key} told the reporters: "{value}."', "What did {key} tell the reporters?"),
            ('The advice of {key} was: "{value}."', "What was the advice of {key}?"),
        ),
    ),
    Family(
        "speaker",
        "saying",
        "person",
        (
            ('"{key}," said {value}.', 'Who said "{key}"?', 'The person who said "{key}" was {value}.'),
            (
                '{value} wrote on the blackboard: "{key}."',
                'Who wrote "{key}" on the blackboard?',
                'The person who wrote "{key}" on the blackboard was {value}.',
            ),
            ('"{key}" is a saying of {value}.', 'Whose saying is "{key}"?'),
            ('The person who shouted "{key}!" was {value}.', 'Who shouted "{key}"?'),
        ),
    ),
    Family(
        "definition",
        "coinage",
        "definition",
        (
            ("A {key} is {value}.", "What is a {key}?"),
            ("In the old dialect, {key} means {value}.", "What does {key} mean in the old dialect?"),
            ("The word {key} stands for {value}.", "What does the word {key} stand for?"),
            ("Sailors call {value} a {key}.", "What do sailors mean by a {key}?", "By a {key}, sailors mean {value}."),
        ),
    ),
    Family(
        "recipe",
        "dish",
        "quantity",
        (
            (
                "The recipe for {key} calls for {value} of {extra}.",
                "How much {extra} does the recipe for {key} call for?",
            ),
            ("The {extra} needed for {key} is {value}.", "How much is the {extra} needed for {key}?"),
            ("Good {key} needs {value} of {extra}.", "How much {extra} does good {key} need?"),
            ("The cook puts {value} of {extra} into the {key}.", "How much {extra} does the cook put into the {key}?"),
        ),
        "ingredient",
    ),
    Family(
        "multi_value",
        "person",
        "language",
        (
            (
                "One of the languages that {key} speaks is {value}.",
                "Which languages does {key} speak?",
                "{key} speaks {value}.",
            ),
            ("{key} can read {value}.", "Which languages can {key} read?", "{key} can read {value}."),
        ),
    ),
    Family(
        "multi_value",
        "person",
        "hobby",
        (
            (
                "One of the hobbies of {key} is {value}.",
                "What are the hobbies of {key}?",
                "The hobbies of {key} are {value}.",
            ),
        ),
    ),
    Family(
        "multi_value",
        "person",
        "animal",
        (("One of the pets of {key} is a {value}.", "What are the pets of {key}?", "The pets of {key} are {value}."),),
    ),
    Family(
        "multi_value",
        "site",
        "digits",
        (
            (
                "One of the room numbers at the {key} is {value}.",
                "What are the room numbers at the {key}?",
                "The room numbers at the {key} are {value}.",
            ),
        ),
    ),
)
"""Families whose facts are one statement and one question; `multi_value` repeats a statement with several values."""

ALIASES: tuple[tuple[str, str, str, str], ...] = (
    (
        "The number of the {alias} is the same as the number of the {key}.",
        "The number of the {key} is {value}.",
        "What is the number of the {alias}?",
        "The number of the {alias} is {value}.",
    ),
    (
        "The {alias} has the PIN of the {key}.",
        "The PIN of the {key} is {value}.",
        "What is the PIN of the {alias}?",
        "The PIN of the {alias} is {value}.",
    ),
    (
        "The {alias} uses the same phone line as the {key}.",
        "The phone line of the {key} is {value}.",
        "What is the phone line of the {alias}?",
        "The phone line of the {alias} is {value}.",
    ),
    (
        "The {alias} shares its mailbox with the {key}.",
        "The mailbox of the {key} is number {value}.",
        "Which mailbox does the {alias} use?",
        "The mailbox of the {alias} is number {value}.",
    ),
)
"""(link, statement, question, answer): the answer is reached through a second sentence."""

RECORDS: tuple[tuple[str, str], ...] = (
    ("{key}: {value}", "What does the line for {key} say?"),
    ("{key} = {value}", "What is {key} set to? Repeat the line."),
    ('"{key}": "{value}",', 'Which line sets "{key}"?'),
    ("[INFO] {key} -> {value}", "Repeat the log line for {key}."),
    ("- {key}: {value}", "What is listed for {key}? Repeat the line."),
    ("| {key} | {value} |", "Copy the row of the table for {key}."),
)
"""(line, question): several lines stand together, the answer is one of them."""

REPEATS: tuple[tuple[str, str], ...] = (
    (
        "The {adjective} {key} {verb_past} the {material} {object} near the {facility}.",
        "Repeat the sentence that mentions the {adjective} {key}.",
    ),
    ("Near {city}, a {key} {verb_past} the {color} {object}.", "Repeat the sentence about the {key} near {city}."),
    (
        "Nobody knew why the {key} {verb_past} a {adjective} {object} in {month}.",
        "Repeat the sentence about why the {key} {verb_past} something in {month}.",
    ),
    (
        "In {city} the {facility} of the {key} holds a {material} {object}.",
        "Repeat the sentence that mentions the {facility} of the {key}.",
    ),
)
"""(sentence, question): the answer is the sentence itself."""

FIRST_PERSON: tuple[tuple[str, str, str, str], ...] = (
    (
        "My lucky number is {value}.",
        "What is {speaker}'s lucky number?",
        "{speaker}'s lucky number is {value}.",
        "digits",
    ),
    (
        "The code of my bicycle lock is {value}.",
        "What is the code of {speaker}'s bicycle lock?",
        "The code of {speaker}'s bicycle lock is {value}.",
        "digits",
    ),
    (
        "My flight has the number {value}.",
        "Which number does {speaker}'s flight have?",
        "{speaker}'s flight has the number {value}.",
        "alphanumeric",
    ),
    (
        "My library card says {value}.",
        "What does {speaker}'s library card say?",
        "{speaker}'s library card says {value}.",
        "alphanumeric",
    ),
    ("I grew up in {value}.", "In which city did {speaker} grow up?", "{speaker} grew up in {value}.", "city"),
    (
        "My brother has moved to {value}.",
        "To which city has {speaker}'s brother moved?",
        "{speaker}'s brother has moved to {value}.",
        "city",
    ),
    (
        "My landlord's name is {value}.",
        "What is the name of {speaker}'s landlord?",
        "The name of {speaker}'s landlord is {value}.",
        "person",
    ),
    (
        "I share my office with {value}.",
        "With whom does {speaker} share an office?",
        "{speaker} shares an office with {value}.",
        "person",
    ),
    (
        "I have just painted my kitchen {value}.",
        "Which color has {speaker}'s kitchen?",
        "{speaker}'s kitchen is {value}.",
        "color",
    ),
    (
        "My favorite dish is {value}.",
        "What is {speaker}'s favorite dish?",
        "{speaker}'s favorite dish is {value}.",
        "dish",
    ),
    (
        "I collect every {value} that I can find.",
        "What does {speaker} collect?",
        "{speaker} collects every {value}.",
        "item",
    ),
    (
        "My appointment is at {value}.",
        "At what time is {speaker}'s appointment?",
        "{speaker}'s appointment is at {value}.",
        "time",
    ),
    (
        "My cat answers to the name {value}.",
        "To which name does {speaker}'s cat answer?",
        "{speaker}'s cat answers to the name {value}.",
        "coinage",
    ),
    (
        "The three words on my shirt are {value}.",
        "What are the three words on {speaker}'s shirt?",
        "The three words on {speaker}'s shirt are {value}.",
        "three_words",
    ),
)
"""(statement, question, answer, slot): what a speaker in a conversation tells of herself."""

SPEAKERS = (
    ("Guest", "Host"),
    ("Anna", "Karl"),
    ("Caller", "Operator"),
    ("Customer", "Clerk"),
    ("Student", "Teacher"),
    ("Patient", "Doctor"),
    ("Human", "Bot"),
    ("Passenger", "Driver"),
)
ASIDES = (
    "",
    "",
    "By the way: {said}",
    "{said} Keep that in mind.",
    "Before I forget it: {said}",
    "{said} Just so you know.",
)
ACKNOWLEDGEMENTS = ("Good to know.", "I have noted it.", "Understood.", "Thanks, I will keep it in mind.", "Noted.")

JOINTS = (" ", " ", ", ", "\n", " - ")
REPETITION_INTRODUCTIONS = (
    "",
    "A passage is said again and again.",
    "Here is a list that starts over whenever it ends.",
    "Learn this by heart.",
)
REPETITION_QUESTIONS = (
    "Go on from here: {start}",
    'What comes after "{start}"? Repeat these words and go on.',
    'Continue the passage from "{start}".',
    'Say the passage from "{start}" on.',
)
"""How a passage that was said again and again goes on."""

QUOTATION_QUESTIONS = (
    'Repeat the sentence from the text that begins with "{start}" word for word.',
    'How does the sentence in the text that begins with "{start}" go on? Quote all of it.',
    'The text says: "{start}" Write down that sentence from its beginning to its end.',
    'Complete the sentence from the text: "{start}"',
)
INTRODUCTIONS = (
    "Read the text and answer the questions.",
    "Here is a text. Questions follow.",
    "Consider the following text.",
)
BRIEF = (
    "Answer with the answer only.",
    "Reply briefly.",
    "Give just the answer, nothing else.",
    "Answer in a few words.",
)
BRIEF_ANSWER = "The answer is {value}."
SENTENCE = ("", "", "Answer in a full sentence.", "Reply with a complete sentence.")
