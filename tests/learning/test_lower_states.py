"""What enters the lowest edited block, in place of the blocks below it: the same numbers with fewer passes."""

from __future__ import annotations

import pytest
import torch

from conftest import make_lm
from families import CORE_FAMILIES, FAMILIES, slow_but
from reknow import LM
from reknow.learning.gradients import gradient_factors, mlp_matrices
from reknow.learning.lower_states import LowerStates
from reknow.model.replay import BlockReplay
from reknow.model.tokens import Text

TEXTS = [Text("The capital of Peru is", "Lima"), Text("Paris", "is in France"), Text("I am", "in Lima and Paris")]


class Passes:
    """Counts the rows that a block reads."""

    def __init__(self, lm: LM, block: int):
        self.rows = 0
        lm.model.get_submodule(lm.parts.blocks[block]).register_forward_hook(self._count)

    def _count(self, _module, args, _output):
        self.rows += len(args[0])


@pytest.mark.parametrize("family", slow_but((*CORE_FAMILIES, "gemma2", "olmoe"), sorted(FAMILIES)))
def test_the_same_numbers(family):
    lm = make_lm(family)
    layer, rows = lm.layers - 1, lm.encode(TEXTS)
    names = mlp_matrices(lm, [layer])

    def read():
        batch = lm.pad(rows)
        replay = BlockReplay(lm, batch, layer, 0)
        ends = torch.arange(len(rows)), torch.full((len(rows),), batch.ids.shape[1] - 1)
        factors, loss = gradient_factors(lm, names, rows)
        return [*factors[names[0]].flat(), torch.tensor(loss), replay.rerun(*ends)]

    wanted = read()
    longer = [Text(text.prompt, f"{text.target}.") for text in TEXTS]  # all but a text's last token are read
    lower = LowerStates(lm, layer, [TEXTS[:1], TEXTS[1:2]])
    for _ in range(2):
        with lower.given([*TEXTS, *longer]):
            found = read()
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(read(), wanted, strict=True):
        assert torch.equal(one, other), "nothing is left behind"


def test_what_is_kept_is_read_once_and_in_its_group():
    lm = make_lm()
    lower = LowerStates(lm, 1, [TEXTS[:2]])
    passes = Passes(lm, 0)
    for texts, rows in ((TEXTS[:1], 2), (TEXTS[1:2], 0), (TEXTS, 1), (TEXTS, 1)):
        before = passes.rows
        with lower.given(texts):
            lm.score([], [])
        assert passes.rows - before == rows, texts
    (row,) = lm.encode(TEXTS[:1])
    room = len(row.ids) * lm.model.config.hidden_size * 4
    for limit, groups in ((room - 1, 0), (room, 1)):
        assert len(LowerStates(lm, 1, [TEXTS[:1], TEXTS[1:]], limit=limit)._groups) == groups


def test_the_lowest_block_has_none_below():
    lm = make_lm()
    lower = LowerStates(lm, 0, [TEXTS])
    with lower.given(TEXTS):
        assert not lower.useful and lm.score(["I am"], ["in"])
