"""Facts as padded batches that are read with an addition δ at the subject's last token; see `values`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reknow.editing.sinks import contexts_of, warn_of_sink
from reknow.edits import Edit
from reknow.model.parts import embedding
from reknow.model.replay import BlockReplay
from reknow.model.tokens import TOKENS_PER_BATCH, Row, Text

if TYPE_CHECKING:
    from reknow.lm import LM

ESSENCE = "{} is a"
"""The prompt whose next-token distribution must not drift: what the subject is."""

SMALL = 32
"""Tokens that a step of the search hardly notices."""
SMALL_ON_GPU = 2048
"""The same on a GPU, which does not run so many as long as it takes to tell it what to do."""
LARGE = 65536
"""Tokens of a batch beyond which no GPU is faster."""


def room(lm: LM) -> tuple[int, int]:
    """(how many tokens a batch of facts may have, how many of one step cost nothing), for `parts_of`."""
    if lm.device.type != "cuda":
        return TOKENS_PER_BATCH, SMALL
    taken = sum(p.nbytes for p in lm.model.parameters() if p.device == lm.device)
    free = torch.cuda.get_device_properties(lm.device).total_memory - taken
    vocabulary = embedding(lm.model).shape[0]
    # Keys and values, twice while contexts are dealt; of a step's few tokens what the gradient needs, and logits.
    each = 8 * lm.layers * lm.parts.hidden_size * lm.dtype.itemsize + vocabulary
    return min(max(free // 2 // each, TOKENS_PER_BATCH // 8), LARGE), SMALL_ON_GPU


def encode_facts(lm: LM, edits: Sequence[Edit], contexts: Sequence[str], kl_position: str) -> list[list[Row]]:
    """Rows of every fact: one per context, the bare prompt's first, then the essence's, up to where it is read.

    A subject that is an attention sink (`sinks`) is read behind other text in all of them, with a warning.
    """
    texts = []
    before, before_essence = contexts_of(lm, edits, contexts), contexts_of(lm, edits, contexts, ESSENCE)
    for edit, mine, essence in zip(edits, before, before_essence, strict=True):
        assert edit.subject is not None, "methods check that every edit has a subject"
        texts += [Text.about(edit, prefix) for prefix in mine]
        texts.append(Text.of(ESSENCE, edit.subject, prefix=essence[0]))
        if mine is not contexts:
            warn_of_sink(edit)
    rows = lm.encode(texts)
    each = len(contexts) + 1
    if kl_position == "subject":
        rows[each - 1 :: each] = [_until_subject(row) for row in rows[each - 1 :: each]]
    return [rows[i : i + each] for i in range(0, len(rows), each)]


def _until_subject(row: Row) -> Row:
    assert row.subject_last is not None
    return Row(row.ids[: row.subject_last + 1], row.subject_last + 1, row.subject_last)


def _replayed(row: Row) -> int:
    """Tokens of the row that are run at every step: from the subject's last to the last but one of the target."""
    assert row.subject_last is not None
    return len(row.ids) - bool(row.target_ids) - row.subject_last


def parts_of(facts: list[list[Row]], owners: list[int], limit: int, small: int) -> list[list[int]]:
    """Indices of facts in batches of at most `limit` tokens, one δ in one batch.

    What is run at every step is as wide as the widest fact of a batch, so other widths open another batch, unless
    the one at hand has fewer than `small` tokens in a step, so that its passes cost more than their tokens.
    """
    together: dict[int, list[int]] = {}
    for i, owner in enumerate(owners):
        together.setdefault(owner, []).append(i)
    sizes = {}  # per δ: widest of what is run at every step, widest of all
    for owner, mine in together.items():
        rows = [row for i in mine for row in facts[i]]
        sizes[owner] = max(map(_replayed, rows)), max(len(row.ids) for row in rows)
    parts: list[list[int]] = []
    step, width = 0, 0
    for owner in sorted(together, key=lambda owner: sizes[owner]):
        mine, wider = together[owner], max(width, sizes[owner][1])
        open_still = parts and (sizes[owner][0] == step or len(parts[-1]) * len(facts[0]) * step < small)
        if open_still and (len(parts[-1]) + len(mine)) * len(facts[0]) * wider <= limit:
            parts[-1] += mine
            step, width = sizes[owner][0], wider
        else:
            parts.append(list(mine))
            step, width = sizes[owner]
    return parts


@dataclass(frozen=True)
class Scores:
    """How a batch reads its facts with some δ."""

    nll: Tensor  # (facts,) mean over contexts of the target's mean NLL
    essence: Tensor  # (facts, vocabulary) log distribution
    lowest: Tensor  # (facts,) smallest mean probability of the target's tokens over contexts
    hit: Tensor  # (facts,) whether every token of the target is the likeliest in every context


class Run:
    """Facts as one batch, run once up to the edited layer.

    Args:
        facts: per fact its contexts' rows and the essence's.
        weights: (contexts,) of each context in a mean.
    """

    def __init__(self, lm: LM, facts: list[list[Row]], weights: Tensor, layer: int):
        asked, essence = [row for fact in facts for row in fact[:-1]], [fact[-1] for fact in facts]
        spared = len(facts) * (max(map(_replayed, asked)) - max(map(_replayed, essence)))
        # The essence is read at the subject already, so its rows are short.
        self._replays = []
        for rows in [asked, essence] if spared > SMALL else [asked + essence]:
            # The last token of a target predicts nothing that is scored.
            cut = [Row(row.ids[:-1], row.prompt_length) if row.target_ids else row for row in rows]
            anchors = [row.subject_last for row in rows if row.subject_last is not None]
            self._replays.append(BlockReplay(lm, lm.pad(cut, anchors), layer, max(anchors)))
        self._rows_of, self.weights = facts, weights
        self._place()

    def _place(self) -> None:
        """Finds what is scored in the padded rows."""
        facts, device = self._rows_of, self.weights.device
        asked, self.facts = [row for fact in facts for row in fact[:-1]], len(facts)
        scored = [(r, c, t, w) for r, row in enumerate(asked) for c, t, w in _predictions(row)]
        columns = [torch.tensor(column, device=device) for column in zip(*scored, strict=True)]
        self._rows, places, self._targets, self._shares = columns
        here = torch.arange(len(facts), device=device)
        self._owners = here.repeat_interleave(len(self.weights))  # fact of each row that is asked
        ends = torch.tensor([len(fact[-1].ids) - 1 for fact in facts], device=device)
        starts = torch.cat([replay.batch.starts for replay in self._replays])
        groups = [(self._rows, places + starts[self._rows]), (here, ends + starts[len(asked) :])]
        self._deltas, self._places = [self._owners, here], groups
        if len(self._replays) == 1:
            rows, columns = zip(groups[0], (here + len(asked), groups[1][1]), strict=True)
            self._deltas, self._places = [torch.cat(self._deltas)], [(torch.cat(rows), torch.cat(columns))]

    def keep(self, which: Sequence[int], hand: slice = slice(None)) -> Run:
        """The run of some of the facts, with a hand of their contexts."""
        twin, each = copy.copy(self), range(len(self.weights))
        asked = torch.tensor([i * len(each) + j for i in which for j in each[hand]])
        essence = torch.tensor(which)
        both = torch.cat([asked, essence + self.facts * len(each)])
        groups = [asked, essence] if len(self._replays) == 2 else [both]
        twin._replays = [replay.select(rows) for replay, rows in zip(self._replays, groups, strict=True)]
        twin._rows_of = [[*self._rows_of[i][:-1][hand], self._rows_of[i][-1]] for i in which]
        twin.weights = self.weights[hand]
        twin._place()
        return twin

    def by_fact(self, name: str) -> Tensor:
        """An attribute of `BlockReplay` as (facts, contexts, features), float32; the essence is left out."""
        states = getattr(self._replays[0], name)[: len(self._owners)]
        return states.view(self.facts, len(self.weights), -1).float()

    def mean(self, name: str) -> Tensor:
        """The share of these contexts in the mean over all of them. (facts, features)"""
        states = self.by_fact(name)
        return torch.einsum("fcn,c->fn", states, self.weights.to(states.device))

    def score(self, delta: Tensor) -> Scores:
        """delta: (sites, facts, hidden); the value matrix's last."""
        logits = []
        for replay, owners, places in zip(self._replays, self._deltas, self._places, strict=True):
            *attention, added = (site[owners] for site in delta)
            logits.append(replay(added, *places, attention=attention[0] if attention else None).float())
        scored, essence = logits if len(logits) == 2 else logits[0].split([len(self._rows), self.facts])
        wanted = -cross_entropy(scored, self._targets, reduction="none")  # (n,)
        owners = self._owners[self._rows]
        zeros = wanted.new_zeros(self.facts)
        weights = (self.weights / self.weights.sum())[self._rows % len(self.weights)]
        nll = zeros.index_add(0, owners, -wanted * self._shares * weights)
        missed = zeros.index_add(0, owners, (scored.detach().argmax(-1) != self._targets).float())
        probability = wanted.new_zeros(len(self._owners)).index_add(
            0, self._rows, wanted.detach().exp() * self._shares
        )
        lowest = probability.view(self.facts, -1).min(1).values
        return Scores(nll, essence.log_softmax(-1), lowest, missed == 0)


def _predictions(row: Row) -> list[tuple[int, int, float]]:
    """(index of the token that predicts, token predicted, 1 / tokens of the target) of a row's target."""
    wanted = row.target_ids
    return [(row.prompt_length - 1 + i, token, 1 / len(wanted)) for i, token in enumerate(wanted)]


def dealt(lm: LM, facts: list[list[Row]], weights: Tensor, layer: int, turns: int) -> list[Run]:
    """The facts with every `turns`-th context, from the first on, from the second on …"""
    whole, turns = Run(lm, facts, weights, layer), min(turns, len(weights))
    return [whole] if turns == 1 else [whole.keep(range(len(facts)), slice(i, None, turns)) for i in range(turns)]
