"""Reading cases beside EasyEdit: answers and sampled text."""

from __future__ import annotations

from statistics import fmean

from easyedit import EasyEdit
from reknow import LM, load_cases
from reknow.edits import Case
from reknow.evaluation.probing import SAMPLED_TOKENS, SAMPLED_TOP_K, read_cases
from reknow.model.tokens import Text
from speed_work import timed

FEW = {True: 30, False: 5}
"""Cases that EasyEdit reads, of the demo model and of the large shape; its time is proportional to their number."""


def evaluation(lm: LM, theirs: EasyEdit, count: int = 100) -> dict:
    """Reading cases on one model, as after mass editing: the same questions on both sides."""
    cases = load_cases("counterfact", limit=count)
    asked = [(probe.prompt, probe.answers[0]) for case in cases for probe in asked_of(case)]
    prompts, answers = [prompt for prompt, _ in asked], [answer for _, answer in asked]
    heads = [case.edit.text for case in cases]
    room = SAMPLED_TOKENS - min(len(row.ids) for row in lm.encode([Text(head) for head in heads]))
    few = cases[: FEW[lm.name.startswith("demo")]]
    share = len(cases) / len(few)
    theirs.quality(cases[:2])
    theirs.fluency(cases[:1])
    lm.score(prompts[:20], answers[:20])
    lm.generate(heads[:2], 4, top_k=SAMPLED_TOP_K)

    scores, ours = timed(lambda: lm.score(prompts, answers))
    found, their = theirs.quality(few)
    one_by_one = sum(timed(lambda case=case: score(lm, case))[1] for case in cases)
    _, sampled = timed(lambda: lm.generate(heads, room, top_k=SAMPLED_TOP_K))
    their_sampled = theirs.fluency(few)
    _, everything = timed(lambda: read_cases(lm, cases, fluency=False))
    hits = iter(scores)
    differ = 0.0
    for case, one in zip(few, found, strict=True):
        own, rephrased, *_ = [next(hits) for _ in asked_of(case)]
        for mine, other in ((own, one["rewrite_acc"]), (rephrased, one["rephrase_acc"])):
            differ = max(differ, abs(fmean(mine.correct) - float(other[0])))
    return {
        "cases": count,
        "EasyEdit's cases": len(few),
        "questions": len(asked),
        "largest difference": differ,
        "teacher-forced": {"reknow": ours, "reknow, case by case": one_by_one, "EasyEdit": share * their},
        "fluency": {"reknow": sampled, "EasyEdit": share * their_sampled},
        "all that reknow reads": everything,
    }


def score(lm: LM, case: Case):
    return lm.score([p.prompt for p in asked_of(case)], [p.answers[0] for p in asked_of(case)])


def asked_of(case: Case):
    """The questions that EasyEdit asks: the request, one rephrasing, all neighbours."""
    own, *rest = case.questions
    first = next(probe for probe in rest if probe.kind == "generalization")
    return [own, first, *(probe for probe in rest if probe.kind == "locality")]
