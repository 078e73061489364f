"""Trains the editors that are bundled for the demo models and for SmolLM2.

    python scripts/train_editors.py --family gpt2 --method mend --data DATA --run runs/mend --out mend.safetensors

They learn from three kinds of cases, none of which has a subject or a prompt of the bundled samples, on which
editors are measured: facts that the small demo models know, in several of their wordings, with other known facts of
the relation that must stay, first those of the same old answer, half of them in the wording of the edit; CounterFact
in EasyEdit's form, whose paraphrase is often none and is replaced by one of the relation; and zsRE, from MEND's
files and from KnowEdit. Known facts that are neighbours in the first records of CounterFact are left out too, so
that their locality is that of facts which hardly any example protected. For SmolLM2 (`--apart`) no prompt of an
example, whatever it is there for, stands in a bundled sample. DATA is the folder that
scripts/train_demo_model.py takes.
"""

import argparse
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from demo_facts import Fact, Sizes, collect_facts, relation_wordings
from reknow import LM, Case, Edit, Probe, load_cases
from reknow.cli.training import choose_method
from reknow.datasets import sample_text
from reknow.learning.editors import Editor, case_keys
from reknow.learning.learned import Learned

MEASURED = ("counterfact", "counterfact-easyedit", "zsre", "knowedit-zsre")
"""Bundled samples whose subjects and prompts are left out."""
APART = (*MEASURED, "wiki_recent", "wiki_counterfact", "qaedit")
"""Bundled samples of which nothing is read with `--apart`, neither as what must stay."""
SHOWN = 150
"""Records of CounterFact whose neighbours are left out, from the first."""
PARAPHRASES, NEAR, OTHERS = 3, 6, 8
"""How many paraphrases a case has, other facts of the same old answer at most, and other facts in all."""


def texts(fact: Fact) -> tuple[str, ...]:
    """All prompts with which a fact was trained."""
    return fact.own + fact.wordings


class Maker:
    """Makes cases; all that is drawn comes from one seed."""

    def __init__(self, data: Path):
        self.data, self.rng = data, random.Random(0)
        self.wordings = relation_wordings(data)
        self.sentences = [s for text in sample_text() for s in text.split(" . ") if 20 < len(s) < 60]

    def case(self, edit: Edit, inside: list[str], outside: list[tuple[str, str]]) -> Case:
        # CounterFact's paraphrases stand behind an unrelated sentence: half of ours do too.
        inside = [p if self.rng.random() < 0.5 else f"{self.rng.choice(self.sentences)}. {p}" for p in inside]
        follows = (Probe(prompt, (edit.target_new,), "generalization", "wording") for prompt in inside)
        stays = (Probe(prompt, (answer,), "locality", "neighbor") for prompt, answer in outside)
        return Case(edit, (*follows, *stays))

    def known(self) -> list[Case]:
        """Facts of the demo models' training text, each with another object of its relation."""
        shown = {probe.prompt for case in load_cases("counterfact")[:SHOWN] for probe in case.probes}
        relations = defaultdict(list)
        for fact in collect_facts(self.data, Sizes())[0]:
            if fact.relation in self.wordings and len(texts(fact)) > 1 and shown.isdisjoint(texts(fact)):
                relations[fact.relation].append(fact)
        cases = []
        for relation, facts in sorted(relations.items()):
            objects = sorted({fact.answer for fact in facts})
            for fact in facts if len(objects) > 1 else ():
                prompts = self.rng.sample(texts(fact), len(texts(fact)))
                new = self.rng.choice([answer for answer in objects if answer != fact.answer])
                about = dict(target_new=new, target_true=fact.answer, id=f"{relation}/{fact.subject}")
                edit = Edit(prompts[0].replace(fact.subject, "{}", 1), subject=fact.subject, **about)
                outside = self.neighbours(fact, facts, prompts[0])
                cases.append((fact.subject, self.case(edit, prompts[1 : 1 + PARAPHRASES], outside)))
        return cases

    def neighbours(self, fact: Fact, facts: list[Fact], prompt: str) -> list[tuple[str, str]]:
        """(prompt, answer) of other facts of the relation."""
        alike = [f for f in facts if f.answer == fact.answer and f is not fact]
        others = [f for f in facts if f.answer != fact.answer]
        near = self.rng.sample(alike, min(len(alike), NEAR))
        found = near + self.rng.sample(others, min(len(others), OTHERS - len(near)))
        same = [prompt.replace(fact.subject, f.subject) for f in found]
        return [
            (text if text in texts(f) and self.rng.random() < 0.5 else self.rng.choice(texts(f)), f.answer)
            for f, text in zip(found, same, strict=True)
        ]

    def counterfact(self, limit: int) -> list[Case]:
        """CounterFact of EasyEdit's training split, with wordings of the relation in place of its paraphrase."""
        relation_of = {wording: r for r, wordings in self.wordings.items() for wording in wordings}
        cases = []
        for case in load_cases("counterfact-easyedit", path=self.data / "counterfact/counterfact-train.json")[:limit]:
            subject = case.edit.subject
            others = [
                w for w in self.wordings.get(relation_of.get(case.edit.prompt, ""), ()) if w != case.edit.prompt
            ]
            inside = [w.format(subject) for w in self.rng.sample(others, min(len(others), PARAPHRASES))]
            outside = [(probe.prompt, probe.answers[0]) for probe in case.probes if probe.kind == "locality"]
            cases.append((subject, self.case(case.edit, inside, outside)))
        return cases

    def questions(self) -> list[Case]:
        """zsRE as it is."""
        files = ("zsre_mend_train-1k.json", "zsre_mend_eval_portability_gpt4.json")
        cases = [case for file in files for case in load_cases("zsre", path=self.data / "zsre" / file)]
        cases += load_cases("knowedit-zsre", path=self.data / "knowedit/ZsRE-test-all.json")
        return [(case.edit.subject, case) for case in cases]

    def all(self, counterfact: int, *, apart: bool = False) -> list[Case]:
        """Cases of facts that are not measured.

        Args:
            apart: without any prompt that stands in a sample, be it a paraphrase or another fact.
        """
        measured = [case for name in (APART if apart else MEASURED) for case in load_cases(name)]
        subjects, keys = {case.edit.subject for case in measured}, set(case_keys(measured).tolist())
        found = [*self.known(), *self.counterfact(counterfact), *self.questions()]
        cases = [case for subject, case in found if subject not in subjects]
        cases = [case for case, key in zip(cases, case_keys(cases).tolist(), strict=True) if key not in keys]
        return without_prompts(cases, measured) if apart else cases


def without_prompts(cases: list[Case], measured: list[Case]) -> list[Case]:
    """The cases whose edit asks no question of those that are measured, without their probes that do."""
    prompts = {question.prompt for case in measured for question in case.questions}

    def without(probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
        return tuple(probe for probe in probes if probe.prompt not in prompts)

    return [replace(case, probes=without(case.probes)) for case in cases if case.edit.text not in prompts]


def halved(editor: Editor) -> Editor:
    """The editor with its matrices in float16, which is half as large; it computes in float32 all the same.

    Vectors stay: sums of squares among them are too large for float16.
    """
    tensors = editor.tensors.items()
    return replace(editor, tensors={n: t.half() if t.is_floating_point() and t.dim() > 1 else t for n, t in tensors})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("gpt2", "llama", "smollm2"), required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--run", type=Path, required=True, help="folder of the training; the same one takes it up")
    parser.add_argument("--out", type=Path, help="file of the editor, in float16")
    parser.add_argument("--counterfact", type=int, default=1500, help="how many of its cases")
    parser.add_argument("--apart", action="store_true", help="no prompt of a bundled sample stands in an example")
    parser.add_argument("--limit", type=int, help="how many cases of all, drawn at random")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of the method or the training")
    parser.add_argument("--dtype", help="of the model in the training; bfloat16 is quicker where the CPU has it")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    method, values = choose_method(args.method, args.set)
    assert isinstance(method, Learned)
    cases = Maker(args.data).all(args.counterfact, apart=args.apart)
    if args.limit is not None:
        cases = random.Random(0).sample(cases, args.limit)
    print(f"{len(cases):,} cases")
    lm, training = LM.demo(args.family, dtype=args.dtype), replace(method.training, **values)
    with lm.progress.shown():
        trained = method.fit(lm, cases, args.run, training)
    editor = Editor.load(trained.editor)
    print(editor.notes["validation"])
    if args.out:
        small = halved(replace(editor, notes={**editor.notes, "log": editor.notes["log"][-1:]}))
        print(small.save(args.out))


if __name__ == "__main__":
    main()
