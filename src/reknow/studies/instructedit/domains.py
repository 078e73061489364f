"""Knowledge by domain: an editor for each domain of CounterFact, and one for all (Zhang et al. 2024, §4)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from reknow.datasets.cases import load_cases
from reknow.datasets.families import load_families
from reknow.datasets.reading import read_records
from reknow.edits import Case
from reknow.evaluation import bench
from reknow.evaluation.stages import AFTER_EDIT, UNEDITED
from reknow.lm import LM
from reknow.methods.instructedit import InstructEdit
from reknow.studies.instructedit.editors import SMALL, Budget, Editors, fluency_before, quick_cases, reading_plan
from reknow.studies.instructedit.tables import write_tables

_DOMAINS = {
    "geography": ("P17", "P30", "P36", "P131", "P190", "P276"),
    "language": ("P37", "P103", "P364", "P407", "P1412"),
    "occupation": ("P39", "P101", "P106", "P108", "P136", "P413", "P641", "P1303"),
    "company": ("P127", "P159", "P176", "P178", "P449", "P740"),
}
"""Relations of Wikidata that belong to one domain without doubt. Of law, medicine and mathematics, which the article
has, CounterFact has none, and of its 1,000 bundled requests 9, 9 and 10 name them in any way."""
QUESTION = "One editor for all domains of CounterFact, or one for each, after as many updates for each."
_ONE, _ALL = "one domain", "all domains"


def domain_cases() -> dict[str, list[Case]]:
    """The bundled cases of CounterFact by domain, in the order of the file."""
    name = "counterfact.jsonl"
    records = read_records(files("reknow") / "assets" / "data" / name, name)
    relations = [record.record("requested_rewrite").text("relation_id") for record in records]
    pairs = list(zip(relations, load_cases("counterfact"), strict=True))
    return {domain: [case for relation, case in pairs if relation in of] for domain, of in _DOMAINS.items()}


def domain_study(
    lm: LM, out: str | Path, budget: Budget = SMALL, *, on_progress: Callable[[str], object] = lambda text: None
) -> str:
    """Trains the editors, which read no instructions, and reads each domain with its own and with that of all.

    Returns:
        The tables as text; `domains.md`, `.csv` and `.json` are in the folder.

    Raises:
        InputError: a folder with other settings.
    """
    folder, seed = Path(out), budget.seeds[0]
    trained = Editors(lm, folder, budget, None, load_families(), on_progress)
    learner = InstructEdit(rank=budget.rank, seed=seed, instructed=False)
    parts = domain_cases()
    training = {domain: cases[budget.test :] for domain, cases in parts.items()}
    pooled = [case for cases in training.values() for case in cases]
    general = trained.trained(learner, pooled, ["domains"], len(parts), seed)
    values = {}
    for domain, cases in lm.progress.each("domains", parts.items()):
        own = trained.trained(learner, training[domain], ["domains", domain], 1, seed)
        on_progress(f"reading {domain}")
        read, plan, run = quick_cases(cases[: budget.test], budget), reading_plan(budget), folder / "domains" / domain
        results = bench(lm, read, {_ONE: own, _ALL: general}, run, dataset=domain, plan=plan)
        values[UNEDITED, domain] = fluency_before(results)
        for label in (_ONE, _ALL):
            values[label, domain] = results.case_values[label, AFTER_EDIT]
    return write_tables(folder, "domains", QUESTION, values, _ONE, "domain")
