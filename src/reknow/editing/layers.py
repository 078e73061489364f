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
from itertools import zip_longest
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, ValidationError

from reknow.datasets.facts import Fact, load_facts
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.files.atomic import write_text
from reknow.files.cache import cache_folder, warn_if_unwritable
from reknow.files.locks import PATIENCE, write_lock
from reknow.files.schema import Count, FormatError, Listed, Strict, explain, first_problem, parse_json
from reknow.model.exclusive import exclusively
from reknow.model.parts import shape
from reknow.progress import stage
from reknow.published import published_layers
from reknow.registry import make
from reknow.tracing.causal import TOKEN_CLASSES, Tracing, average, known_facts, trace_facts

if TYPE_CHECKING:
    from reknow.lm import LM

log = logging.getLogger(__name__)

DEPTH = 0.17
"""The papers' layers as a share of the depth: 5 of 28 (GPT-J), 5 of 32 (Llama); GPT-2 XL's 17 of 48 is deeper."""

FACTS = 8
"""Trial edits per layer."""
FEWEST_FACTS = 5
"""With fewer known facts no layer is tried."""
ASKED_PER_RELATION = 6
"""Facts of one relation of which the model is asked whether it knows them."""
CANDIDATES = 6
"""Layers tried at most, beside those of the papers."""
WORDINGS = 3
"""Paraphrases and other subjects that one trial edit is asked."""
TRIAL: dict[str, Any] = dict(
    steps=20, stop_probability=0.9, min_delta=0, context_batches=1, context_groups=((4, 5),), covariance_tokens=20_000
)
"""Settings of ROME in trials; of a wide model more tokens, see `trial_settings`."""
TOKENS_PER_INPUT = 2
"""With fewer tokens per input of the value matrix C is nearly singular: trials find less locality than there is."""

FILE = "layers.json"


@dataclass(frozen=True)
class Trial:
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


def resolve_layer(lm: LM, layer: int | None) -> int:
    """The layer asked for, checked; or the one suggested for this model."""
    if layer is not None:
        return lm.check_layer(layer)
    return suggest_layer(lm)


@exclusively
def suggest_layer(lm: LM) -> int:
    """The layer whose trial edits score best on the base model, whatever is applied to it.

    Kept in `layers.json` in the cache folder under the model's fingerprint, and shipped for the bundled models. A
    model that knows fewer than five of the trial facts gets the first of `papers_layers`.
    """
    return lm.cached(("layer",), lambda: _looked_up(lm) if lm.layers > 1 else 0)


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
    settings = json.dumps([facts, FACTS, CANDIDATES, WORDINGS, trial, papers_layers(lm)])
    return f"{lm.fingerprint.digest}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def depth_layer(lm: LM, depth: float = DEPTH) -> int:
    """The layer at that share of the depth; unless told otherwise, where the papers on locating edit."""
    return round(depth * (lm.layers - 1))


def papers_layers(lm: LM) -> list[int]:
    """The layer that a paper edited in models of this shape, if one did, and the one at the papers' depth."""
    return [*published_layers("rome", lm), depth_layer(lm)]


def trial_settings(lm: LM, layer: int) -> dict[str, Any]:
    """Settings of ROME in trials at that layer."""
    tokens = TRIAL["covariance_tokens"]
    width = shape(lm.model.get_submodule(lm.parts.value[layer]))[1]
    return TRIAL | {"covariance_tokens": tokens and max(tokens, TOKENS_PER_INPUT * width)}


def _looked_up(lm: LM) -> int:
    remembered = remembered_layer(lm)
    if remembered is not None:
        log.info("layer %d of %s was chosen before", remembered, lm.name)
        return remembered
    relations = trial_relations()
    trials = try_layers(lm, relations)
    if trials:
        chosen = best(trials)
        entry = {"layer": chosen.layer, "model": lm.name, "trials": [asdict(trial) for trial in trials]}
        scores = ", ".join(f"{trial.layer} ({trial.score:.2f})" for trial in trials)
        log.info("layer %d of %s scores best in trial edits: %s", chosen.layer, lm.name, scores)
    else:
        entry = {"layer": papers_layers(lm)[0], "model": lm.name, "trials": []}
        log.warning(
            "layer %d of %s is a guess by depth or by papers: it knows too few trial facts", entry["layer"], lm.name
        )
    cache, key = cache_folder() / FILE, _key(lm, relations)
    with warn_if_unwritable(), write_lock(cache, wait=PATIENCE):
        write_text(cache, json.dumps({**_read(cache), key: entry}, indent=1))
    return entry["layer"]


class Choice(Strict):
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
        log.warning("%s is broken and is made again: %s", file, explain(error))
        return {}
    known = {}
    for key, entry in entries.items():
        try:
            known[key] = Choice.model_validate(entry).model_dump()
        except ValidationError as error:
            log.warning("%s: the layer of %s is chosen again: %s", file, key, first_problem(error))
    return known


def trial_relations() -> list[list[Fact]]:
    """Facts of ParaRel by relation, with paraphrases; none about a subject of the bundled CounterFact sample."""
    evaluated = {fact.subject for fact in load_facts("counterfact")}
    relations: dict[tuple, list[Fact]] = {}
    for fact in load_facts("pararel"):
        if fact.paraphrases and fact.subject not in evaluated:
            relations.setdefault((fact.prompt, fact.paraphrases), []).append(fact)
    return [facts[:ASKED_PER_RELATION] for facts in relations.values()]


@exclusively
def try_layers(lm: LM, relations: Sequence[Sequence[Fact]] | None = None) -> list[Trial]:
    """Trial edits at the candidate layers of the base model; none where it knows too few facts.

    Args:
        relations: facts with paraphrases, grouped by relation; None: `trial_relations()`.
    """
    relations = trial_relations() if relations is None else relations
    with lm.unpatched():
        known = set(known_facts(lm, [fact for facts in relations for fact in facts]))
        exams = _exams(relations, known)
        if len(exams) < FEWEST_FACTS:
            return []
        facts = [fact for fact, _, _ in exams]
        traces = []
        with stage("tracing facts", len(facts)) as advance:
            for trace in trace_facts(lm, facts, Tracing(kinds=("mlp",), tokens="subject_last")):
                traces.append(trace)
                advance()
        effects = average(traces).effects["mlp"][TOKEN_CLASSES.index("Last subject token")].tolist()
        chosen, trials = candidates(effects, papers_layers(lm)), []
        with stage("trying layers", len(chosen)) as advance:
            for layer in chosen:
                trials.append(_try(lm, layer, effects[layer], exams))
                advance()
        return trials


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of highest score; between equals the one whose layer traces as more effective."""
    return max(trials, key=lambda trial: (trial.score, trial.effect))


def candidates(effects: Sequence[float], always: Sequence[int] = ()) -> list[int]:
    """Layers to try: all of the lower two thirds; of a deep model those of `always`, some evenly spaced and, of the
    others, those of largest effect."""
    lower = range(-(-2 * len(effects) // 3))
    if len(lower) <= CANDIDATES:
        return sorted({*lower, *always})
    spaced = {round(i * (len(lower) - 1) / (CANDIDATES - 3)) for i in range(CANDIDATES - 2)}
    rest = sorted(set(lower) - spaced - set(always), key=lambda layer: -effects[layer])
    return sorted({*always, *spaced, *rest[: CANDIDATES - len(spaced)]})


Exam = tuple[Fact, str, list[Fact]]
"""A known fact, its new answer, and facts that must stay."""


def _exams(relations: Sequence[Sequence[Fact]], known: set[Fact]) -> list[Exam]:
    """Trial edits: one known fact of every relation, then a second one …; new answers are others of the relation."""
    per_relation = [[_exam(fact, facts, known) for fact in facts if fact in known] for facts in relations]
    in_turn = (exam for turn in zip_longest(*per_relation) for exam in turn if exam is not None and exam[2])
    return [exam for exam, _ in zip(in_turn, range(FACTS), strict=False)]


def _exam(fact: Fact, relation: Sequence[Fact], known: set[Fact]) -> Exam | None:
    new = next((other.answer for other in relation if other.answer != fact.answer), None)
    if new is None:
        return None
    stay = [f for f in relation if f in known and f.subject != fact.subject and f.answer != new]
    return fact, new, stay[:WORDINGS]


def _try(lm: LM, layer: int, effect: float, exams: Sequence[Exam]) -> Trial:
    """Edits every fact alone at the layer and asks for it, in paraphrases, and for what must stay."""
    rates = []
    for fact, new, stay in exams:
        edit = Edit(fact.prompt, subject=fact.subject, target_new=new)
        reworded = [edit.fill(paraphrase) for paraphrase in fact.paraphrases[:WORDINGS]]
        prompts = [edit.text, *reworded, *(f.text for f in stay)]
        answers = [new] * (1 + len(reworded)) + [f.answer for f in stay]
        with lm.patched(make("rome", {"layer": layer, **trial_settings(lm, layer)}).edit(lm, [edit])):
            right = [float(score.said) for score in lm.score(prompts, answers)]
        rates.append((right[0], fmean(right[1 : 1 + len(reworded)]), fmean(right[1 + len(reworded) :])))
    return Trial(layer, effect, *(fmean(column) for column in zip(*rates, strict=True)))


def resolve_layers(lm: LM, layers: Sequence[int] | None, count: int | None = None) -> list[int]:
    """The layers asked for, checked and in order; or the range of `count` around the one suggested for this model.

    Raises:
        InputError: it is no list, or empty, or the model does not have one of them.
    """
    if isinstance(layers, int):
        raise InputError(f"expected layers as a list; got {layers}: put it in brackets")
    if layers is not None and not layers:
        raise InputError("expected at least one layer; got an empty list: name one, or leave it to the library")
    if layers is not None:
        return sorted({lm.check_layer(layer) for layer in layers})
    return band(lm, suggest_layer(lm), count)


def band(lm: LM, layer: int, count: int | None = None) -> list[int]:
    """So many layers around this one; None: those of a paper that edited this layer among others in models of this
    shape, or a sixth of the model, five at most, as the papers train of 32 and 48."""
    papers = published_layers("memit", lm)
    if count is None and papers and papers[0] <= layer <= papers[-1]:
        return papers
    count = min(1 + 2 * min(2, lm.layers // 12) if count is None else count, lm.layers)
    first = min(max(0, layer - count // 2), lm.layers - count)
    return list(range(first, first + count))
