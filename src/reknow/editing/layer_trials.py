"""Which layer to edit, when the user names none: locate by causal tracing, then try.

Causal tracing shows where facts sit, but does not foretell where edits succeed best (Hase et al. 2023, arXiv
2301.04213). So it chooses candidates, beside the layers that papers edit, and breaks ties, and trial edits of facts
that the model knows decide.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.resources import files
from itertools import islice, zip_longest
from statistics import fmean, harmonic_mean
from typing import Any, NamedTuple

from pydantic import JsonValue, ValidationError

from reknow.datasets.facts import Fact, load_facts
from reknow.editing.papers_layers import papers_layers
from reknow.edits import Edit
from reknow.files.atomic import write_text
from reknow.files.cache import cache_folder, warn_if_unwritable
from reknow.files.locks import PATIENCE, write_lock
from reknow.files.schema import Count, FormatError, Listed, Strict, explain, first_problem, parse_json
from reknow.lm import LM
from reknow.model.exclusive import exclusively
from reknow.model.parts import shape
from reknow.registry import make
from reknow.tracing.causal import TOKEN_CLASSES, Tracing, average, known_facts, trace_facts

__all__ = [
    "LayerScore",
    "best_score",
    "candidates",
    "remembered_layer",
    "suggest_layer",
    "trial_relations",
    "try_layers",
]

_log = logging.getLogger(__name__)

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
    steps=20, stop_probability=0.9, min_delta=0, context_batches=1, context_groups=((4, 5),), covariance_tokens=20_000
)
"""Settings of ROME in trials; of a wide model more tokens, see `trial_settings`."""
_TOKENS_PER_INPUT = 2
"""With fewer tokens per input of the value matrix C is nearly singular: trials find less locality than there is."""

FILE = "layers.json"


@dataclass(frozen=True)
class LayerScore:
    """What trial edits at one layer gave; rates are exact, teacher-forced, means over the facts."""

    layer: int
    effect: float
    """Average indirect effect of the MLP window around it at the subject's last token."""
    reliability: float
    generalization: float
    locality: float

    @property
    def score(self) -> float:
        """Harmonic mean of the three rates."""
        return harmonic_mean([self.reliability, self.generalization, self.locality])


class _TrialEdit(NamedTuple):
    """A known fact, its new answer, and facts that must stay."""

    fact: Fact
    new: str
    others: list[Fact]


@exclusively
def suggest_layer(lm: LM) -> int:
    """The layer whose trial edits score best on the base model, whatever is applied to it.

    Kept in `layers.json` in the cache folder under the model's fingerprint, and shipped for the bundled models. A
    model that knows fewer than five of the trial facts gets the first of `papers_layers`.
    """
    return lm.cached(("layer",), lambda: _choose(lm) if lm.layers > 1 else 0)


def remembered_layer(lm: LM) -> int | None:
    """What `suggest_layer` chose for this model before; None: it would have to make trial edits."""
    if ("layer",) in lm.memo or lm.layers == 1:
        return suggest_layer(lm)
    key = _key(lm, trial_relations())
    for known in (_read(cache_folder() / FILE), _read(files("reknow") / "assets" / FILE)):
        if key in known and known[key]["layer"] < lm.layers:
            return known[key]["layer"]
    return None


def _key(lm: LM, relations: Sequence[Sequence[Fact]]) -> str:
    """The name under which the choice is kept: all that it depends on, whatever the settings are called."""
    facts, trial = [astuple(fact) for relation in relations for fact in relation], [*trial_settings(lm, 0).values()]
    settings = json.dumps([facts, FACTS, _CANDIDATES, _ASKED_PER_EDIT, trial, papers_layers(lm)])
    return f"{lm.fingerprint.digest}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def trial_settings(lm: LM, layer: int) -> dict[str, Any]:
    """Settings of ROME in trials at that layer."""
    tokens = ROME_SETTINGS["covariance_tokens"]
    width = shape(lm.model.get_submodule(lm.parts.value[layer]))[1]
    return ROME_SETTINGS | {"covariance_tokens": tokens and max(tokens, _TOKENS_PER_INPUT * width)}


def _choose(lm: LM) -> int:
    remembered = remembered_layer(lm)
    if remembered is not None:
        _log.info("layer %d of %s was chosen before", remembered, lm.name)
        return remembered
    relations = trial_relations()
    trials = try_layers(lm, relations)
    if trials:
        chosen = best_score(trials)
        entry = {"layer": chosen.layer, "model": lm.name, "trials": [asdict(trial) for trial in trials]}
        scores = ", ".join(f"{trial.layer} ({trial.score:.2f})" for trial in trials)
        _log.info("layer %d of %s scores best in trial edits: %s", chosen.layer, lm.name, scores)
    else:
        entry = {"layer": papers_layers(lm)[0], "model": lm.name, "trials": []}
        _log.warning(
            "layer %d of %s is a guess by depth or by papers: it knows too few trial facts", entry["layer"], lm.name
        )
    cache, key = cache_folder() / FILE, _key(lm, relations)
    with warn_if_unwritable(), write_lock(cache, wait=PATIENCE):
        write_text(cache, json.dumps({**_read(cache), key: entry}, indent=1))
    return entry["layer"]


class _Choice(Strict):
    """What `layers.json` has for a model."""

    layer: Count
    model: str
    trials: Listed[dict[str, JsonValue]]


def _read(file) -> dict[str, dict]:
    """The choices in the file, none where there is none; what is broken is left out with a warning and made again."""
    if not file.is_file():
        return {}
    try:
        entries = parse_json(dict[str, JsonValue], file.read_bytes())
    except (OSError, FormatError) as error:
        _log.warning("%s is broken and is made again: %s", file, explain(error))
        return {}
    known = {}
    for key, entry in entries.items():
        try:
            known[key] = _Choice.model_validate(entry).model_dump()
        except ValidationError as error:
            _log.warning("%s: the layer of %s is chosen again: %s", file, key, first_problem(error))
    return known


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
        if len(edits) < _FEWEST_FACTS:
            return []
        facts = [edit.fact for edit in edits]
        traces = []
        with lm.progress.stage("tracing facts", len(facts)) as advance:
            for trace in trace_facts(lm, facts, Tracing(kinds=("mlp",), tokens="subject_last")):
                traces.append(trace)
                advance()
        effects = average(traces).effects["mlp"][TOKEN_CLASSES.index("Last subject token")].tolist()
        chosen, scores = candidates(effects, papers_layers(lm)), []
        with lm.progress.stage("trying layers", len(chosen)) as advance:
            for layer in chosen:
                scores.append(_score_layer(lm, layer, effects[layer], edits))
                advance()
        return scores


def best_score(scores: Sequence[LayerScore]) -> LayerScore:
    """The highest score; between equals that of the layer which traces as more effective."""
    return max(scores, key=lambda layer: (layer.score, layer.effect))


def candidates(effects: Sequence[float], always: Sequence[int] = ()) -> list[int]:
    """Layers to try: all of the lower two thirds; of a deep model those of `always`, some evenly spaced and, of the
    others, those of largest effect."""
    lower = range(-(-2 * len(effects) // 3))
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
    rates = []
    for fact, new, others in edits:
        edit = Edit(fact.prompt, subject=fact.subject, target_new=new)
        paraphrases = [edit.fill(paraphrase) for paraphrase in fact.paraphrases[:_ASKED_PER_EDIT]]
        prompts = [edit.text, *paraphrases, *(other.text for other in others)]
        answers = [new] * (1 + len(paraphrases)) + [other.answer for other in others]
        with lm.patched(make("rome", {"layer": layer, **trial_settings(lm, layer)}).edit(lm, [edit])):
            right = [float(score.said) for score in lm.score(prompts, answers)]
        rates.append((right[0], fmean(right[1 : 1 + len(paraphrases)]), fmean(right[1 + len(paraphrases) :])))
    return LayerScore(layer, effect, *(fmean(column) for column in zip(*rates, strict=True)))
