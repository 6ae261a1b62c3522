"""The words of synthetic training documents, by the names of the templates' slots."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


VOCABULARY: dict[str, tuple[str, ...]] = {
    "first_name": _words(
        "Maria Tomas Aisha Henrik Lucia Omar Priya Gustav Elena Kwame Ingrid Mateo Yuki Bernard Salma Viktor Nadia"
        " Felix Rosa Andrei Leila Conrad Mei Rafael Astrid Jamal Clara Dmitri Farah Oscar Hana Luther Beatriz Soren"
        " Amina Pablo Greta Ravi Odette Marcus Ilse Tariq Vera Stefan Noor Edgar Paloma Igor Winnie Hugo"
    ),
    "last_name": _words(
        "Okafor Lindqvist Haddad Moreau Tanaka Petrov Castellano Osei Varga Duarte Novak Iyer Brandt Kowalski Sato"
        " Mbeki Ferreira Hollis Keller Andersson Rahman Delgado Whitlock Zhou Farrow Ibsen Quiroga Marchetti Ostrow"
        " Nakamura Pereira Ashby Volkov Chandra Eriksen Bellamy Sorensen Idris Calloway Reyes Thornton Hoang Castro"
        " Becker Lund Mercer Adeyemi Rossi Strand Galloway"
    ),
    "city": _words(
        "Lisbon Oslo Nairobi Kyoto Lima Prague Dakar Hanoi Bogota Tallinn Cairo Denver Vienna Quito Riga Athens"
        " Seville Osaka Accra Dublin Krakow Havana Bergen Tunis Perth Naples Zagreb Montreal Glasgow Manila Boston"
        " Helsinki Bern Sofia Porto Antwerp Jakarta Santiago Leipzig Toronto Marseille Geneva Austin Valencia Mumbai"
        " Hamburg Portland"
    ),
    "facility": _words(
        "office warehouse laboratory library station hospital museum bakery factory clinic airport school theater"
        " archive workshop depot observatory studio hotel greenhouse bridge refinery shipyard stadium"
    ),
    "color": _words(
        "red blue green yellow orange purple white black brown gray pink turquoise maroon beige violet crimson teal"
        " golden silver navy ivory scarlet olive lavender"
    ),
    "material": _words(
        "wooden copper glass ceramic leather plastic bronze marble velvet rubber steel paper bamboo cotton granite"
        " woolen aluminum brass clay wicker"
    ),
    "object": _words(
        "bicycle lamp suitcase piano kettle umbrella telescope guitar sofa clock camera kayak mirror typewriter"
        " bookshelf tractor necklace backpack ladder microscope canoe blanket printer violin compass scooter teapot"
        " armchair radio toolbox trumpet wheelbarrow aquarium helmet sewing-machine carpet"
    ),
    "noun": _words(
        "harbor cinnamon thunder pencil meadow falcon button island pepper window marble rocket garden ticket orchard"
        " candle river walnut engine feather castle tunnel ribbon desert magnet saddle pillow cactus anchor basket"
        " canyon dolphin hammer jungle kitten lemon monkey needle onion parrot quilt rabbit salmon tiger urchin valley"
        " wagon yogurt zebra acorn bridge cloud drum elbow forest glacier hornet ink jacket kiwi ladle"
    ),
    "adjective": _words(
        "ancient narrow noisy gentle heavy hollow rusty smooth crooked frozen dusty bright lazy clever shiny sleepy"
        " bitter curly fragile gloomy humble jolly loyal modest nervous polite quick salty tidy warm"
    ),
    "event": _words(
        "conference concert auction marathon exhibition wedding tournament lecture festival parade reunion inspection"
        " election premiere banquet workshop"
    ),
    "company_kind": _words("Brothers Industries Logistics Foods Textiles Partners Motors Publishing Shipping Dairy"),
    "job": _phrases(
        "dentist, carpenter, beekeeper, translator, pilot, geologist, librarian, plumber, architect, florist, nurse,"
        " cellist, judge, baker, surveyor, photographer, veterinarian, electrician, tailor, astronomer, chemist, bus"
        " driver, firefighter, watchmaker"
    ),
    "language": _words(
        "Portuguese Finnish Swahili Korean Hungarian Arabic Icelandic Thai Bengali Greek Danish Zulu Turkish Polish"
        " Hindi Welsh Estonian Vietnamese Romanian Czech"
    ),
    "animal": _words(
        "goat parrot horse turtle hamster peacock donkey ferret python owl poodle llama iguana swan hedgehog raccoon"
        " camel lizard rooster otter"
    ),
    "hobby": _phrases(
        "fencing, pottery, archery, chess, gardening, knitting, rowing, origami, birdwatching, juggling, calligraphy,"
        " skydiving, baking, astronomy, snorkeling, woodcarving, ballroom dancing, stamp collecting"
    ),
    "dish": _phrases(
        "lentil soup, plum cake, fish stew, rye bread, onion tart, rice pudding, lamb curry, corn chowder, apple"
        " strudel, walnut cookies, pumpkin ravioli, potato salad, cherry pie, bean chili, mushroom risotto, ginger"
        " biscuits, cheese dumplings, carrot muffins"
    ),
    "ingredient": _words("flour sugar butter milk rice salt honey cream oats yeast cornmeal cheese"),
    "month": _words("January February March April May June July August September October November December"),
    "syllable": _words(
        "bar bel cor dan del fen gal hul jor kam lem lor mar mip nar nov pel quin ras sol tam tor vel vor wim zan zor"
        " fli gru ost ret bix dro plo ska tri"
    ),
    "tool_use": _phrases(
        "cutting bread, measuring rain, polishing boots, sorting letters, drying herbs, catching eels, sharpening"
        " pencils, folding maps, counting coins, opening jars, weighing gold, cleaning chimneys, tuning pianos,"
        " planting bulbs"
    ),
    "verb": _words(
        "sell paint bury borrow repair follow trust ignore measure count weigh polish carry hide praise question"
    ),
    "verb_past": _words(
        "carried painted followed borrowed repaired buried admired ignored polished measured hid photographed"
    ),
    "setting": _words(
        "owner user region branch buffer channel gateway mode profile backup printer theme route token worker"
    ),
    "setting_field": _words("id name key port host code limit label group seed timeout version"),
}
