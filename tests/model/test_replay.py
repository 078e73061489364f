"""Replaying blocks gives what a full pass gives: logits, gradients, keys and values."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conftest import close, make_lm
from families import CORE_FAMILIES, FAMILIES, slow_but, tiny_model, tiny_tokenizer
from reknow import LM, ROME, Edit
from reknow.model import packing
from reknow.model.head import apply_head
from reknow.model.hooks import added_at, by_row, output_edited, recorded, weight_replaced
from reknow.model.replay import BlockReplay
from reknow.model.tokens import Batch, EncodedText, Text, pad

TALL = {
    "gemma2, caps": ("gemma2", dict(final_logit_softcapping=0.5, attn_logit_softcapping=1.0)),
    "opt-350m": ("opt", dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "falcon, ALiBi": ("falcon", dict(alibi=True)),
    "llama, eager": ("llama", dict(attn_implementation="eager")),
    "mistral, window of 3": ("mistral", dict(sliding_window=3)),
    "gemma3, window of 3": ("gemma3_text", dict(sliding_window=3)),
}
ALL = {family: (family, {}) for family in FAMILIES} | TALL

LENGTHS = (14, 6, 9)


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(name: str):
        if name not in made:
            family, changes = ALL[name]
            made[name] = make_lm(family, **changes)
        return made[name]

    return get


def batch_of(lm, anchors) -> tuple[Batch, Tensor, Tensor]:
    """Random rows lined up at `anchors`, and the (rows, columns) of everything from there on."""
    generator = torch.Generator().manual_seed(1)
    rows = [EncodedText(tuple(torch.randint(2, 320, (n,), generator=generator).tolist()), n) for n in LENGTHS]
    batch = pad(rows, 1, anchors=anchors)
    scored = batch.mask.bool()
    scored[:, : max(anchors)] = False
    return batch, *scored.nonzero(as_tuple=True)


ANCHORS = {"no prefix": (0, 0, 0), "equal prefixes": (3, 3, 3), "mixed padding": (9, 2, 4), "last token": (13, 5, 8)}


@pytest.mark.parametrize("where", ANCHORS)
@pytest.mark.parametrize("name", slow_but((*CORE_FAMILIES, "gemma2", "olmoe"), ALL))
def test_a_replay_is_the_full_pass(built, name, where):
    """Logits of every later token and the gradient of δ, at every layer, against a hook in a whole pass."""
    lm, anchors = built(name), ANCHORS[where]
    batch, rows, columns = batch_of(lm, anchors)
    column = max(anchors)
    start = torch.randn(3, lm.parts.hidden_size, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(len(rows), 320, generator=torch.Generator().manual_seed(3))
    for layer in range(lm.layers):
        replay = BlockReplay(lm, batch, layer, column)
        ours, theirs = (start.clone().requires_grad_() for _ in range(2))
        matrix = lm.parts.value[layer]
        with (
            output_edited(lm.model.get_submodule(matrix), added_at(theirs, column)),
            recorded(lm.model, [matrix], [matrix]) as (keys, values),
        ):
            wanted = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[rows, columns]
        for _ in range(2):  # a replay leaves its cache as it was
            found = replay(ours, rows, columns)
            assert close(found, wanted)
        (found * weights).sum().backward()
        (wanted * weights).sum().backward()
        assert close(ours.grad, theirs.grad, 1e-3)
        assert bool(ours.grad.abs().sum(1).gt(0).all())
        assert close(replay.key, keys[matrix].view(3, -1, replay.key.shape[1])[:, column])
        plain = values[matrix].view(3, -1, replay.value.shape[1])[:, column] - start
        module = lm.model.get_submodule(matrix)
        assert close(replay.value, module(replay.key)), "not what the block made of it in place"
        assert close(replay.value, plain)


@pytest.mark.parametrize("name", ALL)
def test_some_rows_are_replayed_as_among_all(built, name, monkeypatch):
    lm = built(name)
    assert lm.parts.row_selectable == (name not in ("bloom", "mpt")), "their biases have an entry per head"
    batch, rows, columns = batch_of(lm, (9, 2, 4))
    delta = torch.randn(3, lm.parts.hidden_size, generator=torch.Generator().manual_seed(2))
    replay = BlockReplay(lm, batch, 1, 9)
    wanted = replay(delta, rows, columns)
    if lm.parts.row_selectable:
        monkeypatch.setattr(lm, "forward", None)  # nothing is run
    kept, mine = torch.tensor([2, 0]), rows != 1
    selected = replay.select(kept)
    assert close(selected(delta[kept], (rows[mine] == 0).long(), columns[mine]), wanted[mine])
    assert close(selected.keys, replay.keys[kept]) and close(selected.block, replay.block[kept])


WANT_RECTANGLES = {"gptj", "gpt_neo", "bloom", "falcon", "mpt", "gemma2", "gpt_oss"}
"""Families with attention of their own, or with transformers' plain one."""
WANT_RECTANGLES |= {"gemma2, caps", "falcon, ALiBi", "llama, eager"}


@pytest.mark.parametrize("at_attention", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_padding_is_left_out_where_attention_can_be_told(built, name, at_attention):
    """Blocks are given real tokens alone, with an addition at attention's output too, and the rest is as before."""
    lm = built(name)
    assert lm.parts.packable == (name not in WANT_RECTANGLES)
    batch, rows, columns = batch_of(lm, (9, 5, 4))
    value, attention = torch.randn(2, 3, lm.parts.hidden_size, generator=torch.Generator().manual_seed(2))
    own = lm.model.config._attn_implementation
    with ExitStack() as stack:
        for part, addition in ((lm.parts.value, value), (lm.parts.attention_out, attention))[: 1 + at_attention]:
            stack.enter_context(output_edited(lm.model.get_submodule(part[1]), added_at(addition, 9)))
        wanted = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[rows, columns]
    replay = BlockReplay(lm, batch, 1, 9)
    with recorded(lm.model, [lm.parts.blocks[2]]) as (seen, _):
        found = replay(value, rows, columns, attention=attention if at_attention else None)
    assert close(found, wanted)
    assert seen[lm.parts.blocks[2]].shape[:2] == ((1, 11) if lm.parts.packable else (3, 5 if replay._start else 14))
    assert lm.model.config._attn_implementation == own


def test_attention_of_short_rows_is_torchs_own(built, monkeypatch):
    """Four heads share two of keys and values here; the mask is the one of rows padded on both sides."""
    lm = built("llama")
    batch, rows, columns = batch_of(lm, (9, 5, 4))
    found = []
    for most in (0, 64):
        monkeypatch.setattr(packing, "_SHORT", most)
        delta = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        logits = BlockReplay(lm, batch, 1, 9)(delta, rows, columns)
        logits.square().sum().backward()
        found.append((logits.detach(), delta.grad))
    assert close(found[0][0], found[1][0]) and close(found[0][1], found[1][1], 1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama", "bloom"])
def test_without_replay_the_full_pass_gives_the_same(built, name, monkeypatch):
    lm = built(name)
    batch, rows, columns = batch_of(lm, (9, 2, 4))
    delta = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    fast = BlockReplay(lm, batch, 1, 9)
    logits, again = fast(delta, rows, columns), fast.rerun(rows, columns)
    monkeypatch.setattr(lm, "parts", replace(lm.parts, replayable=False))
    slow = BlockReplay(lm, batch, 1, 9)
    assert close(slow(delta, rows, columns), logits)
    assert close(slow.rerun(rows, columns), again)
    assert close(slow.key, fast.key) and close(slow.value, fast.value)


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama", "bloom", "opt"])
def test_a_replay_tells_what_the_blocks_above_put_out(built, name, replayed, monkeypatch):
    """In the column of the addition, the last block's whole output too, padded or packed."""
    lm = built(name)
    batch, rows, columns = batch_of(lm, (9, 5, 4))
    delta = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    names = {layer: lm.parts.blocks[layer] for layer in (1, 2)}
    with (
        output_edited(lm.model.get_submodule(lm.parts.value[0]), added_at(delta, 9)),
        recorded(lm.model, outputs=names.values()) as (_, wanted),
    ):
        logits = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[rows, columns]
    if not replayed:
        monkeypatch.setattr(lm, "parts", replace(lm.parts, replayable=False))
    seen = dict.fromkeys(names, delta)
    assert close(BlockReplay(lm, batch, 0, 9)(delta, rows, columns, seen=seen), logits)
    for layer, name_of in names.items():
        assert close(seen[layer], by_row(wanted[name_of], 3)[:, 9])


def test_blocks_that_cannot_be_replayed_are_found_out():
    """A block that reads what another module left behind runs inside a pass only; methods then run full passes."""
    model = tiny_model("llama")
    inside: list[bool] = []
    for block in model.model.layers:
        block.forward = lambda *args, own=block.forward, **kwargs: own(*args, **kwargs) if inside else inside[0]
    model.model.register_forward_pre_hook(lambda *_: inside.append(True))
    model.model.register_forward_hook(lambda *_: inside.clear())
    lm, free = LM((model, tiny_tokenizer())), LM((tiny_model("llama"), tiny_tokenizer()))
    assert free.parts.replayable and not lm.parts.replayable
    edit = Edit("I know {}", subject="Danielle Darrieux", target_new="English")
    method = ROME(layer=1, steps=5, context_groups=((2, 4),), covariance_tokens=0)
    slow, fast = (method.edit(either, [edit]).deltas[lm.parts.value[1]].dense() for either in (lm, free))
    assert torch.allclose(slow, fast, atol=1e-3 * float(fast.abs().max()))


def test_a_replay_keeps_nothing_of_the_blocks_it_skips(built):
    """What is kept per block are its arguments, not the hidden states of every layer."""
    lm = built("llama")
    batch, *_ = batch_of(lm, (9, 2, 4))
    replay = BlockReplay(lm, batch, 0, 9)
    kept = [a for args, kwargs in replay._calls for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    assert not [a for a in kept if a.shape[-1] == lm.parts.hidden_size and a.is_floating_point() and a.dim() == 3]


@pytest.mark.parametrize("name", ALL)
def test_rerun_sees_the_weights_as_they_are_now(built, name):
    lm = built(name)
    batch, rows, columns = batch_of(lm, (9, 2, 4))
    layer = lm.layers - 2
    matrix = lm.parts.value[layer]
    replay = BlockReplay(lm, batch, layer, 0)
    before = replay.rerun(rows, columns)
    generator = torch.Generator().manual_seed(5)
    weight = (lm.weight(matrix) + 0.3 * torch.randn(lm.weight(matrix).shape, generator=generator)).requires_grad_()
    with weight_replaced(lm.model.get_submodule(matrix), weight):
        found = replay.rerun(rows, columns)
        wanted = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[rows, columns]
    assert close(found, wanted)
    assert not torch.allclose(found, before, atol=1e-2)
    (grad,) = torch.autograd.grad(found.square().sum(), weight)
    (full,) = torch.autograd.grad(wanted.square().sum(), weight)
    assert torch.allclose(grad, full, atol=1e-2, rtol=1e-3)
    assert torch.equal(replay.rerun(rows, columns), before), "its own weight is back"


def conv(bias: bool) -> nn.Module:
    module = Conv1D(5, 3)
    if not bias:
        module.bias = None
    return module


@pytest.mark.parametrize("module", [nn.Linear(3, 5), nn.Linear(3, 5, bias=False), conv(True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replaced_weight_acts_in_its_own_dtype(module, dtype):
    module.to(dtype)
    weight, states = torch.randn(5, 3), torch.randn(2, 4, 3).to(dtype)
    before = module(states)
    bias = 0 if module.bias is None else module.bias.float()
    with weight_replaced(module, weight):
        found = module(states)
    assert found.dtype == dtype
    assert torch.equal(found, (states.float() @ weight.T + bias).to(dtype)) or torch.allclose(
        found.float(), states.float() @ weight.T + bias, rtol=1e-2, atol=1e-5
    )
    assert torch.equal(module(states), before)
    assert "forward" not in vars(module)


def test_replacements_nest_and_end_with_errors():
    module = nn.Linear(3, 5, bias=False)
    states, one, two = torch.randn(2, 3), torch.ones(5, 3), torch.full((5, 3), 2.0)
    before = module(states)
    with pytest.raises(KeyError), weight_replaced(module, one):
        with weight_replaced(module, two):
            assert torch.equal(module(states), states @ two.T)
        assert torch.equal(module(states), states @ one.T)
        raise KeyError
    assert torch.equal(module(states), before)


@pytest.mark.parametrize("name", ALL)
def test_head_gives_the_logits_of_the_model(built, name):
    """Final norm, projection, scale and cap included (OPT-350m, Cohere, Granite, Gemma 2)."""
    lm = built(name)
    batch, rows, columns = batch_of(lm, (9, 2, 4))
    with torch.no_grad(), recorded(lm.model, outputs=[lm.parts.blocks[-1]]) as (_, seen):
        wanted = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[rows, columns]
    with torch.no_grad():
        found = apply_head(lm, seen[lm.parts.blocks[-1]][rows, columns])
    assert close(found, wanted)


def test_the_cap_and_the_scales_are_in_these_tests(built):
    assert built("gemma2, caps").model.config.final_logit_softcapping == 0.5
    assert built("cohere").model.config.logit_scale == 0.25
    assert built("granite").model.config.logits_scaling == 2.0


def test_recording_stops_behind_what_is_wanted(built):
    lm = built("llama")
    ran = []
    hook = lm.model.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    batch, *_ = batch_of(lm, (0, 0, 0))
    value = lm.parts.value[1]
    with recorded(lm.model, [value], [lm.parts.attention_out[0]], stop=True) as (inputs, outputs):
        lm.forward(batch.ids, batch.mask, batch.positions, None)
    hook.remove()
    assert not ran and set(inputs) == {value} and set(outputs) == {lm.parts.attention_out[0]}
    assert inputs[value].shape == (3, 14, 64)
    assert not lm.model.get_submodule(value)._forward_pre_hooks


def test_recording_reads_inputs_given_by_name(built):
    lm = built("llama")  # which calls its attention with hidden_states=…
    batch, *_ = batch_of(lm, (0, 0, 0))
    with recorded(lm.model, ["model.layers.1.self_attn"], ["model.layers.1.input_layernorm"]) as (inputs, outputs):
        lm.forward(batch.ids, batch.mask, batch.positions, None)
    assert torch.equal(inputs["model.layers.1.self_attn"], outputs["model.layers.1.input_layernorm"])


def test_hooks_are_gone_after_an_error(built):
    lm = built("gpt2")
    block = lm.model.get_submodule(lm.parts.blocks[0])
    with pytest.raises(KeyError), recorded(lm.model, outputs=[lm.parts.blocks[0]]):
        raise KeyError
    with pytest.raises(KeyError), output_edited(block, lambda states: states):
        raise KeyError
    assert not block._forward_hooks


def test_an_addition_meets_one_column_of_flattened_states_too():
    states, delta = torch.randn(2, 3, 4), torch.randn(2, 4)
    wanted = states.clone()
    wanted[:, 1] += delta
    assert torch.equal(added_at(delta, 1)(states), wanted)
    assert torch.equal(added_at(delta, 1)(states.view(6, 4)), wanted.view(6, 4))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "granite"])
def test_an_addition_at_attention_is_what_a_full_pass_computes(family):
    lm = make_lm(family)
    (row,) = lm.encode([Text.of("The capital of {} is", "Peru", "Lima")])
    batch, column = lm.pad([row]), row.subject_last
    value, attention = torch.randn(2, 1, lm.parts.hidden_size)
    here = torch.arange(column, len(row.ids))
    ours = BlockReplay(lm, batch, 1, column)(value, torch.zeros_like(here), here, attention=attention)
    with (
        output_edited(lm.model.get_submodule(lm.parts.value[1]), added_at(value, column)),
        output_edited(lm.model.get_submodule(lm.parts.attention_out[1]), added_at(attention, column)),
    ):
        whole = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[0, column:]
    assert torch.allclose(ours, whole, atol=1e-4)
