"""Makes the tasks by which bench and score see what edits do to abilities: src/reknow/assets/ability.

lambada_like and cloze are written here, choice is drawn from lre.jsonl (MIT). With a fixed seed: each run makes the
same files. The forms are those of lm-evaluation-harness, see the YAML files beside them.
"""

from __future__ import annotations

import json
import random
from itertools import cycle
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "src" / "reknow" / "assets"
NAMES = ("Mara", "Jonas", "Elif", "Tomas", "Ines", "Pavel", "Ruth", "Omar", "Greta", "Luca")

STORIES = {
    "{n} put the {x} on the shelf by the door before going out. When night came and the power failed, everyone "
    "in the house asked {n} to go to that shelf and bring the": ("lantern candle torch lamp radio"),
    "The recipe asked for one more {x}, and {n} had none left. The neighbour across the street was kind and had "
    "a whole basket of them, so {n} went over and borrowed a": ("lemon carrot potato tomato banana"),
    "On the first day at the harbour {n} was given an old {x} and told to look after it. The years went by, "
    "other things were lost or sold, but even as an old captain {n} still had that": ("rope knife compass coat boat"),
    "The children begged for a {x}, and at last their mother gave in. They drove to the farm, looked at every "
    "animal there, and came home that evening with a small brown": ("puppy rabbit kitten pony goat"),
    "{n} had studied the {x} since the age of six. At the concert the hall was full, the lights went down, and "
    "{n} walked on stage, bowed, and began to play the": ("piano violin guitar cello flute"),
    "There was a {x} at the end of the garden where {n} used to hide as a child. Coming back after thirty years, "
    "{n} found the house changed and the garden wild, but nobody had touched the": ("shed tree well wall pond"),
    "The thief took only the {x} and left everything else. The police asked {n} to describe what was missing, "
    "and {n} told them again and again that it was nothing but the": ("painting necklace watch camera violin"),
    "“I will wear the {x} to the wedding,” said {n}. But on the morning of the wedding it had a hole in it, and "
    "nobody in the whole family knew how to mend a": ("dress jacket shirt hat coat"),
    "{n} lost the {x} somewhere between the station and the hotel. The next morning a taxi driver rang the bell, "
    "smiled, and handed over the": ("passport wallet phone ticket suitcase"),
    "The doctor told {n} to stay away from {x} for a month. It was harder than it sounded: wherever {n} went, "
    "every friend, every shop and every café seemed to offer": ("coffee sugar bread cheese chocolate"),
    "For their school project {n} and a friend chose to write about the {x}. They read six books, made a large "
    "drawing, and stood before the class to explain everything they had learned about the": (
        "moon whale brain sun ocean"
    ),
    "The bridge was closed, so {n} had to take the {x} across the river. It was slow and crowded, and {n} swore "
    "never again to travel by": ("ferry boat train bus taxi"),
    "Every morning an old {x} sat on the fence outside the kitchen window, and {n} gave it a bit of bread. One "
    "day the fence was empty, and {n} walked the fields for hours looking for the": ("crow cat owl robin pigeon"),
    "{n} opened the box and found a {x} wrapped in blue paper. There was no letter and no name. For weeks {n} "
    "asked all the relatives, but none of them would say who had sent the": ("book ring clock scarf doll"),
    "The king promised half his land to whoever could bring him the {x}. Knights rode north and south and came "
    "back with empty hands. Then a shepherd girl named {n} walked in and laid before him the": (
        "crown sword dragon key pearl"
    ),
    "The {x} in the hall had not worked since the winter. {n} took it apart on the floor, cleaned each piece, "
    "and put it together again, and by the evening the family had a working": ("clock heater radio lamp piano"),
    "“Do not touch the {x},” the teacher said, “it is very hot.” {n} was not listening, and a moment later {n} "
    "cried out and pulled a hand away from the": ("pan oven kettle plate iron"),
    "They had been walking in the desert for two days when {n} saw a {x} on the horizon. The others said it was "
    "only the heat, but {n} walked on, and by noon they all stood in front of the": ("tower village camel tent well"),
    "{n} was afraid of the {x} that lived under the old mill. The older boys laughed about it, until one evening "
    "they ran home pale and shaking and said that they too had seen the": ("snake bear wolf monster ghost"),
    "The museum had sent its oldest {x} to be cleaned. When the crate came back {n} signed the paper, opened the "
    "lid, and found only straw: somebody had stolen the": ("mask statue map coin drum"),
    "My grandfather {n} grew {x} behind the house. He sold them at the market on Saturdays, and to this day, "
    "when I walk past a market stall, I stop to smell the": ("roses apples onions beans peaches"),
    "It was {n} who first noticed that the {x} was open. We had locked it the night before, all of us remembered "
    "that, and yet there it was, and the wind came in through the": ("window door gate roof tent"),
    "At the market {n} wanted to buy a {x} but had only three coins. The seller shook his head, then looked at "
    "the worn shoes and the rain outside, sighed, and for three coins gave {n} the": (
        "blanket chicken hat sweater loaf"
    ),
    "The letter said that the {x} would be ready on Friday. On Friday {n} drove all the way into the city, "
    "waited an hour in the shop, and was told that nobody there knew anything about a": ("car table suit cake bed"),
}
"""Passages and what they end with: it stands in them, and is hard to guess from the last sentence alone."""

SUBJECTS = (
    ("key", "keys", "to the", "cabinet", "cabinets"),
    ("picture", "pictures", "of the", "child", "children"),
    ("book", "books", "about the", "king", "kings"),
    ("road", "roads", "through the", "forest", "forests"),
    ("teacher", "teachers", "of the", "girl", "girls"),
    ("letter", "letters", "from the", "lawyer", "lawyers"),
    ("box", "boxes", "behind the", "chair", "chairs"),
    ("farmer", "farmers", "near the", "river", "rivers"),
    ("window", "windows", "above the", "door", "doors"),
    ("story", "stories", "about the", "ship", "ships"),
)
VERBS = (
    ("is", "are", "very old."),
    ("was", "were", "not there yesterday."),
    ("has", "have", "been forgotten by everyone."),
)
"""Singular, plural, and how the sentence goes on."""
CHOICES, PER_RELATION = 4, 5


def lambada_like() -> list[dict]:
    names = cycle(NAMES)
    return [
        {"context": story.format(n=next(names), x=word) if "{n}" in story else story.format(x=word), "word": word}
        for story, words in STORIES.items()
        for word in words.split()
    ]


def cloze() -> list[dict]:
    """Sentences with a gap: a verb that agrees with its subject, behind a noun of the other number."""
    found = []
    for one, many, link, near, nears in SUBJECTS:
        for singular, plural, rest in VERBS:
            for number, subject, other in ((0, one, nears), (1, many, near)):
                for article in ("The", "Nobody knew that the"):
                    verbs = (singular, plural)
                    options = [f"{verb} {rest}" for verb in verbs]
                    found.append(
                        {"before": f"{article} {subject} {link} {other}", "options": options, "right": number}
                    )
    return found


def choice(draw: random.Random) -> list[dict]:
    """Questions of relations, with other answers of the same relation beside the right one."""
    found = []
    for line in (ASSETS / "data" / "lre.jsonl").read_text(encoding="utf-8").splitlines():
        relation = json.loads(line)
        objects: dict[str, set[str]] = {}
        for sample in relation["samples"]:
            objects.setdefault(sample["subject"], set()).add(sample["object"])
        every = sorted({one for own in objects.values() for one in own})
        subjects = sorted(subject for subject, own in objects.items() if len(own) == 1)
        if len(every) < CHOICES:
            continue
        for subject in draw.sample(subjects, min(PER_RELATION, len(subjects))):
            (right,) = objects[subject]
            options = draw.sample([one for one in every if one != right], CHOICES - 1)
            place = draw.randrange(CHOICES)
            options.insert(place, right)
            prompt = relation["prompt_templates_zs"][0].format(subject)
            found.append({"prompt": prompt, "options": options, "right": place, "relation": relation["name"]})
    return found


def main() -> None:
    folder = ASSETS / "ability"
    for name, items in (("lambada_like", lambada_like()), ("cloze", cloze()), ("choice", choice(random.Random(0)))):
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(items)} items")


if __name__ == "__main__":
    main()
