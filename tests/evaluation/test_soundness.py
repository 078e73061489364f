"""How sound an edited model is: against the algebra of its patches, and with limits from a file."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import make_lm, some_patch
from reknow import Edit, method
from reknow.errors import InputError
from reknow.evaluation.limits import Limits, compare, read_limits
from reknow.evaluation.soundness import Health, ask_again, measure, relative_norms, text_kl
from reknow.model.tokens import Text, encode

HEALTH = Health(10, 1.0, 0.9, 30, 20.0, 21.0, 0.01, {"a": 0.1, "b": 0.2})


def test_kl_of_plain_text_is_that_of_the_logits(lm):
    texts = ["The capital of Peru is Lima.", "Beats Music is owned by Apple"]
    assert text_kl(lm, texts) == 0.0
    patch = some_patch(lm, size=1.0)

    def log_probs() -> list[torch.Tensor]:
        rows = [torch.tensor([row.ids]) for row in encode(lm.tokenizer, [Text(text) for text in texts])]
        return [lm.model(row).logits[0].double().log_softmax(-1) for row in rows]

    before = log_probs()
    with lm.patched(patch):
        found, after = text_kl(lm, texts), log_probs()
    assert not lm.patches
    wanted = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]).mean()
    assert found == pytest.approx(float(wanted), rel=1e-4) and found > 1e-4


def test_norms_are_those_of_the_sum_of_all_patches(lm):
    one, two = some_patch(lm, 1), some_patch(lm, 2, dense=True, layers=(1, 2))
    norms = relative_norms(lm, [one, two])
    first, second = (lm.parts.value[layer] for layer in (1, 2))
    both = one.deltas[first].dense() + two.deltas[first].dense()
    assert norms.keys() == {first, second}
    assert norms[first] == pytest.approx(float(both.norm() / lm.base_weight(first).double().norm()), rel=1e-5)
    lm.apply(one)
    lm.apply(two)
    now, base = lm.weight(first).double(), lm.base_weight(first).double()
    assert norms[first] == pytest.approx(float((now - base).norm() / base.norm()), rel=1e-4)
    assert relative_norms(lm, [some_patch(lm, 3)])[first] < norms[first]


def test_every_edit_is_asked_again_but_those_that_later_ones_replace(lm):
    quick = method("ft-m", layer=1, steps=200)
    edits = [Edit("The capital of {}", subject="Peru", target_new=new) for new in ("Paris", "Apple")]
    lm.apply(first := quick.edit(lm, [edits[0]]))
    (asked,) = ask_again(lm)
    assert asked.said and asked.replaced is None and asked.patch == first.id and asked.rank == 1
    lm.apply(second := quick.edit(lm, [edits[1]]))
    old, new = ask_again(lm)
    assert old.replaced == second.id and new.replaced is None and new.probability > old.probability
    health = measure(lm, facts=4)
    assert health.edits == 1 and health.in_force == float(new.said) and health.others == 4
    assert health.perplexity_ratio == health.perplexity / health.perplexity_before != 1
    assert health.largest_norm == max(health.norms.values()) and health.kl > 0


def test_a_model_without_patches_is_as_its_base():
    health = measure(make_lm("gpt2"), facts=2)
    assert (health.edits, health.in_force, health.others_kept) == (0, 1.0, 1.0)
    assert (health.perplexity_ratio, health.kl, health.largest_norm) == (1.0, 0.0, 0.0)


def test_what_is_beyond_a_limit():
    assert all(one.kept for one in compare(HEALTH, Limits()))
    fields = [("edits", 9, 10), ("in_force", 1.0, 0.99), ("others_kept", 0.91, 0.9), ("perplexity_ratio", 1.04, 1.06)]
    for name, limit, fine in [*fields, ("kl", 0.009, 0.01), ("norm", 0.19, 0.2)]:
        values = {one.name: one for one in compare(HEALTH, Limits(**{name: limit}))}
        assert [one for one, found in values.items() if not found.kept] == ([] if limit == 1.0 else [name])
        assert all(one.kept for one in compare(HEALTH, Limits(**{name: fine})))
    wrecked = Health(10, 0.5, None, 0, 20.0, math.nan, math.nan, {})
    assert [one.name for one in compare(wrecked, Limits()) if not one.kept] == ["in_force", "perplexity_ratio", "kl"]


def test_limits_from_a_file(tmp_path):
    file = tmp_path / "limits.toml"
    file.write_text("edits = inf  # as many as there are\nperplexity_ratio = 1.1\nin_force = 1\n")
    assert read_limits(file) == Limits(edits=math.inf, perplexity_ratio=1.1, in_force=1.0)
    file.write_text("")
    assert read_limits(file) == Limits()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("perplexity = 1.5", "unknown limit 'perplexity'. Did you mean 'perplexity_ratio'?"),
        ("kl = 'much'", "expected kl in FILE as a number from 0 on, or inf; got 'much': correct it"),
        ("kl = nan", "expected kl in FILE as a number from 0 on, or inf; got nan"),
        ("edits = true", "expected edits in FILE as a number"),
        ("edits = -1", "expected edits in FILE as a number from 0 on"),
        ("in_force = 90", "expected in_force in FILE as a share from 0 to 1; got 90"),
        ("[limits]\nkl = 1", "unknown limit 'limits'"),
        ("kl 1", "expected limits as TOML in FILE; it cannot be read ("),
        ("kl = \x00", "expected limits as TOML in FILE"),
    ],
)
def test_limits_that_are_none_are_refused(tmp_path, text, said):
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(InputError) as refusal:
        read_limits(file)
    assert said.replace("FILE", str(file)) in str(refusal.value) and str(file) in str(refusal.value)


def test_a_file_of_limits_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_limits(tmp_path / "none.toml")
