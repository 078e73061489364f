"""Editors of tiny models for the methods that learn to edit: each trained once per run, in a second or two."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from functools import cache

from conftest import make_lm
from reknow import METHODS, Case, Edit, Probe, method
from reknow.instructions import Family, Instruction, save_families
from reknow.learning.learned import Learned
from reknow.learning.training import Training

NAMES = ("Danielle", "Zoë Übel", "Beats Music", "Peru", "Eiffel Tower", "Apple", "São Paulo", "Lima", "French Peru")
ANSWERS = ("of", "in", "is", "The", "and", "by")
SETTINGS: dict[str, dict] = {
    "mend": dict(rank=16, layers=(1, 2), learning_rate=3e-3, step_size_learning_rate=1e-3, edit_weight=1.0),
    "instructedit": dict(
        rank=16, layers=(1, 2), learning_rate=3e-3, step_size_learning_rate=1e-3, edit_weight=1.0, seed=1
    ),
    "malmen": dict(rank=16, layers=(1, 2), learning_rate=3e-3),
    "ke": dict(layers=(1, 2), learning_rate=3e-3, width=64, mlp_width=32, lstm_width=16),
    "serac": dict(embedding_size=16, learning_rate=1e-2),
}
"""Tiny models need few steps and long ones."""
TRAINING = Training(steps=25, batch_size=8, validation=0, validate_every=1000, checkpoint_every=1000, decay=True)


def some_cases(count: int = 96) -> list[Case]:
    """Random facts with the subject at the end of the prompt, where it can steer even a random model."""
    rng, made = random.Random(0), []
    for i in range(count):
        prompt, answer = ("I know {}", "Who is {}")[i % 2], rng.choice(ANSWERS)
        subject, other = (" ".join(rng.sample(NAMES, 2)) for _ in range(2))
        stays = Probe(prompt.replace("{}", other), (rng.choice(ANSWERS),), "locality", "other")
        made.append(Case(Edit(prompt, subject=subject, target_new=answer, id=str(i)), (stays,)))
    return made


def is_learned(name: str) -> bool:
    return issubclass(METHODS[name].method, Learned)


@cache
def trained(name: str, family: str) -> Learned:
    """The method with an editor for `make_lm(family)`."""
    if name == "instructedit":  # with a single task, edits need not name theirs
        instructions = (Instruction("Learn {}."), Instruction("Say it."), Instruction("Answer.", seen=False))
        family_file = f"{tempfile.mkdtemp()}/families.json"
        save_families(family_file, [Family("known", "K", "none", "Known.", instructions=instructions)], {})
        SETTINGS[name]["families"] = family_file
    made, cases = method(name, **SETTINGS[name]), some_cases()
    if name == "serac":  # which learns scopes from other wordings
        cases = [replace(case, edit=replace(case.edit, rephrasings=("Tell me of {}",))) for case in cases]
    assert isinstance(made, Learned)
    return made.fit(make_lm(family), cases, tempfile.mkdtemp(), TRAINING)
