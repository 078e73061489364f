"""Wrong arguments in Python: whatever a public function is given, what is wrong is one sentence."""

from __future__ import annotations

import warnings

import pytest

from conftest import make_lm, some_patch
from reknow import LM, Case, Edit, Patch, Probe, ReknowError, diff, evaluate, load_cases, load_edits, merge, method
from reknow.checks.arguments import typed
from reknow.datasets import load_facts
from reknow.editing.covariance import covariance, statistics
from reknow.editing.layer_choice import suggest_layer
from reknow.errors import InputError
from reknow.evaluation import Plan, bench
from reknow.evaluation.effect import control_facts, observe
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.patching.stack import save_stack
from reknow.tracing.causal import Tracing, average, embedding_std, known_facts, trace_facts, trace_prompt
from reknow.tracing.known import known_cases

EDIT = Edit("The capital of {} is", subject="Peru", target_new="Rome")
CASE = Case(EDIT)
FAST = dict(layer=2, steps=1)
NO_MODEL = (None, "demo:gpt2", 5, [])
NO_TEXTS = (None, "Peru", 5, [1], [None], {"Peru": 1}, [["Peru"]])
NO_PATCH = (None, 5, [], b"a")


@pytest.fixture(scope="module")
def lm() -> LM:
    return make_lm()


def calls(lm: LM, folder) -> dict[str, list]:
    """Function → calls of it with one wrong argument each."""
    patch, ft, out = some_patch(lm), method("ft-m", **FAST), folder / "out"
    return {
        "LM": [lambda x=x: LM(x) for x in (None, 5, [], (), ("a", "b"), (None, None), b"demo:gpt2", {})]
        + [
            lambda x=x: LM.demo("gpt2", **x)
            for x in ({"dtype": 5}, {"device": 5.5}, {"chat": "yes"}, {"tokenizer": 3})
        ],
        "Edit": [lambda x=x: Edit(x, target_new="Rome") for x in (None, "", [], b"a", True, {})]
        + [lambda x=x: Edit("It is", target_new=x) for x in (None, "", [], b"a", True)]
        + [lambda x=x: Edit("It is", target_new="Rome", **{x: [5]}) for x in vars(EDIT) if x[0] not in "pt"]
        + [lambda x=x: Edit.parse(x, "Rome") for x in (None, 5, [])],
        "Probe": [lambda x=x: Probe(x, ("a",), "locality", "n") for x in (None, 5, ["a"])]
        + [lambda x=x: Probe("It is", x, "locality", "n") for x in (None, 5, "a", [None], [])]
        + [lambda x=x: Probe("It is", ("a",), x, "n") for x in (None, 5, "other", [])]
        + [lambda x=x: Probe("It is", ("a",), "locality", x) for x in (None, 5, [])],
        "Case": [lambda x=x: Case(x) for x in (None, "It is", 5, [EDIT])]
        + [lambda x=x: Case(EDIT, x) for x in (None, "It is", 5, [None], EDIT, [EDIT])]
        + [lambda x=x: Case(EDIT, (), x) for x in (None, 5, ["It is"])],
        "score": [lambda x=x: lm.score(x, ["Rome"]) for x in NO_TEXTS]
        + [lambda x=x: lm.score(["It is"], x) for x in NO_TEXTS]
        + [lambda x=x: lm.score(["It is"], ["Rome"], x) for x in ("a", 5, [5], [])],
        "generate": [lambda x=x: lm.generate(x) for x in (None, 5, [1], [None], b"a", {})]
        + [lambda x=x: lm.generate("It is", x) for x in (None, "3", 1.5, [3], True)]
        + [lambda x=x: lm.generate("It is", 2, top_k=x) for x in ("3", 1.5, 0)]
        + [lambda x=x: lm.generate("It is", 2, top_k=2, temperature=x) for x in ("1", None, 0, [1])]
        + [lambda x=x: lm.generate("It is", 2, top_k=2, seed=x) for x in ("1", None, 1.5)],
        "perplexity": [lambda x=x: lm.perplexity(x) for x in (*NO_TEXTS, [])]
        + [lambda x=x: lm.perplexity(["It is"], x) for x in (None, "3", 1.5)],
        "weight": [lambda x=x: lm.weight(x) for x in (None, 5, "nowhere")],
        "apply": [lambda x=x: lm.apply(x) for x in (*NO_PATCH, "a.patch", EDIT)],
        "revert": [lambda x=x: lm.revert(x) for x in (*NO_PATCH, "abc", patch)],
        "rebuild": [lambda x=x: lm.rebuild(without=x) for x in (*NO_PATCH, "abc")],
        "patched": [lambda x=x: lm.patched(x).__enter__() for x in (*NO_PATCH, "a.patch")],
        "stacked": [lambda x=x: lm.stacked(x).__enter__() for x in (None, 5, "a.patch", [None], patch, ["a"])],
        "method": [lambda x=x: method(x) for x in (None, 5, "roem", [], ft)]
        + [lambda x=x: method("rome", **x) for x in ({"steps": "3"}, {"layer": [1]}, {"layer": "1"}, {"stps": 3})],
        "Method.edit": [lambda x=x: ft.edit(lm, x) for x in (None, 5, "It is", [], [None], ["It is"], CASE, [CASE])]
        + [lambda x=x: ft.edit(x, [EDIT]) for x in NO_MODEL],
        "Method.edit_each": [lambda x=x: ft.edit_each(x, [EDIT]) for x in NO_MODEL],
        "evaluate": [lambda x=x: evaluate(lm, x, ft) for x in (None, 5, "It is", [], [EDIT], [None], CASE)]
        + [lambda x=x: evaluate(lm, [CASE], x) for x in (None, "rome", 5, [ft], type(ft))]
        + [lambda x=x: evaluate(x, [CASE], ft) for x in NO_MODEL]
        + [
            lambda x=x: evaluate(lm, [CASE], ft, Plan(**x))
            for x in ({"mode": "all"}, {"seeds": ("1",)}, {"held_out": "It"})
        ]
        + [lambda x=x: evaluate(lm, [CASE], ft, x) for x in (None, 5, "single")]
        + [lambda x=x: evaluate(lm, [CASE], ft, Plan(checkpoints=x)) for x in (None, 5, ["1"], [1])],
        "bench": [lambda x=x: bench(lm, [CASE], x, out) for x in (None, "rome", ["rome"], [], {}, ft, {"a": "rome"})]
        + [lambda x=x: bench(lm, x, [ft], out) for x in (None, "It is", [EDIT])]
        + [lambda x=x: bench(lm, [CASE], [ft], x) for x in (None, 5, [])]
        + [lambda x=x: bench(lm, [CASE], [ft], out, plan=x) for x in (None, "batch", {})],
        "Plan": [
            lambda x=x: Plan(**x) for x in ({"mode": None}, {"seeds": 1}, {"seeds": ["1"]}, {"batch_size": "2"})
        ],
        "load_cases": [lambda x=x: load_cases(x) for x in (None, 5, [], "counterfat", b"zsre")]
        + [
            lambda x=x: load_cases("zsre", **x) for x in ({"limit": "3"}, {"offset": 1.5}, {"seed": "a"}, {"path": 5})
        ],
        "load_facts": [lambda x=x: load_facts(x) for x in (None, 5, [], "lre2")]
        + [lambda x=x: load_facts("lre", **x) for x in ({"limit": "3"}, {"seed": []}, {"path": 5})],
        "load_edits": [lambda x=x: load_edits(x) for x in (None, 5, [], folder / "none.json")],
        "Patch": [lambda x=x: Patch.load(x) for x in (None, 5, [], folder / "none.patch", "", EDIT)]
        + [lambda x=x: patch.save(x) for x in (None, 5, [])]
        + [lambda x=x: patch.truncated(x) for x in (None, "3", 1.5, 0)],
        "merge": [lambda x=x: merge(x) for x in (None, 5, "a.patch", [], [None], ["a.patch"], patch)],
        "diff": [lambda x=x: diff(patch, x) for x in (None, 5, "a.patch", [patch])],
        "save_stack": [lambda x=x: save_stack(folder / "s", "demo:gpt2", x) for x in (None, 5, "a", [None])]
        + [lambda x=x: save_stack(x, "demo:gpt2", []) for x in (None, 5)],
        "export": [lambda x=x: export_checkpoint(lm, x) for x in (None, 5, [])]
        + [lambda x=x: export_lora(lm, out, max_rank=x) for x in ("3", 1.5, 0)]
        + [lambda x=x, f=f: f(x, out) for x in NO_MODEL for f in (export_checkpoint, export_lora)],
        "suggest_layer": [lambda x=x: suggest_layer(x) for x in NO_MODEL],
        "statistics": [lambda x=x: covariance(lm, x) for x in (None, "1", 1.5, 99, -1, [1])]
        + [lambda x=x: covariance(lm, 1, tokens=x) for x in (0, "9", 1.5)]
        + [lambda x=x: statistics(lm, x) for x in (None, 1, "1", ["1"])]
        + [lambda x=x: covariance(x, 1) for x in NO_MODEL],
        "trace_prompt": [lambda x=x: trace_prompt(lm, x, "Peru", 1.0) for x in (None, 5, ["{}"], "Peru is")]
        + [lambda x=x: trace_prompt(lm, "{} is", x, 1.0) for x in (None, 5, [])]
        + [lambda x=x: trace_prompt(lm, "{} is", "Peru", x) for x in (None, "1", [])]
        + [lambda x=x: trace_prompt(lm, "{} is", "Peru", 1.0, x) for x in ("a", 5, {})]
        + [lambda x=x: trace_prompt(x, "{} is", "Peru", 1.0) for x in NO_MODEL],
        "facts": [
            lambda x=x, f=f: f(lm, x) for x in (None, 5, "Peru", ["Peru"]) for f in (embedding_std, known_facts)
        ]
        + [lambda x=x: trace_facts(lm, x) for x in (None, 5, "Peru", ["Peru"])]
        + [lambda x=x: average(x) for x in (None, 5, ["Peru"])]
        + [lambda x=x: Tracing(samples=x) for x in (None, "3", 0)],
        "effect": [
            lambda x=x, f=f: f(lm, x) for x in (None, 5, ["Peru"]) for f in (observe, control_facts, known_cases)
        ],
    }


def test_what_is_wrong_is_one_sentence(lm, tmp_path):
    table, bare, count = calls(lm, tmp_path), [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, tries in table.items():
            for number, call in enumerate(tries):
                count += 1
                try:
                    bare.append(f"{name} {number}: nothing, but {call()!r:.60}")
                except ReknowError as error:
                    if "\n" in str(error) or len(str(error)) > 500:
                        bare.append(f"{name} {number}: {error}")
                except Exception as error:
                    bare.append(f"{name} {number}: {error!r:.150}")
    assert not bare, "\n".join(bare)
    assert count > 300
    assert lm.patches == () and list(tmp_path.iterdir()) == []


SENTENCES = {
    "a text for a list": (
        lambda lm: lm.score("Peru is", ["Lima"]),
        "expected prompts as [str, …]; got one text 'Peru is': put it in brackets",
    ),
    "nothing": (lambda lm: lm.generate(None), "expected prompts as str or [str, …]; got None: correct it"),
    "a name for a method": (
        lambda lm: evaluate(lm, [CASE], "rome"),  # type: ignore[arg-type]
        "expected method as Method; got 'rome': correct it",
    ),
    "a name for a model": (
        lambda lm: evaluate("demo:gpt2", [CASE], method("ft-m")),  # type: ignore[arg-type]
        "expected lm as LM; got 'demo:gpt2': open the model, as in LM('demo:gpt2')",
    ),
    "edits for cases": (lambda lm: evaluate(lm, [EDIT], method("ft-m")), "expected cases as [Case, …]; got [Edit("),
    "a path for a patch": (lambda lm: lm.apply("a.patch"), "expected patch as Patch; got 'a.patch': correct it"),
    "an argument that is none": (
        lambda lm: evaluate(lm, [CASE], method("ft-m"), progress=True),  # type: ignore[call-arg]
        "expected evaluate(lm, cases, method, plan); got an unexpected keyword argument 'progress': correct the call",
    ),
    "half a number": (lambda lm: load_cases("zsre", limit=1.5), "expected limit as int or none; got 1.5: correct it"),
}


@pytest.mark.parametrize("what", SENTENCES)
def test_the_sentence_names_argument_type_and_value(lm, what):
    call, sentence = SENTENCES[what]
    with pytest.raises(InputError) as error:
        call(lm)
    assert str(error.value).startswith(sentence)


def test_what_gives_texts_goes_in_as_it_is(lm):
    prompts, targets = ["Peru is", "Lima is"], ["Lima", "Rome"]
    wanted = lm.score(prompts, targets)
    assert lm.score(tuple(prompts), iter(targets)) == wanted == lm.score(dict.fromkeys(prompts).keys(), targets)
    given = ["Peru is"]

    @typed
    def same(texts: list[str], other=None) -> bool:
        return texts is given and other is None

    assert same(given) and same(texts=given)
    with pytest.raises(
        InputError, match=r"^expected same\(texts, other\); missing a required argument: 'texts': corr"
    ):
        same()  # type: ignore[call-arg]
