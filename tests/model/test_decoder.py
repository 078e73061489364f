"""Tokens for which the model's embedding has no row."""

from __future__ import annotations

import pytest
import torch

from conftest import some_patch
from families import tiny_model, tiny_tokenizer
from reknow import LM, ROME, Edit
from reknow.errors import ModelError
from reknow.model.tokens import EncodedText

EDIT = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")


def grown(family: str = "llama", **special) -> LM:
    """A model whose tokenizer got tokens that its embedding does not have."""
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.add_special_tokens(special)
    return LM((tiny_model(family), tokenizer))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_takes_an_id_that_the_embedding_has(family):
    lm, plain = grown(family, pad_token="[PAD]"), LM((tiny_model(family), tiny_tokenizer(bos=True)))
    assert lm.tokenizer.pad_token_id == len(lm.model.get_input_embeddings().weight)
    prompts = ["The capital of Peru is", "Paris"]
    assert lm.generate(prompts, 5) == plain.generate(prompts, 5)
    assert lm.score(prompts, ["Lima", "France"]) == plain.score(prompts, ["Lima", "France"])
    made, same = ROME(layer=0, steps=2).edit(lm, [EDIT]), ROME(layer=0, steps=2).edit(plain, [EDIT])
    assert all(torch.equal(made.deltas[name].dense(), same.deltas[name].dense()) for name in made.deltas)


@pytest.mark.parametrize(
    ("special", "text"),
    [
        ({"additional_special_tokens": ["<thing>"]}, "The <thing> is"),  # in a prompt
        ({"bos_token": "<begin>"}, ""),  # the token that an empty prompt is
        ({"additional_special_tokens": ["<thing>"]}, "<thing>"),
    ],
)
def test_a_token_without_a_row_is_refused_before_the_model_runs(special, text):
    lm = grown(**special)
    if "bos_token" in special:
        lm.tokenizer.backend_tokenizer.post_processor = tiny_tokenizer().backend_tokenizer.post_processor
    for ask in (lambda: lm.generate(text, 3), lambda: lm.score([text + "x"], ["<begin><thing>"])):
        with pytest.raises(ModelError, match=r"below 320, .* got 320, the token '<.*resize_token_embeddings"):
            ask()
    with pytest.raises(ModelError, match="below 320"):
        lm.pad([EncodedText((3, 320), 2)])
    with pytest.raises(ModelError, match="below 320"):
        ROME(layer=0).edit(lm, [Edit("{} is", subject="The <thing> or <begin>", target_new="English")])


def test_a_head_larger_than_the_embedding_writes_only_what_can_be_read_on():
    model = tiny_model("llama", tie_word_embeddings=False)
    small = model.lm_head.weight
    model.lm_head = torch.nn.Linear(32, 330, bias=False)
    with torch.no_grad():
        model.lm_head.weight[:320] = small
        model.lm_head.weight[320:] = 50 * small[:10]
    lm, plain = LM((model, tiny_tokenizer())), LM((tiny_model("llama", tie_word_embeddings=False), tiny_tokenizer()))
    assert lm.generate(["The capital of", "Paris"], 6) == plain.generate(["The capital of", "Paris"], 6)
    assert len(lm.generate("Paris", 6, top_k=5)) > 0


def test_a_wrecked_model_is_silent_with_an_end_that_the_embedding_lacks():
    lm = grown(eos_token="<end>")
    lm.model.generation_config.eos_token_id = None
    with lm.patched(some_patch(lm, size=1e30)):
        assert lm.generate(["The capital of", "Paris"], 4) == ["", ""]
