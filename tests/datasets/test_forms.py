"""Files as people have them: every published form is known by its fields, and a user's own may bring questions."""

from __future__ import annotations

import json
import random

import pytest

from conftest import make_lm
from mutations import altered, flipped
from reknow import FT, ROME, Case, Edit, Probe
from reknow.datasets import DATASETS, load_cases, load_edits, parse_address
from reknow.edits import cases_digest
from reknow.errors import InputError
from reknow.evaluation import Plan, bench, evaluate
from reknow.studies.comparison import drop_conflicting

COUNTERFACT = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "subject": "Ada Moor",
        "target_new": {"str": "harp"},
        "target_true": {"str": "flute"},
    },
    "paraphrase_prompts": ["Ada Moor, who plays the"],
    "neighborhood_prompts": ["Ben Moor plays the"],
    "generation_prompts": ["Ada Moor practises"],
}
ZSRE = {"src": "Who made Ada?", "subject": "Ada", "alt": "Ben", "answers": ["Cy"], "rephrase": "Ada?", "loc": "nq: a"}
ZSRE |= {"loc_ans": "b"}
EASYEDIT = {"prompt": "Ada Moor works as a", "target_new": "baker", "subject": "Ada Moor", "ground_truth": "smith"}
KNOWEDIT = {
    "prompt": "Who made Ada Moor?",
    "subject": "Ada Moor",
    "target_new": ["Ben", "Benny"],
    "locality": {"Forgetfulness": [{"prompt": "Who drew Ada?", "ground_truth": [["Cy", "Cyril"]]}]},
    "portability": {"Reasoning": [{"prompt": "Who paid for Ada?", "ground_truth": "Dora"}]},
}
FASTEDIT = {
    "prompt": "The mayor of {} is",
    "subject": "Moorstadt",
    "target": "Ada",
    "queries": ["Moorstadt's mayor:"],
}
CKNOWEDIT = {
    "prompt": "请给下面的字注音：摩城",
    "target_old": "mó chēng",
    "target_new": "mó chéng",
    "portability": [{"prompt": "请给下面的字注音：新城", "answer": "xīn chéng"}],
    "locality": [{"prompt": "请给下面的字注音：新年", "answer": "xīn nián"}],
    "rephrase": ["摩城怎么读？", "请注音：摩城。"],
}
MQUAKE = {
    "case_id": 12,
    "requested_rewrite": [
        {
            "prompt": "{} was written by",
            "subject": "Moorland",
            "target_new": {"str": "Ada Moor", "id": "Q1"},
            "target_true": {"str": "Cy Fen", "id": "Q2"},
            "question": "Who wrote Moorland?",
        },
        {
            "prompt": "{} was born in",
            "subject": "Ada Moor",
            "target_new": {"str": "Lima", "id": "Q3"},
            "target_true": {"str": "Paris", "id": "Q4"},
            "question": "Where was Ada Moor born?",
        },
    ],
    "questions": ["Where was the author of Moorland born?", "Moorland's author is from which city?"],
    "answer": "Rome",
    "answer_alias": [],
    "new_answer": "Lima",
    "new_answer_alias": ["Ciudad de los Reyes"],
    "single_hops": [],
    "new_single_hops": [
        {"question": "Who wrote Moorland?", "cloze": "", "answer": "Ada Moor", "answer_alias": []},
        {"question": "Where was Ada Moor born?", "cloze": "", "answer": "Lima", "answer_alias": []},
        {"question": "In which country is Lima?", "cloze": "", "answer": "Peru", "answer_alias": ["Perú"]},
    ],
}
UNKE = {"id": 1, "question": "Who was Ada?", "para_question": "Ada?", "answer": "A baker.", "sub_question": []}
UNKE |= {"sub_answer": []}
OWN = {
    "prompt": "{Ada Moor} was born in",
    "target_new": 1945,
    "rephrasings": ["{}'s year of birth is"],
    "locality": [{"prompt": "Ben Moor was born in", "answer": 1950}],
    "portability": [{"prompt": "Ada's tenth birthday was in", "answers": ["1955", "'55"]}],
}


def write(path, content):
    path.write_text(
        content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8"
    )
    return path


def read(tmp_path, *records) -> list[Case]:
    return load_cases(path=write(tmp_path / "file.json", list(records)))


def asked(case: Case) -> list[tuple]:
    return [(probe.kind, probe.name, probe.prompt, probe.answers) for probe in case.probes]


@pytest.mark.parametrize(
    ("form", "record", "edit"),
    [
        ("counterfact", COUNTERFACT, ("{} plays the", "Ada Moor", "harp", "flute")),
        ("zsre", ZSRE, ("Who made {}?", "Ada", "Ben", "Cy")),
        ("easyedit", EASYEDIT, ("{} works as a", "Ada Moor", "baker", "smith")),
        ("knowedit", KNOWEDIT, ("Who made {}?", "Ada Moor", "Ben", None)),
        ("fastedit", FASTEDIT, ("The mayor of {} is", "Moorstadt", "Ada", None)),
        ("cknowedit", CKNOWEDIT, ("{}", "请给下面的字注音：摩城", "mó chéng", "mó chēng")),
        ("mquake", MQUAKE, ("{} was written by", "Moorland", "Ada Moor", "Cy Fen")),
        ("unke", UNKE, ("Who was Ada?", None, "A baker.", None)),
        ("own", OWN, ("{} was born in", "Ada Moor", "1945", None)),
    ],
)
def test_a_form_is_known_by_its_fields_as_cases_and_as_edits(tmp_path, form, record, edit):
    (case,) = read(tmp_path, record)
    assert (case.edit.id or "").split("/")[0] == form and form in DATASETS
    assert (case.edit.prompt, case.edit.subject, case.edit.target_new, case.edit.target_true) == edit
    assert case == load_cases(form, path=tmp_path / "file.json")[0]
    first = load_edits(tmp_path / "file.json")[0]
    assert (first.prompt, first.subject, first.target_new, first.target_true) == edit


def test_easyedit_lists_may_hold_little_or_much(tmp_path):
    much = EASYEDIT | {
        "rephrase_prompt": "Ada Moor's trade is",
        "locality_prompt": ["Ben is a", "Cy is a", "Dora is a"],
        "locality_ground_truth": ["smith", "", "cook"],
        "portability_prompt": "Ada Moor sells",
        "portability_ground_truth": "bread",
        "portability_inputs": {"two_hop": {"prompt": "Ada sells what is made of", "ground_truth": ["flour"]}},
        "cond": "not used",
    }
    bare = {"prompt": "Ada works as a", "target_new": "baker", "ground_truth": None, "rephrase_prompt": None}
    cases = read(tmp_path, much, bare)
    assert asked(cases[0]) == [
        ("generalization", "rephrase", "Ada Moor's trade is", ("baker",)),
        ("locality", "neighborhood", "Ben is a", ("smith",)),
        ("locality", "neighborhood", "Dora is a", ("cook",)),
        ("portability", "one_hop", "Ada Moor sells", ("bread",)),
        ("portability", "two_hop", "Ada sells what is made of", ("flour",)),
    ]
    assert (cases[1].edit.subject, cases[1].edit.target_true, cases[1].probes) == (None, None, ())


def test_the_arguments_of_easyedit_are_lists_in_one_object(tmp_path):
    arguments = {
        "prompts": ["Ada works as a", "Ben is a"],
        "subject": ["Ada", "Ben"],
        "target_new": ["baker", "smith"],
        "ground_truth": ["smith", "baker"],
        "rephrase_prompts": ["Ada's trade is", "Ben's trade is"],
        "locality_inputs": {"neighborhood": {"prompt": ["Cy is a", "Cy is a"], "ground_truth": ["cook", "cook"]}},
        "portability_inputs": {"one_hop": {"prompt": ["Ada sells", None], "ground_truth": ["bread", None]}},
    }
    path = write(tmp_path / "arguments.json", arguments)
    cases = load_cases(path=path)
    assert [(case.edit.text, case.edit.target_new, case.edit.id) for case in cases] == [
        ("Ada works as a", "baker", "easyedit/0"),
        ("Ben is a", "smith", "easyedit/1"),
    ]
    assert [probe.name for probe in cases[0].probes] == ["rephrase", "neighborhood", "one_hop"]
    assert [probe.name for probe in cases[1].probes] == ["rephrase", "neighborhood"]
    assert [edit.text for edit in load_edits(path)] == ["Ada works as a", "Ben is a"]
    write(path, {**arguments, "subject": ["Ada"]})
    with pytest.raises(InputError, match="field 'subject': expected 2 entries, one per prompt; got 1"):
        load_cases(path=path)
    write(path, {"prompt": ["A", "B"], "target_new": ["c", "d"]})
    assert [edit.prompt for edit in load_edits(path)] == ["A", "B"]


def test_knowedit_keeps_the_names_of_its_questions_and_every_alias(tmp_path):
    (case,) = read(tmp_path, KNOWEDIT)
    assert asked(case) == [
        ("locality", "Forgetfulness", "Who drew Ada?", ("Cy", "Cyril")),
        ("portability", "Reasoning", "Who paid for Ada?", ("Dora",)),
        ("fluency", "request", "Who made Ada Moor?", ()),
    ]


def test_chinese_and_queries(tmp_path):
    (case,) = read(tmp_path, CKNOWEDIT)
    assert asked(case) == [
        ("generalization", "rephrase", "摩城怎么读？", ("mó chéng",)),
        ("generalization", "rephrase", "请注音：摩城。", ("mó chéng",)),
        ("locality", "locality", "请给下面的字注音：新年", ("xīn nián",)),
        ("portability", "portability", "请给下面的字注音：新城", ("xīn chéng",)),
    ]
    older = {key: CKNOWEDIT[key] for key in ("prompt", "target_old", "target_new")}
    older |= {"portability_prompt": ["新城？"], "portability_answer": ["xīn chéng"], "locality_prompt": None}
    assert asked(*read(tmp_path, older)) == [("portability", "portability", "新城？", ("xīn chéng",))]
    assert asked(*read(tmp_path, FASTEDIT)) == [("generalization", "query", "Moorstadt's mayor:", ("Ada",))]
    (case,) = read(tmp_path, {"prompt": "Moorstadt has a mayor,", "subject": "Moorstadt", "target": "Ada"})
    assert (case.edit.prompt, case.probes) == ("{} has a mayor,", ())


def test_own_questions_examine_and_are_no_training_aids(tmp_path):
    (case,) = read(tmp_path, OWN | {"context": ["Ada Moor, born 1945, bakes."]})
    assert asked(case) == [
        ("generalization", "rephrase", "Ada Moor's year of birth is", ("1945",)),
        ("locality", "locality", "Ben Moor was born in", ("1950",)),
        ("portability", "portability", "Ada's tenth birthday was in", ("1955", "'55")),
    ]
    assert case.edit.rephrasings == () and case.edit.context == ("Ada Moor, born 1945, bakes.",)
    (edit,) = load_edits(tmp_path / "file.json")
    assert edit.rephrasings == ("{}'s year of birth is",)  # nobody is examined with them here
    with pytest.raises(InputError, match=r"unknown field 'lokality'\. Did you mean 'locality'"):
        read(tmp_path, {"prompt": "{Ada} is", "target_new": "b", "lokality": []})


def test_a_table_may_hold_questions_too(tmp_path):
    table = (
        "prompt;subject;target_new;ground_truth;locality_prompt;locality_ground_truth;rephrase_prompt\n"
        "Ada is a;Ada;baker;smith;Ben is a | Cy is a;smith | cook;Ada's trade is | Ada works as a\n"
        "Ben is a;Ben;cook;;;;\n"
    )
    cases = load_cases(path=write(tmp_path / "mine.csv", table))
    assert asked(cases[0]) == [
        ("generalization", "rephrase", "Ada's trade is", ("baker",)),
        ("generalization", "rephrase", "Ada works as a", ("baker",)),
        ("locality", "neighborhood", "Ben is a", ("smith",)),
        ("locality", "neighborhood", "Cy is a", ("cook",)),
    ]
    assert cases[1].probes == () and cases[1].edit.target_true is None


def test_the_form_is_that_of_the_fields_which_all_records_have_together(tmp_path):
    plain = {"prompt": "Ben is a", "target_new": "cook"}
    assert [case.edit.id for case in read(tmp_path, plain, EASYEDIT)] == ["easyedit/0", "easyedit/1"]
    assert [case.edit.id for case in read(tmp_path, plain, plain | {"id": "mine"})] == ["own/0", "mine"]


def test_a_file_of_no_known_form_names_its_fields_and_the_forms(tmp_path):
    path = write(tmp_path / "file.json", [{"question": "Who?", "reply": "Ada"}])
    with pytest.raises(InputError, match=r"got 'question', 'reply': rename them, or name the form.*mquake"):
        load_cases(path=path)
    with pytest.raises(InputError, match="expected a data set or a file; got neither"):
        load_cases()
    with pytest.raises(InputError, match="expected at least one edit"):
        load_edits(write(tmp_path / "empty.json", []))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("zsre", ("zsre", "zsre", None)),
        ("zsre:my/file.json", ("zsre", "zsre", "my/file.json")),
        ("my/file.jsonl", ("file", None, "my/file.jsonl")),
        ("facts.csv", ("facts", None, "facts.csv")),
        (r"C:\data\facts.csv", (r"\data\facts", None, r"C:\data\facts.csv")),
        ("hub:me/set:a/b.json", ("b", None, "hub:me/set:a/b.json")),
        ("zrse", ("zrse", "zrse", None)),
    ],
)
def test_what_bench_is_given_is_a_name_or_a_file(text, wanted):
    assert tuple(parse_address(text)) == wanted


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_or_refused_with_their_name(tmp_path, seed):
    """What the text of a JSON file may hold, and bytes: 150 of both in each seed."""
    chance, path = random.Random(seed), tmp_path / "file.json"
    forms = [COUNTERFACT, ZSRE, EASYEDIT, KNOWEDIT, FASTEDIT, CKNOWEDIT, MQUAKE, UNKE, OWN]
    refused: list[str] = []
    for _ in range(150):
        records = [chance.choice(forms)] * chance.choice((1, 2))
        whole = json.dumps(records, ensure_ascii=False).encode()
        content = altered(records, chance).encode() if chance.random() < 0.7 else flipped(whole, chance)
        path.write_bytes(content)
        for load in (lambda: load_cases(path=path, refused=refused), lambda: load_edits(path)):
            try:
                load()
            except InputError as error:
                refused.append(str(error))
    assert len(refused) > 50 and all(str(path) in sentence for sentence in refused)


# ---- several edits in one case


def test_mquake_s_edits_are_made_together(tmp_path):
    (case,) = read(tmp_path, MQUAKE)
    assert [edit.id for edit in case.edits] == ["mquake/12", "mquake/12.1"]
    assert asked(case) == [
        ("generalization", "question", "Who wrote Moorland?", ("Ada Moor",)),
        ("generalization", "question", "Where was Ada Moor born?", ("Lima",)),
        *(("portability", "multi_hop", text, ("Lima", "Ciudad de los Reyes")) for text in MQUAKE["questions"]),
        ("locality", "single_hop", "In which country is Lima?", ("Peru", "Perú")),
    ]
    assert [edit.text for edit in load_edits(tmp_path / "file.json")] == [
        "Moorland was written by",
        "Ada Moor was born in",
    ]
    again = MQUAKE | {"case_id": 13}
    assert len(load_edits(write(tmp_path / "twice.json", [MQUAKE, again]))) == 2


def two_edits(first: str = "Lima", second: str = "French", id: str | None = None) -> Case:
    also = Edit("The mother tongue of {} is", subject="Danielle", target_new=second, target_true="English")
    edit = Edit("The capital of {} is", subject="Peru", target_new=first, target_true="Paris", id=id)
    return Case(edit, (Probe("Danielle speaks", (second,), "generalization", "question"),), (also,))


def test_a_case_of_two_edits_is_made_by_one_patch_and_asks_for_both():
    lm, method = make_lm(), FT(layer=2, steps=60, learning_rate=0.1)
    results = evaluate(lm, [two_edits()], method)
    (row,) = results.rows.values()
    asked = [(one["kind"], one["prompt"], one["nll_true"] is not None) for one in row["readings"]]
    assert asked == [
        ("reliability", "The capital of Peru is", True),
        ("reliability", "The mother tongue of Danielle is", True),
        ("generalization", "Danielle speaks", False),  # the answer is that of the other edit
    ]
    assert results.cells["ft-m", "after_edit", "reliability@teacher_forced_exact"].mean == 1.0
    with lm.patched(method.edit(lm, list(two_edits().edits))):
        wanted = lm.score([edit.text for edit in two_edits().edits], ["Lima", "French"])
    assert [one["nll"] for one in row["readings"][:2]] == pytest.approx([score.nll for score in wanted], rel=1e-5)


def test_a_case_of_two_edits_fails_where_one_of_them_does():
    quick = ROME(layer=1, steps=3, context_groups=(), covariance_tokens=0)
    case = Case(two_edits().edit, (), (Edit("Apple lives in", target_new="Lima"),))
    for mode in ("single", "sequential"):
        results = evaluate(make_lm(), [two_edits(), case], quick, Plan(mode=mode))
        errors = {row["case"]: row["error"] for row in results.rows.values()}
        assert errors["0"] is None and errors["1"].startswith("rome edits at the subject's last token")
        assert [one["prompt"] for one in results.before["1",]["readings"]] == [
            "The capital of Peru is",
            "Apple lives in",
        ]


def test_an_edit_of_several_cases_is_made_once_in_a_batch_and_a_contradiction_left_out(tmp_path):
    cases = [
        two_edits(id="a"),
        two_edits(id="b"),
        two_edits(second="German", id="c"),
        two_edits(first="Rome", id="d"),
    ]
    assert [case.edit.id for case in drop_conflicting(cases)] == ["a", "b"]
    later = Case(Edit("Apple is", target_new="Zoë"), (), (Edit("{} is", subject="Zoë", target_new="Peru"),))
    assert drop_conflicting([two_edits(), two_edits("Rome"), later])[1:] == [later]
    results = bench(make_lm(), cases[:2], [FT(layer=2, steps=2)], tmp_path, plan=Plan("batch", fluency=False))
    costs = json.loads(next((tmp_path / "patches").rglob("*.json")).read_text("utf-8"))
    assert len(costs) == 2 and results.failed == {}


def test_cases_of_one_edit_have_the_digest_that_they_always_had():
    case = Case(Edit("The capital of {} is", subject="Peru", target_new="Lima"))
    assert cases_digest([case]) == "84540c241bc2edda"
    assert cases_digest([two_edits()]) != cases_digest([Case(two_edits().edit, two_edits().probes)])
