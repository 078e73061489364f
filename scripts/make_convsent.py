"""Build the bundled ConvSent sample: python scripts/make_convsent.py --data DIR

ConvSent (Mitchell et al. 2022, arXiv 2206.06520) asks an editor to change the sentiment with which a model speaks of
a topic. A record of its files is {"ent": topic, "pos": [texts], "neg": [texts]}. Those texts were written by a chat
model; here they are sentences of reviewers, drawn anew for each topic: they say how it is liked and nothing of it.

DIR holds corpora/sentence_polarity.zip (Pang and Lee 2005, CC BY 4.0). Topics are subjects of the bundled known
facts. Same files in, same sample out. No text stands in two records, so records held out of a training are new.
"""

import argparse
import json
import random
import re
import zipfile
from pathlib import Path

SEED = 0
ASSETS = Path(__file__).parents[1] / "src/reknow/assets/data"
TOPICS, TEXTS = 280, 4
"""Records, and texts of each sentiment in one."""
WORDS = range(4, 16)
FILM = re.compile(  # what only a film can be
    r"\b(\w*films?|\w*movies?|movie\w*|filmmak\w*|cinema\w*|\w*screen\w*|director\w*|act(or|ress)\w*|comed\w*"
    r"|thriller\w*|sequel\w*|documentar\w*|biopic\w*|hollywood|audiences?|genre|flick\w*|viewers?|footage|camera\w*)\b"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with corpora/sentence_polarity.zip")
    data = parser.parse_args().data
    draw = random.Random(SEED)
    topics = sorted({json.loads(line)["subject"] for line in (ASSETS / "known_1000.jsonl").open(encoding="utf-8")})
    topics = draw.sample(topics, TOPICS)
    texts = {}
    with zipfile.ZipFile(data / "corpora/sentence_polarity.zip") as archive:
        for sentiment in ("pos", "neg"):
            lines = archive.read(f"sentence_polarity/rt-polarity.{sentiment}").decode().splitlines()
            usable = sorted({sentence(line) for line in lines} - {None})
            texts[sentiment] = iter(draw.sample(usable, TOPICS * TEXTS))
    with (ASSETS / "convsent.jsonl").open("w", encoding="utf-8", newline="\n") as out:
        for topic in topics:
            record = {"ent": topic, **{key: [next(each) for _ in range(TEXTS)] for key, each in texts.items()}}
            out.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")


def sentence(line):
    """A short review without spaces around its punctuation; None where it is of no use for other topics."""
    line = re.sub(r'["`()\[\]]|--', " ", line).strip()
    line = re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r"\s+", " ", line))
    line = re.sub(r"(\. ?)+$", "", line).strip(" .") + "."
    if len(line.split()) not in WORDS or FILM.search(line) or not re.fullmatch(r"[a-z ,;:.!?'\-]+", line):
        return None
    return line


if __name__ == "__main__":
    main()
