"""The built-in federation of `flexlora demo`: twelve families of small tasks whose answers are known by construction.

Eight families belong to one client each, four are held out as tasks that nobody trains on. Prompts are short, since
the demo can afford some ten thousand tokens, and each family wants a bare answer in a form of its own: that is what a
small model lacks and what it can pick up from a few dozen examples.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexlora.data.records import Record
from flexlora.data.writing import new_folder, write_client, write_global_test, write_manifest
from flexlora.randomness import derive


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ITEMS = _words(
    "apple bag ball bell boat book bowl box bread brush cake car chair clock coat coin cup desk door drum egg fan fish "
    "flag fork glass glove goat hat horse house jar key kite lamp leaf lion map milk moon mouse nut pan pear pen pig "
    "pin plate ring road rock rope salt shoe ship snake soap sock song spoon star stone sun table tent tiger train tree "
    "truck wall wheel window wolf"
)
NAMES = _words(
    "Adam Anna Ben Carl Clara David Emma Eric Eva Frank Grace Helen Ivan Jack Jane John Karl Laura Lucy Mark Mary Nina "
    "Oscar Paul Peter Rosa Sam Sara Tom Vera"
)
CITIES = _words(
    "Athens Berlin Boston Cairo Delhi Dublin Geneva Lima London Madrid Milan Oslo Paris Prague Rome Seoul Sydney Tokyo "
    "Vienna Warsaw"
)
THINGS = _words(
    "basket blanket bottle camera carpet guitar hammer jacket ladder laptop mirror needle pencil pillow puzzle shirt "
    "sofa ticket umbrella violin"
)
MONTHS = _words("January February March April May June July August September October November December")
_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")


def in_words(n: int) -> str:
    """0 to 99 in English words."""
    if n < 20:
        return _ONES[n]
    tens = _TENS[n // 10 - 2]
    return tens if n % 10 == 0 else f"{tens}-{_ONES[n % 10]}"


@dataclass(frozen=True)
class Family:
    """One kind of task."""

    name: str
    instruction: str
    make: Callable[[random.Random], tuple[str, str]]
    """One (input, output)."""


def _reverse(rng: random.Random) -> tuple[str, str]:
    items = rng.sample(ITEMS, rng.randint(3, 4))
    return ", ".join(items), ", ".join(reversed(items))


def _sort(rng: random.Random) -> tuple[str, str]:
    items = rng.sample(ITEMS, rng.randint(3, 4))
    return ", ".join(items), " < ".join(sorted(items))


def _count(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(ITEMS, 2)
    times_a, times_b = rng.randint(1, 3), rng.randint(1, 3)
    items = [a] * times_a + [b] * times_b
    rng.shuffle(items)
    counts = {item: items.count(item) for item in items}  # in order of appearance
    return " ".join(items), " and ".join(f"{in_words(n)} {item}" for item, n in counts.items())


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 40), rng.randint(2, 9)
    return f"{a} + {b}", f"{in_words(a)} plus {in_words(b)} makes {in_words(a + b)}"


def _date(rng: random.Random) -> tuple[str, str]:
    year, month, day = rng.randint(1950, 2029), rng.randint(1, 12), rng.randint(1, 28)
    return f"{MONTHS[month - 1]} {day}, {year}", f"{year}-{month:02}-{day:02}"


def _unit(rng: random.Random) -> tuple[str, str]:
    long, short, factor = rng.choice((("km", "m", 1000), ("kg", "g", 1000), ("m", "cm", 100), ("hours", "minutes", 60)))
    n = rng.randint(2, 60)
    return f"{n} {long}", f"{n} {long} = {n * factor} {short}"


def _extract(rng: random.Random) -> tuple[str, str]:
    who, what, where = rng.choice(NAMES), rng.choice(THINGS), rng.choice(CITIES)
    article = "an" if what[0] in "aeiou" else "a"
    sentence = rng.choice((f"{who} bought {article} {what} in {where}.", f"In {where}, {who} lost {article} {what}."))
    return sentence, f"who: {who}; what: {what}; where: {where}"


def _classify(rng: random.Random) -> tuple[str, str]:
    item, kilos = rng.choice(THINGS), rng.randint(1, 19)
    return f"{item}, {kilos} kg", f"{item}: {'light' if kilos < 10 else 'heavy'} parcel"


def _last(rng: random.Random) -> tuple[str, str]:
    items = rng.sample(ITEMS, rng.randint(3, 4))
    return ", ".join(items), items[-1]


def _swap(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(NAMES, 2)
    return f"{a} and {b}", f"{b} and {a}"


def _largest(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(2, 100), 3)
    return ", ".join(map(str, numbers)), str(max(numbers))


def _where(rng: random.Random) -> tuple[str, str]:
    who, where = rng.choice(NAMES), rng.choice(CITIES)
    return f"{who} lives in {where} and works at home.", where


CLIENT_FAMILIES = (
    Family("list reversal", "Reverse the list.", _reverse),
    Family("sorting", "Sort from A to Z.", _sort),
    Family("counting", "Count each word.", _count),
    Family("arithmetic in words", "Add, in words.", _add),
    Family("date normalisation", "Normalise the date.", _date),
    Family("unit normalisation", "Convert to the smaller unit.", _unit),
    Family("extraction", "Extract who, what, where.", _extract),
    Family("rule-based classification", "Label the parcel: light if under 10 kg, else heavy.", _classify),
)
"""Client i holds family i."""

UNSEEN_FAMILIES = (
    Family("last item", "Give the last item of the list.", _last),
    Family("string edit", "Swap the two names.", _swap),
    Family("largest number", "Give the largest number.", _largest),
    Family("place", "Name the city.", _where),
)


def examples(family: Family, count: int, seed: int) -> list[Record]:
    """`count` different examples of one family, the same for the same seed."""
    rng = random.Random(derive(seed, "demo", family.name))
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = family.make(rng)
        found.setdefault(question, answer)
    return [Record(family.instruction, q, a, family.name, (a,)) for q, a in found.items()]


def write_demo(
    folder: str | Path, *, seed: int = 42, train: int = 10, eval: int = 6, test: int = 6, unseen: int = 8
) -> None:
    """Write the federation as ``{folder}/8/local_*_{i}.json`` with `global_test.json`; the same seed, the same bytes.

    Client i trains on ``train`` examples more or fewer by up to a quarter, so that clients weigh differently; it has
    `eval` and `test` others, and each held-out family has `unseen`. No example stands in two files.
    Raises FlexLoraError where something stands in `folder`, or the disk refuses it.
    """
    clients = len(CLIENT_FAMILIES)
    sizes = [train + (i - clients // 2) * train // (2 * clients) for i in range(clients)]
    with new_folder(Path(folder), "--output_dir") as root:
        inner = root / str(clients)
        inner.mkdir()
        for client, (family, size) in enumerate(zip(CLIENT_FAMILIES, sizes, strict=True)):
            records = examples(family, size + eval + test, seed)
            write_client(inner, client, (records[:size], records[size : size + eval], records[size + eval :]))
        write_global_test(inner, [record for family in UNSEEN_FAMILIES for record in examples(family, unseen, seed)])
        write_manifest(
            root,
            {
                "made by": "flexlora demo",
                "seed": seed,
                "clients": {str(i): family.name for i, family in enumerate(CLIENT_FAMILIES)},
                "held out": [family.name for family in UNSEEN_FAMILIES],
            },
        )
