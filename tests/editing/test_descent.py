"""Every item of a descent has an end of its own, and a matrix moves no farther than it may."""

from __future__ import annotations

import pytest
import torch

from reknow.editing.descent import StepSize, TrainableMatrices, adam_update, descend
from reknow.errors import EditFailed
from reknow.model.hooks import weight_replaced
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.tokens import Text


def problem(distances):
    """Rows that shall come to zero from so far away: the parameter, and the losses of the rows."""
    rows = torch.tensor(distances)[:, None].expand(-1, 3).clone().requires_grad_()
    return rows, lambda: rows.square().mean(1)


def test_an_item_that_is_finished_stays_as_it_is():
    rows, losses = problem([0.5, 2.0])
    passes = descend([losses], adam_update(torch.optim.Adam([rows], lr=0.1), rows), 100, lambda losses: losses < 0.04)
    ends = [next(i for i, losses in enumerate(passes) if losses[item] < 0.04) for item in (0, 1)]
    assert ends[0] < ends[1] == len(passes) - 1 < 99
    assert passes[-1][0] == passes[ends[0]][0], "Adam's momentum does not carry it on"
    alone, loss = problem([0.5])
    again = descend([loss], adam_update(torch.optim.Adam([alone], lr=0.1), alone), 100, lambda losses: losses < 0.04)
    assert [losses[0] for losses in passes[: ends[0] + 1]] == [losses[0] for losses in again]


def test_one_answer_for_all_ends_a_batch_and_the_whole():
    parameters = [torch.full((3,), distance, requires_grad=True) for distance in (0.1, 1.0)]
    updated = []

    def update(number):
        step = adam_update(torch.optim.Adam(parameters, lr=0.1))
        return lambda losses, running: updated.append(number) or step(losses, running)

    batches = [lambda p=p: p.square().mean()[None] for p in parameters]
    count = iter(range(1000))
    passes = descend(batches, update(next(count)), 100, lambda losses: losses.mean() < 0.05)
    assert len(passes[0]) == 2 and passes[0] == pytest.approx([0.01, 1.0], rel=1e-5)
    assert sum(passes[-1]) / 2 < 0.05 <= sum(passes[-2]) / 2
    assert len(updated) < 2 * len(passes), "no update of a batch whose loss is low"


def test_losses_come_in_the_order_of_the_batches_however_they_are_shuffled():
    order, seen = [], []
    batches = [lambda i=i: order.append(i) or torch.tensor([float(i)]) for i in range(5)]
    generator = torch.Generator().manual_seed(0)
    passes = descend(
        batches,
        lambda losses, running: None,
        3,
        lambda losses: losses < 0,
        shuffle=generator,
        after_pass=seen.append,
    )
    assert passes == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 3 and seen == [0, 1, 2]
    drawn = [order[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in drawn) and drawn[0] != drawn[1]


def test_a_loss_of_several_terms_keeps_them():
    terms = torch.tensor([[3.0, 1.0, 2.0], [0.5, 0.25, 0.25]])
    passes = descend([lambda: terms], lambda losses, running: None, 2, lambda losses: losses[:, 0] < 1)
    assert passes == [terms.tolist()] * 2


def test_a_loss_that_is_none_is_refused():
    with pytest.raises(EditFailed, match="lower learning_rate"):
        descend([lambda: torch.tensor([1.0, torch.nan])], lambda *_: None, 2, lambda losses: losses < 1)


def test_a_step_is_relative_to_the_matrix_or_a_plain_number():
    weight = 0.5 * torch.ones(4, 8)
    assert StepSize(0.1, 2.0).of(weight) == pytest.approx((0.05, 1.0))
    assert StepSize(0.1, 2.0, "absolute").of(weight) == (0.1, 2.0)
    assert StepSize(0.1).of(weight)[1] == float("inf")


@pytest.mark.parametrize("units", ["relative", "absolute"])
def test_no_weight_moves_farther_than_the_clamp(lm, edit, units):
    name = lm.parts.value[1]
    bound = 0.02 * (float(lm.weight(name).square().mean().sqrt()) if units == "relative" else 1.0)
    matrices = TrainableMatrices(lm, [name], StepSize(0.5, 0.02, units))
    rows = lm.encode([Text(edit.text, "English")])
    scored = ScoredTokens(lm, rows, [predictions(rows[0], rows[0].prompt_length)], None)
    with matrices.in_use():
        for _ in range(3):
            matrices.step(scored.nll().sum())
    assert float(matrices.deltas()[name].dense().abs().max()) == pytest.approx(bound, rel=1e-4)


def test_matrices_are_used_only_while_open(lm, edit):
    name = lm.parts.value[0]
    matrices = TrainableMatrices(lm, [name], StepSize(0.1))
    rows = lm.encode([Text(edit.text, "English")])
    scored = ScoredTokens(lm, rows, [predictions(rows[0], rows[0].prompt_length)], None)
    with matrices.in_use():
        matrices.step(scored.nll().sum())
        inside = scored.nll().detach()
    with torch.no_grad():
        outside = scored.nll()
        weight = lm.weight(name) + matrices.deltas()[name].dense().float()
        with weight_replaced(lm.model.get_submodule(name), weight):
            assert torch.allclose(scored.nll(), inside, atol=1e-5)
    assert not torch.allclose(inside, outside)
