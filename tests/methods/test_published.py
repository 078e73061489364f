"""What papers set, in one call: every table makes a method, models are recognised, what there is not is refused."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from conftest import make_lm, without_weights
from reknow import (
    FT,
    ICE,
    IKE,
    KN,
    LM,
    MEMIT,
    MEND,
    METHODS,
    ROME,
    SERAC,
    AlphaEdit,
    Case,
    Edit,
    LoRA,
    evaluate,
    method,
)
from reknow.contract import check_edits
from reknow.errors import EditRefused, InputError
from reknow.evaluation import bench
from reknow.evaluation.cost import estimate
from reknow.learning.training import Training
from reknow.published import _contents, _tables, holds_for_any, published, published_models, published_sources

ROWS = [row for row in METHODS if _tables(row)]
CASES = [(row, model, None) for row in ROWS for model in published_models(row) or [None]]
CASES += [(row, model, by) for row, model, _ in CASES for by in published_sources(row, model)]


def test_rows_have_settings_or_say_that_there_are_none_and_every_table_belongs_to_a_row():
    assert len(ROWS) >= 31
    for row in set(METHODS) - set(ROWS):
        with pytest.raises(InputError, match=f"a method with published settings; got {row},"):
            published(row, "gpt2-xl")
    assert set(_contents()) - {"models", "other_names", "search"} <= set(METHODS)
    assert len(CASES) > 160


@pytest.mark.parametrize(("row", "model", "by"), CASES)
def test_every_table_makes_a_method_and_has_a_source(row, model, by):
    found = published(row, model, by)
    assert set(found.settings) <= {field.name for field in fields(METHODS[row].method)}  # no former names
    assert method(row, **found.settings).name == row
    assert found.source and "{" not in found.source
    Training(**found.training)
    if model and by is None:
        assert method(f"{row}-paper:{model}").resolve(None) == method(row, **found.settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("row", "model", "by"), CASES)
def test_no_note_is_about_a_setting_that_went_over_its_own(row, model, by):
    tables = [t for t in _tables(row) if model in t.get("models", [model]) and t.get("by") in (None, by)]
    known = {field.name for field in fields(METHODS[row].method)}
    for topic in known & {topic for table in tables for topic in table.get("note", {})}:
        noted = max(i for i, table in enumerate(tables) if topic in table.get("note", {}))
        assert not [table for table in tables[noted + 1 :] if topic in table], topic


@pytest.mark.parametrize("model", published_models("simie"))
def test_simie_wraps_rome_as_the_same_repository_has_it(model):
    base = method("simie", **published("simie", model).settings).at_work(make_lm())
    assert base == ROME.paper(model, source="easyedit")


def test_the_page_names_the_methods_for_which_nothing_is_published():
    page = (Path(__file__).parents[2] / "docs" / "published.md").read_text(encoding="utf-8")
    named = re.search(r"for every method but (.+?):", page, re.DOTALL)
    assert named and set(re.findall(r"`(.+?)`", named[1])) == {row for row in METHODS if not settings_of(row)}
    table = dict(re.findall(r"^\| `(\S+)` \| (.*) \|$", page, re.MULTILINE))
    for row in filter(settings_of, METHODS):
        assert set(published_models(row)) == set(re.findall(r"`(.+?)`", table[row])) - {"any"}, row


def settings_of(row: str) -> bool:
    """Whether something is published for it; tables that only say what is absent do not count."""
    return bool(published_models(row)) or holds_for_any(row)


def test_notes_speak_of_the_model():
    llama, xl = (" ".join(published("rome", name).notes) for name in ("llama-2-7b", "gpt2-xl"))
    assert "3 and 8 are new" in llama and "4 and 9" not in llama
    assert "C is the identity" in llama and "100,000 articles" not in llama
    assert "4 and 9 are new" in xl and "100,000 articles" in xl
    assert "BERT" not in " ".join(published("kn", "gpt2-xl").notes)


def test_rome_is_the_authors():
    rome = ROME.paper("gpt2-xl")
    assert (rome.layer, rome.learning_rate, rome.weight_decay, rome.clamp, rome.steps) == (17, 0.5, 0.5, 4.0, 20)
    assert (rome.units, rome.stop_probability, rome.min_delta, rome.context_batches) == ("absolute", 1.0, 0.0, 1)
    assert rome.context_groups == ((10, 4), (10, 9)) and rome.context_first_words == ()
    assert ROME.paper("gpt2-medium").clamp == 3.0
    assert published("rome", "gpt2-xl").source.startswith("kmeng01/rome 0874014: hparams/ROME/gpt2-xl.json")


def test_settings_given_go_over_the_papers():
    assert ROME.paper("gpt2-xl", layer=3, steps=2) == method(
        "rome", **published("rome", "gpt2-xl").settings | dict(layer=3, steps=2)
    )


def test_a_setting_in_the_models_units_replaces_the_papers_plain_number():
    """Which would be read in its place."""
    assert MEMIT.paper("gpt2-xl").covariance_weight == 20000 and MEMIT.paper("gpt2-xl", layers=(3,)).covariance_weight
    mine = MEMIT.paper("gpt2-xl", regularization=0.3)
    assert mine.covariance_weight is None and mine.regularization == 0.3
    both = MEMIT.paper("gpt2-xl", regularization=0.3, covariance_weight=7)
    assert both.covariance_weight == 7
    named = method("alphaedit-paper:gpt2-xl", null_share=0.2).resolve(make_lm())
    assert named.null_threshold is None and named.null_share == 0.2 and named.l2 == AlphaEdit.paper("gpt2-xl").l2


def test_the_settings_say_which_row_of_a_class_is_meant():
    assert ROME.paper("gpt2-xl", average_keys=True).name == "r-rome"
    assert "rebuilding-rome" in published("r-rome", "gpt2-xl").source
    assert FT.paper("gpt2-xl", loss="last_token").name == "ft-l"
    assert FT.paper("gpt2-xl").batch_size == 3  # ft-m


def test_none_takes_a_default_away():
    assert method("ft-l").clamp == 0.03
    assert FT.paper("llama-2-7b", loss="last_token").clamp is None


def test_another_source_may_be_asked_for():
    assert ROME.paper("gpt2-xl").covariance_tokens is None
    assert ROME.paper("gpt2-xl", source="EasyEdit").covariance_tokens == 0
    assert ROME.paper("gpt2-xl", source="zjunlp/EasyEdit").covariance_tokens == 0
    assert ROME.paper("gpt2-xl", source="kmeng01") == ROME.paper("gpt2-xl")
    assert ROME.paper("llama-3-8b", source="alphaedit") == ROME.paper("llama-3-8b")
    assert published("rome", "llama-3-8b", "alphaedit").source.startswith("AlphaEdit's baseline")
    assert published("rome", "llama-3-8b").source.startswith("zjunlp/EasyEdit")
    assert ROME.paper("llama-2-7b", source="EasyEdit") == ROME.paper("llama-2-7b")  # there is no other
    assert FT.paper("llama-2-7b", source="ice").layer == (4, 5, 6, 7, 8)
    with pytest.raises(InputError, match=r"expected a source .* got easyedit: there are MEMIT's baseline"):
        ROME.paper("gpt-neox-20b", source="easyedit")


def test_the_same_for_all_models_needs_none():
    assert KN.paper().normalize and KN.paper("bert-base").new_weight == 8
    assert not KN.paper("gpt2-xl").normalize
    assert IKE.paper(make_lm()).demonstrations == 32
    assert MEND.paper().locality_tokens == "all"
    for call in (ROME.paper, SERAC.paper):
        with pytest.raises(InputError, match=r"are published, which are .*gpt2-xl.*; got none: name one"):
            call()


SIZES = [
    ("gpt2-xl", "gpt2", dict(n_layer=48, n_embd=1600, n_head=25)),
    ("gpt-j-6b", "gptj", dict()),
    ("gpt-neox-20b", "gpt_neox", dict()),
    ("llama-2-7b", "llama", dict()),
    ("llama-3-8b", "llama", dict(intermediate_size=14336, max_position_embeddings=8192)),
    ("mistral-7b", "mistral", dict()),
    ("qwen2.5-7b", "qwen2", dict(hidden_size=3584, num_hidden_layers=28, intermediate_size=18944)),
]


@pytest.mark.parametrize(("name", "kind", "sizes"), SIZES)
def test_a_model_is_recognised_by_its_sizes(name, kind, sizes):
    assert published("rome", without_weights(kind, **sizes)).model == name


def test_models_of_one_size_are_told_apart():
    lm = without_weights("llama", intermediate_size=14336, max_position_embeddings=131072)
    assert published("alphaedit", lm).model == "llama-3.1-8b"
    with pytest.raises(InputError, match=r"got no weights \(no file names it; its sizes are those of llama-3-8b\)"):
        ROME.paper(lm)


def test_models_of_the_same_sizes_have_the_same_settings():
    """Qwen 2 and 2.5 cannot be told apart, so it must not matter."""
    for row in ROWS:
        if {"qwen2-7b", "qwen2.5-7b"} <= set(published_models(row)):
            assert published(row, "qwen2-7b").settings == published(row, "qwen2.5-7b").settings


@pytest.mark.parametrize("name", ["openai-community/gpt2-xl", "GPT2-XL", "gpt2-xl"])
def test_names_are_read_without_owner_and_case(name):
    assert published("memit", name).model == "gpt2-xl"


def test_what_there_is_not_is_refused():
    with pytest.raises(InputError, match=r"which are gpt2-xl, gpt-j-6b.*; got demo: name one of them"):
        MEMIT.paper("demo")
    with pytest.raises(InputError, match=r"got lora, model qwen2.5-7b \(EasyEdit's"):
        LoRA.paper("qwen2.5-7b")
    with pytest.raises(InputError, match=r"unknown setting of ROME 'layr'. Did you mean 'layer'"):
        ROME.paper("gpt2-xl", layr=3)
    with pytest.raises(InputError, match=r"expected model as"):
        ROME.paper(3)  # type: ignore[arg-type]


def test_the_article_of_ice_or_its_script():
    assert ICE.paper("gpt2-xl").variant == "code"
    assert ICE.paper("gpt2-xl", variant="paper").temperature == 100.0


def test_an_lm_of_no_paper_is_named():
    lm: LM = make_lm()
    with pytest.raises(InputError, match=r"settings of rome are published"):
        ROME.paper(lm)


@pytest.fixture
def small(monkeypatch):
    """A tiny model of sizes for which settings are published."""
    lm = make_lm("gpt2")
    settings = {"layer": 1, "steps": 3, "covariance_tokens": 0, "context_groups": [[1, 2]]}
    sizes = ["gpt2", lm.layers, lm.parts.hidden_size, lm.weight(lm.parts.value[0]).shape[1]]
    table = {"models": ["tiny"], "source": "a test", **settings}
    contents = {"models": {"tiny": {"sizes": sizes}}, "other_names": {}, "rome": [table]}
    monkeypatch.setattr("reknow.published._contents", lambda: contents)
    return lm


def test_a_row_with_paper_behind_its_name_takes_the_settings_of_the_model_that_is_edited(small, edit):
    row = method("rome-paper", seed=3)
    assert row.name == "rome-paper"
    patch = row.edit(small, [edit])
    assert (patch.method, patch.settings["layer"], patch.settings["steps"], patch.settings["seed"]) == (
        "rome",
        1,
        3,
        3,
    )
    assert patch.settings == ROME.paper(small, seed=3).edit(small, [edit]).settings
    assert method("rome-paper:tiny", seed=3).resolve(small) == row.resolve(small)
    assert estimate(small, row, [edit]).layers == (1,)


def test_what_a_row_needs_is_refused_before_its_model_is_there():
    with pytest.raises(EditRefused, match="subject"):
        check_edits(method("rome-paper"), Edit("Peru is", target_new="Lima"))
    with pytest.raises(InputError, match="unknown setting of memit-paper 'layer'"):
        method("memit-paper", layer=3)
    with pytest.raises(InputError, match=r"unknown method 'romee-paper'. Did you mean 'rome'"):
        method("romee-paper")


def test_a_run_records_the_settings_and_keeps_the_name(small, edit, tmp_path):
    cases = [Case(edit)]
    results = bench(small, cases, [method("rome-paper")], tmp_path / "run")
    (about,) = results.manifest["settings"]["methods"].items()
    assert about == ("rome-paper", json.loads(json.dumps({"name": "rome", **asdict(ROME.paper(small))})))
    assert {label for label, *_ in evaluate(small, cases, method("rome-paper")).rows} == {"rome-paper"}
    with pytest.raises(InputError, match="settings of rome are published, which are tiny; got"):
        evaluate(make_lm("llama"), cases, method("rome-paper"))


def test_the_page_lists_what_there_is():
    page = (Path(__file__).parents[2] / "docs" / "published.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w-]+)` \|(.*)$", page, re.MULTILINE))
    assert list(listed) == ROWS
    for row, cells in listed.items():
        assert set(re.findall(r"`([\w.-]+)`", cells)) == set(published_models(row)), row
        assert ("any" in cells) == holds_for_any(row), row


def test_the_page_says_which_models_methods_can_be_compared_on():
    page = (Path(__file__).parents[2] / "docs" / "published.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| model \| (.*) \|$", page, re.MULTILINE)[1].split(" | ")
    lines = re.findall(r"^\| ([\w.-]+) \| ((?:yes|–).*) \|$", page, re.MULTILINE)
    assert len(lines) > 5
    for model, cells in lines:
        there = [row for row, cell in zip(rows, cells.split(" | "), strict=True) if cell == "yes"]
        assert there == [row for row in rows if holds_for_any(row) or model in published_models(row)], model
