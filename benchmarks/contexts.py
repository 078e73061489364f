"""Does a model follow a context: how often does it give an edit's new answer with the fact before the question?

    python benchmarks/contexts.py --model demo:smollm2 --dtype bfloat16 --out runs/contexts

Nothing is edited. With every form of context the model is asked the request, its paraphrases and its consequences, up
to two of a kind, of records that no table reports: every token of the answer right, teacher-forced, and in brackets
the share of tokens. The folder keeps a line per set and form, and the same command goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from reknow import LM, load_cases
from reknow.files.json_lines import Rows
from reknow.texts.tables import to_markdown

SETS = {"counterfact": 500, "wiki_counterfact": 60, "wiki_recent": 60, "knowedit-zsre": 60}
"""Name → the first record that is asked."""
FORMS = {
    "nothing": "{question}",
    "statement, Now": "{statement} Now: {question}",
    "statement, space": "{statement} {question}",
    "statement, line": "{statement}\n{question}",
    "Fact, Now": "Fact: {statement} Now: {question}",
    "A new knowledge, Now": "A new knowledge: {statement} Now: {question}",
    "Remember, Now": "Remember this new fact and reason about its consequences: {statement} Now: {question}",
    "Fact, line": "Fact: {statement}\n{question}",
    "A new knowledge, line": "A new knowledge: {statement}\n{question}",
    "Remember, line": "Remember this new fact and reason about its consequences: {statement}\n{question}",
    "statement twice": "{statement} {statement} {question}",
}
KINDS = ("reliability", "generalization", "portability")
CHAT = "chat template"


def questions(case):
    """(kind, question, answer, separator), at most two of a kind."""
    edit, found = case.edit, {}
    for kind, *rest in (
        ("reliability", edit.text, edit.target_new, edit.separator),
        *((probe.kind, probe.prompt, probe.answers[0], None) for probe in case.probes if probe.kind in KINDS),
    ):
        found.setdefault(kind, []).append((kind, *rest))
    return [each for of_kind in found.values() for each in of_kind[:2]]


def asked(lm, form, statement, question):
    """The question behind the statement."""
    if form != CHAT:
        return FORMS[form].format(statement=statement, question=question)
    talk = [{"role": "user", "content": f"{statement} Complete: {question}"}]
    return lm.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) + question


def measure(lm, cases, form):
    """Kind → (share of answers whose tokens are all right, share of tokens, questions)."""
    items = [(case.edit.statement, each) for case in cases for each in questions(case)]
    texts = [asked(lm, form, statement, question) for statement, (_, question, *_) in items]
    scores = lm.score(texts, [answer for _, (*_, answer, _) in items], [between for _, (*_, between) in items])
    found = {}
    for kind in KINDS:
        mine = [score for score, (_, (of, *_)) in zip(scores, items, strict=True) if of == kind]
        if mine:
            tokens = [sum(score.correct) / len(score.correct) for score in mine]
            found[kind] = [sum(score.said for score in mine) / len(mine), sum(tokens) / len(mine), len(mine)]
    return found


def table(rows, kind):
    lines = [["before the question", *SETS]]
    for form in dict.fromkeys(row["form"] for row in rows):
        cells = {row["set"]: row[kind] for row in rows if row["form"] == form and kind in row}
        shown = {name: f"{100 * exact:.0f} ({100 * tokens:.0f})" for name, (exact, tokens, _) in cells.items()}
        lines.append([form, *(shown.get(name, "–") for name in SETS)])
    return to_markdown(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:gpt2")
    parser.add_argument("--dtype")
    parser.add_argument("--out", required=True)
    parser.add_argument("--cases", type=int, default=40, help="of each set")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm = LM(args.model, dtype=args.dtype)
    rows = Rows(Path(args.out) / "contexts.jsonl", ("model", "cases", "set", "form"))
    forms = [*FORMS, *([CHAT] if lm.tokenizer.chat_template else [])]
    for name, offset in SETS.items():
        cases = load_cases(name, limit=args.cases, offset=offset)
        for form in forms:
            if (lm.fingerprint.digest, args.cases, name, form) in rows:
                continue
            started = time.process_time()
            about = {"model": lm.fingerprint.digest, "cases": args.cases, "set": name, "form": form}
            found = measure(lm, cases, form)
            rows.add({**about, **found, "seconds": time.process_time() - started})
            print(json.dumps(rows[tuple(about.values())]), flush=True)
    mine = [row for row in rows.values() if row["model"] == lm.fingerprint.digest and row["cases"] == args.cases]
    for kind in KINDS:
        print(f"\n{kind}, every token right (share of tokens), %\n\n{table(mine, kind)}")


if __name__ == "__main__":
    main()
