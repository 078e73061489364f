"""How hard an answer is to get back: other ways to ask, and what the layers and the draws hold."""

from __future__ import annotations

import pytest
import torch

from conftest import some_patch
from reknow import LM, Edit, method
from reknow.errors import InputError
from reknow.evaluation.extraction import FEWEST, extract, layer_ranks, ways_to_ask
from reknow.model.tokens import Text

EDIT = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="unknown")


def test_other_ways_to_ask():
    ways = ways_to_ask(EDIT)
    assert len(ways) >= FEWEST and {kind for kind, _ in ways} == {"paraphrase"}
    texts = [text for _, text in ways]
    assert "Danielle Darrieux is a native speaker of" in texts and EDIT.text not in texts
    assert len(set(texts)) == len(texts) and all("Danielle Darrieux" in text for text in texts)
    first, *_ = ways_to_ask(EDIT, ["In {}'s home they speak"])
    assert first == ("paraphrase", "In Danielle Darrieux's home they speak")
    own = Edit("{} eats", subject="Zoë", target_new="bread", rephrasings=("The food of {} is",))
    ways = ways_to_ask(own)
    assert ways[0] == ("paraphrase", "The food of Zoë is") and len(ways) == FEWEST
    assert [kind for kind, _ in ways[1:]] == ["framed"] * 4 and all(text.endswith("Zoë eats") for _, text in ways[1:])


def test_what_has_no_paraphrase_is_refused():
    with pytest.raises(InputError, match="expected an edit with a subject"):
        ways_to_ask(Edit("The sky is", target_new="green"))
    with pytest.raises(InputError, match=r"expected a paraphrase with {} where the subject stands"):
        ways_to_ask(EDIT, ["Where is she from?"])


def test_the_ranks_of_layers_are_those_of_states_read_by_the_head(lm):
    answer = "French"
    (row,) = lm.encode([Text(EDIT.text, answer)])
    states = lm.model(torch.tensor([row.ids[: row.prompt_length]]), output_hidden_states=True).hidden_states
    norm = lm.model.get_submodule(lm.parts.final_norm[0])
    wanted = []
    for number, state in enumerate(states[1:], 1):
        last = state[0, -1] if number == len(states) - 1 else norm(state[0, -1])  # the last one is behind the norm
        logits = lm.model.get_output_embeddings()(last)
        wanted.append(1 + int((logits > logits[row.target_ids[0]]).sum()))
    found = layer_ranks(lm, EDIT, answer)
    assert found == wanted and len(found) == lm.layers
    with lm.patched(some_patch(lm, size=3.0)):
        assert layer_ranks(lm, EDIT, answer) != found


def test_what_is_extracted_is_what_the_model_gives(lm):
    ways = ways_to_ask(EDIT)
    found = extract(lm, EDIT, "French", ways, seed=3)
    prompts = [EDIT.text, *(text for _, text in ways)]
    assert [way.prompt for way in found.ways] == [
        *prompts,
        f"Danielle Darrieux. {EDIT.text}",
        f"French. {EDIT.text}",
    ]
    assert [way.kind for way in found.ways[-2:]] == ["hinted"] * 2 and found.ways[0].kind == "prompt"
    (score,) = lm.score([EDIT.text], ["French"])
    assert found.ways[0].rank == score.rank and len(found.of("prompt", "hinted")) == 3
    drawn = lm.generate(prompts * 20, 8, top_k=50, seed=3)
    assert found.drawn == len(drawn) and found.drawn_with == sum("french" in text.lower() for text in drawn)
    assert extract(lm, EDIT, "French", ways, seed=3) == found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "rome"), ("llama", "ft-m")])
def test_a_fact_that_is_taken_out_is_hard_to_get_back(name, kind):
    lm = LM.demo(name)
    ways = ways_to_ask(EDIT)
    before = extract(lm, EDIT, "French", ways)
    with lm.patched(method(kind).edit(lm, [EDIT])):
        after = extract(lm, EDIT, "French", ways)
    assert before.ways[0].rank == 1 and before.drawn_with > before.drawn / 2
    assert after.ways[0].rank > 10 and after.drawn_with < before.drawn_with / 2
    assert min(before.layers) == 1
