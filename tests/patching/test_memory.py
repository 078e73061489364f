"""What every memory can rely on: versions, files, composition, and a decision taken on the prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from conftest import alone, bits, make_lm, same, some_patch
from families import CORE_FAMILIES
from reknow import FT, LM, MELO, METHODS, ROME, Edit, Patch, diff, merge
from reknow.contract import check_edits
from reknow.errors import PatchError
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.memories.base import MemoryMethod, memory_patch
from reknow.model.hooks import added_at, output_edited
from reknow.model.replay import BlockReplay
from reknow.model.scoring import Score
from reknow.model.tokens import Text
from reknow.patching.memory import hook_output, versions
from reknow.patching.stack import save_stack
from reknow.registry import Row

PROMPTS = ["I know Danielle Darrieux", "The capital of Peru is", "Who is Zoë Übel ? She is"]


@dataclass(frozen=True)
class Shift(MemoryMethod):
    """Adds a vector to a value matrix's output at all tokens of rows whose prompt ends like an edit's, and behind."""

    kind: ClassVar = "hook"
    size: float = 8.0

    @property
    def name(self) -> str:
        return "shift"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits)
        name = lm.parts.value[1]
        rows = lm.encode([Text(edit.text) for edit in edits])
        keys = lm.read(rows, [len(row.ids) - 1 for row in rows], inputs=[name]).inputs[name]
        generator = torch.Generator().manual_seed(len(versions(lm.patches, "shift")))
        values = self.size * torch.randn(len(edits), lm.parts.hidden_size, generator=generator)
        return memory_patch(self, lm, edits, {"keys": keys.cpu(), "values": values}, memory={"module": name})

    @staticmethod
    def running_memory(lm, patches):
        keys, values = (torch.cat([p.state[part] for p in patches]) for part in ("keys", "values"))
        return _Shift(patches[-1].memory["module"], keys.to(lm.device), values.to(lm.device))


@dataclass(eq=False)
class _Shift:
    module: str
    keys: torch.Tensor
    values: torch.Tensor

    def attach(self, lm):
        def change(reading, inputs, outputs):
            def nearest():
                distances = torch.cdist(reading.last_prompt_state(inputs).float(), self.keys.float())
                return torch.where(distances.min(1).values < 1e-3, distances.argmin(1), -1)

            chosen = reading.decision(self, nearest)
            return outputs + torch.where(chosen[:, None, None] >= 0, self.values[chosen][:, None], 0.0)

        return [hook_output(lm, self.module, change)]


@dataclass(frozen=True)
class Preface(MemoryMethod):
    """Puts the edits before every prompt."""

    kind: ClassVar = "prompt"

    @property
    def name(self) -> str:
        return "preface"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits)
        return memory_patch(self, lm, edits, {}, memory={"facts": [f"{e.text} {e.target_new} . " for e in edits]})

    @staticmethod
    def running_memory(lm, patches):
        facts = "".join(fact for patch in patches for fact in patch.memory["facts"])

        class Prefaced:
            def prompts(self, lm, texts):
                return [facts + text for text in texts]

        return Prefaced()


@dataclass(frozen=True)
class Elsewhere(MemoryMethod):
    """Sends the prompts of the edits to another model, with an exclamation mark."""

    kind: ClassVar = "router"
    other: ClassVar[LM]

    @property
    def name(self) -> str:
        return "elsewhere"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        return memory_patch(self, lm, edits, {}, memory={"prompts": [edit.text for edit in edits]})

    @staticmethod
    def running_memory(lm, patches):
        known = {prompt for patch in patches for prompt in patch.memory["prompts"]}

        class Sent:
            def route(self, lm, prompts):
                return [(Elsewhere.other, prompt + " !") if prompt in known else None for prompt in prompts]

        return Sent()


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch):
    for kind in (Shift, Preface, Elsewhere):
        monkeypatch.setitem(METHODS, kind().name, Row(kind, {}, "a test"))


def edits(*prompts: str, target: str = "of") -> list[Edit]:
    return [Edit(prompt, target_new=target) for prompt in prompts]


@pytest.fixture(scope="module", params=CORE_FAMILIES)
def hooked(request):
    """A model, and a patch whose memory concerns the first and the last prompt."""
    lm = make_lm(request.param)
    return lm, Shift().edit(lm, edits(PROMPTS[0], PROMPTS[2]))


def test_the_decision_is_taken_on_the_prompt_and_kept(hooked):
    """Cache and left padding, scored and generated: the tokens that a plain loop over full passes finds."""
    lm, patch = hooked
    plain = lm.generate(PROMPTS, 8)
    with lm.patched(patch):
        wanted = [alone(lm, prompt, 8) for prompt in PROMPTS]
        found = lm.generate(PROMPTS, 8)
        assert found == [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
        assert found[1] == plain[1] and found[0] != plain[0] and found[2] != plain[2]
        assert lm.generate(PROMPTS[2], 8) == found[2]
        targets = ["of the Peru French", "is Lima", "English in Paris"]
        together = lm.score(PROMPTS, targets)
        for prompt, target, score in zip(PROMPTS, targets, together, strict=True):
            (own,) = lm.score([prompt], [target])
            assert own.top == score.top and own.nll == pytest.approx(score.nll, abs=1e-3)
        assert [score.top[0] for score in together] == [ids[0] for ids in wanted]


def test_the_raw_model_takes_all_text_for_the_prompt(hooked):
    lm, patch = hooked
    (row,) = lm.encode([Text(PROMPTS[0])])
    ids = torch.tensor([row.ids])
    plain = lm.model(ids).logits
    with lm.patched(patch):
        changed = lm.model(ids).logits
        longer = lm.model(torch.cat([ids, ids[:, :1]], 1)).logits
        cut = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert not torch.allclose(changed, plain)
    assert torch.allclose(longer[:, :-1], plain, atol=1e-4), "another text, which ends in another way"
    with lm.patched(patch):
        assert cut[0, len(row.ids) :].tolist()[:2] == alone(lm, PROMPTS[0], 2)
    assert torch.equal(lm.model(ids).logits, plain)


def test_a_block_replay_runs_the_hooks(hooked):
    """Weight methods replay blocks on top of a memory: same logits as a full pass, whatever was read since."""
    lm, patch = hooked
    rows = lm.encode([Text(prompt, "of the") for prompt in PROMPTS])
    columns = [row.prompt_length - 1 for row in rows]
    with lm.patched(patch):
        for layer in range(lm.layers):
            batch = lm.pad(rows, anchors=columns)
            replay = BlockReplay(lm, batch, layer, max(columns))
            everywhere = torch.arange(len(rows))
            places = batch.ends  # behind the prompt, where the decision still holds
            lm.score(["I know"], ["of"])
            delta = torch.randn(len(rows), lm.parts.hidden_size, generator=torch.Generator().manual_seed(layer))
            edit = added_at(delta, max(columns))
            with output_edited(lm.model.get_submodule(lm.parts.value[layer]), edit):
                full = lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends).logits
            assert torch.allclose(replay(delta, everywhere, places), full[everywhere, places], atol=1e-3)
            full = lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends).logits
            assert torch.allclose(replay.rerun(everywhere, places), full[everywhere, places], atol=1e-3)


@pytest.mark.parametrize(
    "editor", [ROME(layer=2, covariance_tokens=0, context_groups=()), FT(layer=2, learning_rate=0.1)]
)
def test_a_weight_method_edits_on_top_of_a_memory(hooked, editor):
    lm, patch = hooked
    before = bits(lm)
    edit = Edit("I know {}", subject="Danielle Darrieux", target_new="in")
    with lm.patched(patch):
        old = lm.score([edit.text], ["in"])[0].nll
        made = editor.edit(lm, [edit])
        assert made.made_on == (patch.id,)
        with lm.patched(made):
            assert lm.score([edit.text], ["in"])[0].nll < old - 0.3
        assert lm.score([edit.text], ["in"])[0].nll == old
    assert same(bits(lm), before)


def test_versions_are_one_memory():
    lm = make_lm()
    first = Shift().edit(lm, edits(PROMPTS[0]))
    lm.apply(first)
    one = lm.generate(PROMPTS, 6)
    second = Shift().edit(lm, edits(PROMPTS[1]))
    assert (first.follows, second.follows) == (None, first.id)
    lm.apply(second)
    both = lm.generate(PROMPTS, 6)
    assert both[0] == one[0] and both[1] != one[1] and both[2] == one[2]
    with pytest.raises(PatchError, match="newest version of the shift memory"):
        lm.revert(first)
    assert lm.patches == (first, second) and lm.generate(PROMPTS, 6) == both
    lm.revert(second)
    assert lm.generate(PROMPTS, 6) == one
    with pytest.raises(PatchError, match=f"continues .{first.id}.; the newest"), lm.unpatched():
        lm.apply(second)
    lm.revert(first)
    assert not lm.hooked and not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_two_memories_made_apart_are_refused_together():
    lm = make_lm()
    a, b = (Shift().edit(lm, edits(prompt)) for prompt in PROMPTS[:2])
    lm.apply(a)
    with pytest.raises(PatchError, match="an empty one"):
        lm.apply(b)
    assert lm.patches == (a,)


def test_rebuild_makes_the_later_edits_again():
    lm = make_lm()
    for prompt in PROMPTS:
        lm.apply(Shift().edit(lm, edits(prompt)))
        if prompt == PROMPTS[0]:
            weights = some_patch(lm)
            lm.apply(weights)
    first, _, second, third = lm.patches
    lm.rebuild(without=second)
    assert [p.edits for p in lm.patches] == [first.edits, weights.edits, third.edits]
    again = lm.patches[-1]
    assert again.follows == first.id and again.id != third.id
    lm.revert(weights)
    with lm.stacked([first]):
        assert Shift().edit(lm, edits(PROMPTS[2])).memory == again.memory
    with pytest.raises(PatchError, match="id of an applied patch"):
        lm.rebuild(without=second)
    lm.rebuild(without=first)
    assert [p.edits for p in lm.patches] == [third.edits]


def alike(one: Score, other: Score) -> bool:
    """Equal but for the rounding of another batch."""
    return replace(one, nll=0) == replace(other, nll=0) and one.nll == pytest.approx(other.nll, rel=1e-5)


def test_prompts_and_routers():
    lm, Elsewhere.other = make_lm(), make_lm(seed=1)
    plain = lm.generate(PROMPTS, 6)
    preface = Preface().edit(lm, edits("Peru is"))
    elsewhere = Elsewhere().edit(lm, edits(PROMPTS[1]))
    prefaced = lm.generate([f"Peru is of . {prompt}" for prompt in PROMPTS], 6)
    sent = Elsewhere.other.generate(PROMPTS[1] + " !", 6)
    with lm.patched(preface):
        assert lm.generate(PROMPTS, 6) == prefaced != plain
        with lm.patched(elsewhere):
            assert lm.generate(PROMPTS, 6) == [prefaced[0], sent, prefaced[2]]
            scores = lm.score(PROMPTS, ["of", "in", "of"])
            assert alike(scores[1], Elsewhere.other.score([PROMPTS[1] + " !"], ["in"])[0])
    assert alike(scores[0], lm.score([f"Peru is of . {PROMPTS[0]}"], ["of"])[0])
    with lm.patched(elsewhere):
        assert lm.generate(PROMPTS, 6) == [plain[0], sent, plain[2]]
        assert lm.generate([], 6) == [] == lm.score([], [])
    assert lm.generate(PROMPTS, 6) == plain


def test_what_needs_matrices_refuses_a_memory(tmp_path):
    lm = make_lm()
    patch, weights = Shift().edit(lm, edits(PROMPTS[0])), some_patch(lm)
    for refused in (
        lambda: merge([weights, patch]),
        lambda: diff(weights, patch),
        lambda: patch.truncated(1),
    ):
        with pytest.raises(PatchError, match="memory beside the model"):
            refused()
    with lm.patched(weights, patch):
        for export in (export_checkpoint, export_lora):
            with pytest.raises(PatchError, match="memory beside the model"):
                export(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_and_stack_folders(tmp_path):
    lm = make_lm()
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    lm = LM(tmp_path / "base")
    lm.apply(Shift().edit(lm, edits(PROMPTS[0])))
    lm.apply(some_patch(lm))
    lm.apply(Shift().edit(lm, edits(PROMPTS[2])))
    save_stack(tmp_path / "stack", lm.name, lm.patches)
    opened = LM(tmp_path / "stack")
    assert [p.id for p in opened.patches] == [p.id for p in lm.patches]
    assert opened.patches[2].follows == lm.patches[0].id and opened.patches[0].memory == lm.patches[0].memory
    assert opened.generate(PROMPTS, 8) == lm.generate(PROMPTS, 8)
    assert opened.score(PROMPTS, ["of"] * 3) == lm.score(PROMPTS, ["of"] * 3)


def test_a_memory_for_another_model_is_refused(tmp_path):
    lm = make_lm()
    patch = Shift().edit(lm, edits(PROMPTS[0]))
    wider, other = make_lm(n_embd=16), make_lm(seed=3)
    for wrong in (wider, other):
        with pytest.raises(PatchError, match="base model on which"):
            wrong.apply(patch)
    other.apply(patch, force=True)
    with pytest.raises(PatchError, match="memory of a method that this version of reknow has"):
        lm.apply(Patch("unheard", {}, patch.edits, {}, patch.base, kind="hook", memory=patch.memory))
    path = Patch("rome", {}, patch.edits, {}, patch.base, kind="odd").save(tmp_path / "odd.patch")  # type: ignore
    with pytest.raises(PatchError, match=r"field kind: .*'odd'"):
        Patch.load(path)


def test_a_memory_that_does_not_fit_changes_nothing():
    lm, odd = make_lm(), make_lm()
    patch = Shift().edit(lm, edits(PROMPTS[0]))
    before = bits(lm)
    strange = Patch("shift", {}, patch.edits, {}, patch.base, kind="hook", state=patch.state, memory={"module": "no"})
    lm.apply(some_patch(lm))
    text, edited = lm.generate(PROMPTS[0], 4), bits(lm)
    with pytest.raises(PatchError, match="fits"):
        lm.apply(strange)
    assert len(lm.patches) == 1 and same(bits(lm), edited) and lm.generate(PROMPTS[0], 4) == text and not lm.hooked
    lm.revert(lm.patches[0])
    assert same(bits(lm), before) and same(bits(odd), before)


def test_a_memory_that_fits_in_part_leaves_no_hook():
    """As one that was forced on a model with fewer layers."""
    lm = make_lm()
    patch = MELO(layer=1, steps=2).edit(lm, edits(PROMPTS[0]))
    good, bad = patch.memory["modules"][0], "transformer.h.9.mlp.c_proj"
    state = {name.replace(patch.memory["modules"][1], bad): tensor for name, tensor in patch.state.items()}
    text = lm.generate(PROMPTS[0], 4)
    with pytest.raises(PatchError, match="fits"):
        lm.apply(replace(patch, state=state, memory={**patch.memory, "modules": [good, bad]}))
    assert lm.generate(PROMPTS[0], 4) == text
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_a_cache_from_before_the_memory_is_refused(hooked):
    lm, patch = hooked
    (row,) = lm.encode([Text(PROMPTS[0])])
    ids = torch.tensor([row.ids])
    cache = lm.model(ids, use_cache=True).past_key_values
    with lm.patched(patch), pytest.raises(PatchError, match="read the prompts again"):
        lm.model(ids[:, -1:], past_key_values=cache, use_cache=True)


def test_weight_patches_keep_their_ids():
    """The fields of memories are no part of a weight patch's content."""
    header = some_patch(make_lm()).header()
    assert not {"follows", "memory"} & set(header) and header["kind"] == "weights"
