"""Do the scale-free defaults work on models of any size, and what do the papers' numbers do there?

    python benchmarks/scales.py demo:gpt2 demo:llama FOLDER … --facts 20

For every model, facts of CounterFact that it knows: mass editors write all of them in one batch at the layer that is
suggested for the model, FT-L each by itself. One row per method and setting, as Markdown. λ, threshold and L2 do not
touch the search for the wanted states, so settings of one method share it.
"""

import argparse
import sys

import torch

from exam import Exam, one_search
from reknow import LM, load_cases, method
from reknow.editing.layer_choice import suggest_layer
from reknow.tracing.known import known_cases

SETTINGS = [
    ("memit", "default", {}),
    ("memit", "λ 15,000, as for GPT-J", {"covariance_weight": 15_000.0}),
    ("emmet", "default", {}),
    ("emmet", "ridge 0.1, as published", {"ridge": 0.1}),
    ("pmet", "default", {}),
    ("pmet", "λ 6,000, as for GPT-J", {"covariance_weight": 6_000.0}),
    ("alphaedit", "default", {}),
    ("alphaedit", "eigenvalues < 0.02, L2 10, as published", {"null_threshold": 0.02, "l2": 10.0}),
    ("ft-l", "default", {}),
    (
        "ft-l",
        "5e-4 a step and at most, as for GPT-2 XL",
        {"learning_rate": 5e-4, "clamp": 5e-4, "units": "absolute"},
    ),
]


def patches_of(lm, editor, cases):
    if editor.name == "ft-l":
        return [([i], editor.edit(lm, [case.edit])) for i, case in enumerate(cases)]
    return [(range(len(cases)), editor.edit(lm, [case.edit for case in cases]))]


def report(name, facts, methods):
    lm = LM(name)
    cases = known_cases(lm, load_cases("counterfact"))[:facts]
    layer = suggest_layer(lm)
    about = f"{lm.layers} layers of {lm.parts.hidden_size}, {len(cases)} facts, layer {layer}"
    print(f"{lm.name}: {about}", file=sys.stderr, flush=True)
    exam = Exam(lm, cases)
    with one_search():
        for key, label, settings in (setting for setting in SETTINGS if setting[0] in methods):
            known = method(key).__dataclass_fields__
            place = {"layers": (layer,)} if "layers" in known else {"layer": layer}
            editor = method(key, **place, **settings)
            try:
                numbers = [f"{rate:.1f}" for rate in exam.rates(patches_of(lm, editor, cases))]
            except Exception as error:  # what a published number does is the question
                numbers = [type(error).__name__, "–", "–"]
            print(f"| {about} | `{key}` | {label} | {' | '.join(numbers)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=[setting[0] for setting in SETTINGS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | method | setting | reliability | generalization | locality |\n|---|---|---|---|---|---|")
    for name in args.models:
        report(name, args.facts, args.methods)


if __name__ == "__main__":
    main()
