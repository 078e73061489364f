"""KE: how often its change is added."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_lm
from learned import trained
from reknow import KE, Edit
from reknow.errors import InputError
from reknow.learning.gradients import repeated_deltas
from reknow.model.tokens import Text

PROMPT = "I know Danielle Beats"


def greedy(lm, prompt: str) -> str:
    return lm.likeliest([prompt], 1)[0][0][0]


def test_a_change_is_added_until_the_model_says_the_answer():
    """Along one direction that makes an answer likelier, the first multiple that flips it is taken, or the last."""
    lm = make_lm("gpt2")
    row, name = lm.encode([Text(PROMPT, "of")])[0], lm.parts.value[-1]
    weight, states = lm.weight(name), []
    module = lm.model.get_submodule(name)
    handle = module.register_forward_hook(lambda _m, args, _o: states.append(args[0][0, row.prompt_length - 1]))
    with torch.no_grad():
        assert greedy(lm, PROMPT).strip() != "of"
    handle.remove()
    key = states[0].detach().float()
    raised = lm.model.get_output_embeddings().weight[row.ids[-1]].detach().float()
    sizes, times = torch.linspace(0.05, 40, 60), {}
    for size in sizes.tolist():
        left, right = size * raised[None] / raised.norm(), key[None] / key.square().sum()
        delta = repeated_deltas(lm, [row], {name: (left, right)}, 5)[name].dense()
        assert delta.shape == weight.shape
        times[size] = round(float(delta.norm() / (left.T @ right).norm()))
    assert sorted(times.values(), reverse=True) == [*times.values()], "a larger step needs no more of them"
    assert {1, 5} < set(times.values())
    once = repeated_deltas(lm, [row], {name: (left, right)}, 1)[name].dense()
    assert torch.allclose(once.float(), left.T @ right)


def test_repeats_are_set_for_editing_and_not_by_the_editor():
    lm, method = make_lm("gpt2"), trained("ke", "gpt2")
    edit = Edit("I know {}", subject="Zoë Übel Peru", target_new="French")
    once = method.edit(lm, [edit])
    often = replace(method, max_repeats=5).edit(lm, [edit])
    shares = {name: often.deltas[name].dense().norm() / once.deltas[name].dense().norm() for name in once.deltas}
    (times,) = {round(float(share), 2) for share in shares.values()}
    assert times in (1, 2, 3, 4, 5)
    with lm.patched(often):
        said = lm.generate([edit.text], max_new_tokens=6)[0].strip().startswith("French")
    assert said or times == 5


def test_repeats_of_nothing_are_refused():
    with pytest.raises(InputError, match="max_repeats"):
        KE(max_repeats=0)


def test_the_papers_settings_have_its_loop():
    assert (KE.paper().max_repeats, KE.paper().margin, KE().max_repeats) == (5, 1e-3, 1)
