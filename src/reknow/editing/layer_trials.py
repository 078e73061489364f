"""Which layer to edit: locate by causal tracing, then try (`reknow layers`).

Causal tracing shows where facts sit, but does not foretell where edits succeed best (Hase et al. 2023, arXiv
2301.04213). So it chooses candidates, beside the layers that papers edit, and breaks ties, and trial edits of facts
that the model knows decide. What they gave is kept by `layer_choice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from statistics import fmean
from typing import Any, NamedTuple

from reknow.datasets.facts import Fact, load_facts
from reknow.editing.layer_choice import LayerScore, keep_scores
from reknow.editing.papers_layers import papers_layers
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exclusive import exclusively
from reknow.registry import make
from reknow.tracing.causal import TOKEN_CLASSES, Tracing, average, known_facts, trace_facts

__all__ = ["candidates", "measure_layers", "trial_relations", "try_layers"]

FACTS = 8
"""Trial edits per layer."""
_FEWEST_FACTS = 5
"""With fewer known facts no layer is tried."""
_ASKED_PER_RELATION = 6
"""Facts of one relation of which the model is asked whether it knows them."""
_CANDIDATES = 6
"""Layers tried at most, beside those of the papers."""
_ASKED_PER_EDIT = 3
"""Paraphrases and other subjects that one trial edit is asked."""
ROME_SETTINGS: dict[str, Any] = dict(
    steps=20, stop_probability=0.9, min_delta=0, context_batches=1, context_groups=((4, 5),)
)
"""Settings of ROME in trials. C is that of edits, which need not be read again."""


class _TrialEdit(NamedTuple):
    """A known fact, its new answer, and facts that must stay."""

    fact: Fact
    new: str
    others: list[Fact]


@exclusively
def measure_layers(lm: LM) -> list[LayerScore]:
    """What `try_layers` gives, kept: `suggest_layer` names the best of them from now on. Nothing is kept where the
    model knows too few facts."""
    scores = try_layers(lm)
    if scores:
        keep_scores(lm, scores)
    return scores


def trial_relations() -> list[list[Fact]]:
    """Facts of ParaRel by relation, with paraphrases; none about a subject of the bundled CounterFact sample."""
    evaluated = {fact.subject for fact in load_facts("counterfact")}
    relations: dict[tuple, list[Fact]] = {}
    for fact in load_facts("pararel"):
        if fact.paraphrases and fact.subject not in evaluated:
            relations.setdefault((fact.prompt, fact.paraphrases), []).append(fact)
    return [facts[:_ASKED_PER_RELATION] for facts in relations.values()]


@exclusively
def try_layers(lm: LM, relations: Sequence[Sequence[Fact]] | None = None) -> list[LayerScore]:
    """Trial edits at the candidate layers of the base model; none where it knows too few facts.

    Args:
        relations: facts with paraphrases, grouped by relation; None: `trial_relations()`.
    """
    relations = trial_relations() if relations is None else relations
    with lm.unpatched():
        known = set(known_facts(lm, [fact for facts in relations for fact in facts]))
        edits = _trial_edits(relations, known)
        if len(edits) < _FEWEST_FACTS or lm.layers == 1:
            return []
        facts = [edit.fact for edit in edits]
        traces = []
        with lm.progress.stage("tracing facts", len(facts)) as advance:
            for trace in trace_facts(lm, facts, Tracing(kinds=("mlp",), tokens="subject_last")):
                traces.append(trace)
                advance()
        effects = average(traces).effects["mlp"][TOKEN_CLASSES.index("Last subject token")].tolist()
        chosen = candidates(effects, papers_layers(lm))
        make("rome", ROME_SETTINGS).keep_statistics(lm, chosen)  # of all in one pass over the text
        scores = []
        for layer in lm.progress.each("trying layers", chosen):
            scores.append(_score_layer(lm, layer, effects[layer], edits))
        return scores


def candidates(effects: Sequence[float], always: Sequence[int] = ()) -> list[int]:
    """Layers to try: all of the lower two thirds; of a deep model those of `always`, some evenly spaced and, of the
    others, those of largest effect. Never the last, where the subject does not reach what follows it."""
    last = len(effects) - 1
    lower = range(min(-(-2 * len(effects) // 3), last))
    always = [layer for layer in always if layer < last]
    if len(lower) <= _CANDIDATES:
        return sorted({*lower, *always})
    spaced = {round(i * (len(lower) - 1) / (_CANDIDATES - 3)) for i in range(_CANDIDATES - 2)}
    rest = sorted(set(lower) - spaced - set(always), key=lambda layer: -effects[layer])
    return sorted({*always, *spaced, *rest[: _CANDIDATES - len(spaced)]})


def _trial_edits(relations: Sequence[Sequence[Fact]], known: set[Fact]) -> list[_TrialEdit]:
    """Trial edits: one known fact of every relation, then a second one …; new answers are others of the relation."""
    per_relation = [[_trial_edit(fact, facts, known) for fact in facts if fact in known] for facts in relations]
    alternating = (edit for edits in zip_longest(*per_relation) for edit in edits if edit is not None and edit.others)
    return list(islice(alternating, FACTS))


def _trial_edit(fact: Fact, relation: Sequence[Fact], known: set[Fact]) -> _TrialEdit | None:
    new = next((other.answer for other in relation if other.answer != fact.answer), None)
    if new is None:
        return None
    others = [f for f in relation if f in known and f.subject != fact.subject and f.answer != new]
    return _TrialEdit(fact, new, others[:_ASKED_PER_EDIT])


def _score_layer(lm: LM, layer: int, effect: float, edits: Sequence[_TrialEdit]) -> LayerScore:
    """Edits every fact alone at the layer and asks for it, in paraphrases, and for what must stay."""
    method = make("rome", {"layer": layer, **ROME_SETTINGS})
    wanted = [Edit(fact.prompt, subject=fact.subject, target_new=new) for fact, new, _ in edits]
    rates = []
    for edit, patch, (fact, new, others) in zip(wanted, method.edit_each(lm, wanted), edits, strict=True):
        paraphrases = [edit.fill(paraphrase) for paraphrase in fact.paraphrases[:_ASKED_PER_EDIT]]
        prompts = [edit.text, *paraphrases, *(other.text for other in others)]
        answers = [new] * (1 + len(paraphrases)) + [other.answer for other in others]
        with lm.patched(patch):
            right = [float(score.said) for score in lm.score(prompts, answers)]
        rates.append((right[0], fmean(right[1 : 1 + len(paraphrases)]), fmean(right[1 + len(paraphrases) :])))
    return LayerScore(layer, effect, *(fmean(column) for column in zip(*rates, strict=True)))
