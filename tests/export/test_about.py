"""What an export says of itself: the card, the record, the checksums, and `reknow show`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import reknow
from conftest import make_lm, saved, some_patch
from reknow import LM, Edit
from reknow.cli import app
from reknow.export import card
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.patching.stack import save_stack

EXPORTS = {"hf": export_checkpoint, "lora": export_lora}
FIRST = Edit("The capital of {} is", subject="Peru", target_new="Lima|<b>\\", target_true="Cusco")


def edited(**changes):
    lm = make_lm("llama", **changes)
    lm.apply(replace(some_patch(lm, 1), edits=(FIRST, Edit("The sea is", target_new="deep"))))
    lm.apply(some_patch(lm, 2, layers=(1, 2)))
    return lm


def record(folder):
    return json.loads((folder / "reknow.json").read_text(encoding="utf-8"))


def show(*arguments):
    result = CliRunner().invoke(app, ["show", *map(str, arguments)])
    return result


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_says_what_was_changed_in_what(kind, tmp_path):
    lm = edited()
    EXPORTS[kind](lm, tmp_path / "out")
    found = record(tmp_path / "out")
    assert found["kind"] == kind and [patch["id"] for patch in found["patches"]] == [p.id for p in lm.patches]
    assert found["patches"][0]["edits"][0]["subject"] == "Peru" and found["patches"][0]["settings"]["layer"] == 1
    assert found["base"]["structure"] == lm.fingerprint.structure
    assert found["base"]["weights"] == lm.fingerprint.digest
    assert found["versions"]["reknow"] == reknow.__version__ and found["versions"]["torch"] == torch.__version__
    matrices = found["patches"][1]["matrices"]
    assert matrices[lm.parts.value[2]]["rank"] == 1 and matrices[lm.parts.value[2]]["norm"] > 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert found["files"].keys() == names - {"reknow.json"} and "README.md" in names
    for name, wanted in found["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == wanted


def test_the_numbers_are_those_of_the_models(tmp_path):
    lm = edited()
    export_lora(lm, tmp_path / "out")
    found = record(tmp_path / "out")["measured"]
    assert (found["edits"], found["asked"]) == (3, 3) and "written" not in found
    asked = [FIRST.text, "The sea is"], [FIRST.target_new, "deep"]
    for moment, scores in (("after", lm.score(*asked)), ("before", make_lm("llama").score(*asked))):
        for answer, score in zip(found[moment][:2], scores, strict=True):
            wanted = torch.tensor(-score.nll * len(score.correct)).exp()
            assert answer["probability"] == pytest.approx(float(wanted)) and answer["said"] == score.said
    assert found["held"] == sum(answer["said"] for answer in found["after"])


def test_what_was_lost_in_writing_is_measured_on_what_was_written(tmp_path):
    lm = make_lm("llama")
    lm.apply(some_patch(lm, rank=8, size=5.0))
    export_lora(lm, tmp_path / "cut", max_rank=1, truncate=True)
    found = record(tmp_path / "cut")["measured"]
    with lm.stacked([lm.patches[0].truncated(1)[0]]):
        (score,) = lm.score([lm.patches[0].edits[0].text], ["Lima"])
    (written,) = found["written"]
    assert written["said"] == score.said and written != found["after"][0]
    half = make_lm("llama")
    half.model.half().save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    lm = LM(tmp_path / "half")
    lm.apply(some_patch(lm, size=0.5))
    export_checkpoint(lm, tmp_path / "out")
    (written,), (after,) = (record(tmp_path / "out")["measured"][moment] for moment in ("written", "after"))
    (score,) = LM(tmp_path / "out").score([lm.patches[0].edits[0].text], ["Lima"])
    assert written["probability"] == pytest.approx(float(torch.tensor(-score.nll * len(score.correct)).exp()))
    assert written["probability"] != after["probability"]
    assert "| as written |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_is_one_of_the_hub(tmp_path):
    lm = edited()
    lm.name = "demo:gemma3"
    export_lora(lm, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data["base_model"] == "google/gemma-3-270m" and data["base_model_relation"] == "adapter"
    assert data["license"] == "gemma" and data["library_name"] == "peft"
    assert {"reknow", "knowledge-editing", "model-editing"} <= set(data["tags"])
    assert text.count("| The capital of Peru is | Lima\\|&lt;b>\\\\ | Cusco |") == 1
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in text
    assert "before quantisation" in text and "Teacher-forced" in text and "vllm serve google/gemma-3-270m" in text
    assert str(tmp_path) not in text


def test_a_card_names_what_the_base_is_and_its_licence(tmp_path):
    base = Path(saved(tmp_path / "base", "llama"))
    (base / "README.md").write_text("---\nlicense: mit\n---\n# a base\n")
    lm = LM(base)
    lm.apply(some_patch(lm))
    export_checkpoint(lm, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data["license"] == "mit" and "base_model" not in data  # the hub takes only what it has
    lm.name = "someone/base"
    export_checkpoint(lm, tmp_path / "out", overwrite=True)
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("someone/base", "finetune")


def test_a_card_shows_the_first_edits_and_says_how_many_more(tmp_path, monkeypatch):
    monkeypatch.setattr("reknow.export.measure.ASKED", 2)
    export_lora(edited(), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "has 1 more." in text and "the first 2 of 3 edits" in text and "3 edited facts" in text
    assert len(record(tmp_path / "out")["patches"][1]["edits"]) == 1


@pytest.mark.parametrize("kind", EXPORTS)
def test_show_reads_an_export_and_sees_what_changed(kind, tmp_path):
    base = saved(tmp_path / "base", "llama")
    lm = LM(base)
    patch = some_patch(lm)
    save_stack(tmp_path / "stack", base, [patch])
    done = CliRunner().invoke(app, ["export", str(tmp_path / "stack"), str(tmp_path / "out"), "--to", kind])
    assert done.exit_code == 0, done.output
    said = show(tmp_path / "out")
    assert said.exit_code == 0 and patch.id in said.output and "The capital of Land 0 is → Lima" in said.output
    assert base in said.output and "as they were written" in said.output and not said.stderr
    found = json.loads(show(tmp_path / "out", "--json").stdout)
    assert found["changed"] == [] and found["patches"][0]["id"] == patch.id
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "out" / "new").write_text("mine")
    said = show(tmp_path / "out")
    assert "not all as they were written" in said.stdout and said.stderr.count("is not what was written there") == 2


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"format": 2}, "upgrade reknow"),
        ({"base": {}}, "cannot be read (field base.name: Field required): export it"),
        ({"patches": 3}, "export it again"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(broken, words, tmp_path):
    export_lora(edited(), tmp_path / "out")
    (tmp_path / "out" / "reknow.json").write_text(json.dumps(record(tmp_path / "out") | broken))
    said = show(tmp_path / "out")
    assert said.exit_code == 2 and words in said.stderr and said.stderr.count("\n") == 1


def test_every_kind_has_its_words():
    from reknow.export.about import KINDS

    assert card._LIBRARIES.keys() >= KINDS.keys() >= EXPORTS.keys()
