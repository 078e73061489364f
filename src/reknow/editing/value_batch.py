"""Facts as padded batches that are read with an addition δ at the subject's last token; see `values`.

Facts are searched in groups, as many as memory takes, and the contexts are split into batches, of which each pass
reads one: a `FactBatch` is a group of facts behind a batch of contexts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reknow.editing.sinks import avoid_sinks, reworded, subject_texts, warn_of_sink
from reknow.edits import Edit
from reknow.errors import EditRefused
from reknow.lm import LM
from reknow.model.parts import embedding_matrix
from reknow.model.replay import BlockReplay
from reknow.model.tokens import TOKENS_PER_BATCH, EncodedText, Text

__all__ = [
    "FactBatch",
    "Scores",
    "check_reach",
    "encode_facts",
    "group_facts",
    "number_of_batches",
    "of_like_weights",
    "split_contexts",
    "spread_over_contexts",
    "token_budget",
    "weighted_rows",
]

_KL_PROMPT = "{} is a"
"""The prompt whose next-token distribution must not drift: what kind of thing the subject is."""

FREE_TOKENS = 48
"""Tokens of a pass that cost as much as there being one: it reads all weights, and calls all modules, for few as for
many (SmolLM2, one thread, docs/log.md)."""
PACKED_FREE_TOKENS = 600
"""Padded tokens that cost as much where padding is left out: attention alone runs them."""
FREE_TOKENS_ON_GPU = 2048
"""The same on a GPU, which runs so many sooner than it is told what to do."""
MOST_TOKENS = 65536
"""Tokens of a batch beyond which no GPU is faster."""
MOST_TOKENS_OF_FACT = 128
"""Tokens of one fact that a pass runs, where its contexts are split: some 30 in each of ROME's four of a pass."""


def token_budget(lm: LM) -> tuple[int, int]:
    """(how many tokens a group of facts may have, how many padded ones of a pass cost nothing), for `group_facts`."""
    if lm.device.type != "cuda":
        return TOKENS_PER_BATCH, PACKED_FREE_TOKENS if lm.parts.packable else FREE_TOKENS
    taken = sum(p.nbytes for p in lm.model.parameters() if p.device == lm.device)
    left = torch.cuda.get_device_properties(lm.device).total_memory - taken
    vocabulary = embedding_matrix(lm.model).shape[0]
    # Keys and values, twice while contexts are split; of a step's few tokens what the gradient needs, and logits.
    each = 8 * lm.layers * lm.parts.hidden_size * lm.dtype.itemsize + vocabulary
    return min(max(left // 2 // each, TOKENS_PER_BATCH // 8), MOST_TOKENS), FREE_TOKENS_ON_GPU


def encode_facts(
    lm: LM, edits: Sequence[Edit], contexts: Sequence[str], *, rephrased: bool = False
) -> list[list[EncodedText]]:
    """Rows of every fact, as many of each: one per context, the bare prompt's first, and if wanted per rephrasing,
    then the KL prompt's, up to the subject's end, where ROME's code reads it.

    A subject that is an attention sink (`sinks`) is read behind other text in all of them, with a warning.
    """
    texts, about = [], subject_texts(lm, edits, contexts, rephrased=rephrased)
    for edit, own, before_kl in zip(edits, about, avoid_sinks(lm, edits, contexts, _KL_PROMPT), strict=True):
        assert edit.subject is not None, "methods check that every edit has a subject"
        texts += [*own, Text.of(_KL_PROMPT, edit.subject, prefix=before_kl[0])]
        if own[0] != Text.about(edit, contexts[0]):
            warn_of_sink(edit)
    rows = lm.encode(texts)
    each = len(about[0]) + 1
    rows[each - 1 :: each] = [_until_subject(row) for row in rows[each - 1 :: each]]
    return [rows[i : i + each] for i in range(0, len(rows), each)]


def weighted_rows(
    lm: LM, edits: Sequence[Edit], contexts: Sequence[str], *, rephrased: bool
) -> tuple[list[list[EncodedText]], list[list[float]]]:
    """Per fact its rows, and the weight of each but the last in a mean: alike, but contexts are the same now and
    then. Facts of as many rephrasings have as many rows."""
    distinct = Counter(contexts)
    counts = [len(reworded(edit)) if rephrased else 0 for edit in edits]
    facts: dict[int, list[EncodedText]] = {}
    for count in dict.fromkeys(counts):
        alike = [i for i, own in enumerate(counts) if own == count]
        rows = encode_facts(lm, [edits[i] for i in alike], list(distinct), rephrased=rephrased)
        facts |= dict(zip(alike, rows, strict=True))
    weights = [[n / (len(contexts) + count) for n in (*distinct.values(), *[1] * count)] for count in counts]
    return [facts[i] for i in range(len(edits))], weights


def check_reach(edits: Sequence[Edit], facts: list[list[EncodedText]], layer: int) -> None:
    """Raises EditRefused where the subject ends no prompt: what the last layer adds only the next token sees."""
    for edit, (*prompts, _) in zip(edits, facts, strict=True):
        if all(row.subject_last != row.prompt_length - 1 for row in prompts):
            raise EditRefused(
                "expected a layer below the last, which counts for the token behind the subject alone; got layer "
                f"{layer} for {edit.text!r}, where the answer comes later: take an earlier one, or leave it to the "
                "library",
                edit,
            )


def of_like_weights(weights: list[list[float]]) -> list[list[int]]:
    """Numbers of the facts whose rows weigh alike, so that they can be searched together."""
    found: dict[tuple[float, ...], list[int]] = {}
    for i, own in enumerate(weights):
        found.setdefault(tuple(own), []).append(i)
    return list(found.values())


def _until_subject(row: EncodedText) -> EncodedText:
    assert row.subject_last is not None
    return EncodedText(row.ids[: row.subject_last + 1], row.subject_last + 1, row.subject_last)


def replayed_tokens(row: EncodedText) -> int:
    """Tokens of the row that are run at every step: from the subject's last to the last but one of the target."""
    assert row.subject_last is not None
    return len(row.ids) - bool(row.target_ids) - row.subject_last


def group_facts(
    facts: list[list[EncodedText]], delta_index: list[int], limit: int, free: int, context_batches: int = 1
) -> list[list[int]]:
    """Indices of facts in groups of at most `limit` tokens; facts of one δ are in one group.

    What is run in a pass is as wide as the widest fact of a group, so other widths open another group, unless what is
    padded is at most `free` tokens of a pass, so that another group's passes would cost more.

    Args:
        context_batches: into how many the contexts are split, of which a pass reads one.
    """
    sharing: dict[int, list[int]] = {}
    for i, index in enumerate(delta_index):
        sharing.setdefault(index, []).append(i)
    sizes = {}  # per δ: widest of what is run in a pass, widest of all
    for index, members in sharing.items():
        rows = [row for i in members for row in facts[i]]
        sizes[index] = max(map(replayed_tokens, rows)), max(len(row.ids) for row in rows)
    rows_of_pass = -(-(len(facts[0]) - 1) // context_batches) + 1  # of a fact, with the KL prompt's
    groups: list[list[int]] = []
    width, tokens = 0, 0  # of the last group; tokens of a pass without padding
    for index in sorted(sharing, key=lambda index: sizes[index]):
        members, (step, wider) = sharing[index], sizes[index]
        padded = len(groups[-1]) * rows_of_pass * step - tokens if groups else free + 1
        if padded <= free and (len(groups[-1]) + len(members)) * len(facts[0]) * max(width, wider) <= limit:
            groups[-1] += members
            width = max(width, wider)
        else:
            groups.append(list(members))
            width, tokens = wider, 0
        tokens += len(members) * rows_of_pass * step
    return groups


def number_of_batches(facts: Sequence[Sequence[EncodedText]], wanted: int) -> int:
    """Into how many batches the contexts of these facts are split: `wanted`, or as many more as long texts need, of
    which a pass should not run every context that it would of short ones; 1 stays 1.

    Behind a prompt of fifty words ROME's search took three times as long with four contexts a pass as with one, for
    the same scores (docs/log.md).
    """
    if wanted == 1:
        return 1
    longest = max(sum(map(replayed_tokens, fact[:-1])) for fact in facts)
    return max(wanted, min(-(-longest // MOST_TOKENS_OF_FACT), len(facts[0]) - 1))


@dataclass(frozen=True)
class Scores:
    """How a batch reads its facts with some δ."""

    nll: Tensor  # (facts,) mean over contexts of the target's mean NLL
    kl_prompt: Tensor  # (facts, vocabulary) log distribution behind the KL prompt
    probability: Tensor  # (facts,) smallest mean probability of the target's tokens over contexts
    predicted: Tensor  # (facts,) whether every token of the target is the most likely in every context
    spread: Tensor  # (facts,) how far contexts differ in the layers above, see `spread_over_contexts`


def spread_over_contexts(states: Tensor, *, relative: bool) -> Tensor:
    """How far what is made of a subject differs between contexts (CoRE, arXiv 2505.23026). (facts,)

    Args:
        states: (facts, contexts, hidden).
        relative: the mean squared distance of two contexts in units of the mean squared length; else the sum of
            squared distances by the width, as in the authors' code.
    """
    contexts, width = states.shape[1:]
    lengths = states.square().sum((1, 2))
    distances = contexts * lengths - states.sum(1).square().sum(1)  # Σ over pairs ‖h_i − h_j‖²
    if relative:
        return distances / (max(contexts - 1, 1) / 2 * lengths.detach().clamp(min=1e-12))
    return distances / width


class FactBatch:
    """A group of facts behind a batch of contexts, run once up to the edited layer.

    Args:
        facts: per fact its contexts' rows and the KL prompt's.
        weights: (contexts,) of each context in a mean.

    Attributes:
        facts: how many there are.
        width: of an addition, the model's hidden size.
    """

    def __init__(self, lm: LM, facts: list[list[EncodedText]], weights: Tensor, layer: int):
        prompts, kl_prompts = [row for fact in facts for row in fact[:-1]], [fact[-1] for fact in facts]
        spared = len(facts) * (max(map(replayed_tokens, prompts)) - max(map(replayed_tokens, kl_prompts)))
        # The KL prompt is read at the subject already, so its rows are short; a pass by themselves costs a GPU more.
        self._replays = []
        for rows in [prompts, kl_prompts] if spared > token_budget(lm)[1] else [prompts + kl_prompts]:
            # The last token of a target predicts nothing that is scored.
            cut = [EncodedText(row.ids[:-1], row.prompt_length) if row.target_ids else row for row in rows]
            columns = [row.subject_last for row in rows if row.subject_last is not None]
            self._replays.append(BlockReplay(lm, lm.pad(cut, columns), layer, max(columns)))
        self._rows, self.weights, self.width = facts, weights, lm.parts.hidden_size
        self._locate()

    def _locate(self) -> None:
        """Finds what is scored in the padded rows."""
        facts, device = self._rows, self.weights.device
        prompts, self.facts = [row for fact in facts for row in fact[:-1]], len(facts)
        # Per token of a target: its row, the place that predicts it, the token, and its share in the row's mean.
        scored = [
            (number, row.prompt_length - 1 + i, token, 1 / len(row.target_ids))
            for number, row in enumerate(prompts)
            for i, token in enumerate(row.target_ids)
        ]
        columns = [torch.tensor(column, device=device) for column in zip(*scored, strict=True)]
        self._scored_rows, places, self._targets, self._shares = columns
        every = torch.arange(len(facts), device=device)
        self._fact_of_row = every.repeat_interleave(len(self.weights))  # of the prompts
        ends = torch.tensor([len(fact[-1].ids) - 1 for fact in facts], device=device)
        starts = torch.cat([replay.batch.starts for replay in self._replays])
        groups = [(self._scored_rows, places + starts[self._scored_rows]), (every, ends + starts[len(prompts) :])]
        self._delta_of_row, self._places = [self._fact_of_row, every], groups
        if len(self._replays) == 1:
            rows, columns = zip(groups[0], (every + len(prompts), groups[1][1]), strict=True)
            self._delta_of_row = [torch.cat(self._delta_of_row)]
            self._places = [(torch.cat(rows), torch.cat(columns))]

    def select(self, facts: Sequence[int], contexts: slice = slice(None)) -> FactBatch:
        """The batch of some of the facts, with some of their contexts."""
        selected, every = copy.copy(self), range(len(self.weights))
        prompts = torch.tensor([i * len(every) + j for i in facts for j in every[contexts]])
        kl_prompts = torch.tensor(facts)
        both = torch.cat([prompts, kl_prompts + self.facts * len(every)])
        groups = [prompts, kl_prompts] if len(self._replays) == 2 else [both]
        selected._replays = [replay.select(rows) for replay, rows in zip(self._replays, groups, strict=True)]
        selected._rows = [[*self._rows[i][:-1][contexts], self._rows[i][-1]] for i in facts]
        selected.weights = self.weights[contexts]
        selected._locate()
        return selected

    def by_context(self, name: str) -> Tensor:
        """An attribute of `BlockReplay` as (facts, contexts, features), float32 on `lm.device`; the KL prompt is left
        out."""
        states = getattr(self._replays[0], name)[: len(self._fact_of_row)].to(self.weights.device)
        return states.view(self.facts, len(self.weights), -1).float()

    def mean(self, name: str) -> Tensor:
        """The share of these contexts in the mean over all of them. (facts, features)"""
        return torch.einsum("fcn,c->fn", self.by_context(name), self.weights)

    def score(self, delta: Tensor, above: int = 0, *, relative: bool = True) -> Scores:
        """Reads the facts with an addition. delta: (sites, facts, hidden); the value matrix's last.

        Args:
            above: in how many layers above the spread over contexts is measured.
            relative: in units of the states' squared length.
        """
        logits, layer = [], self._replays[0].layer
        seen = dict.fromkeys(range(layer + 1, layer + 1 + above), delta)
        for replay, facts, places in zip(self._replays, self._delta_of_row, self._places, strict=True):
            *attention, added = (site[facts] for site in delta)
            own = seen if replay is self._replays[0] and seen else None  # the prompts come first
            logits.append(replay(added, *places, attention=attention[0] if attention else None, seen=own).float())
        scored, kl_prompt = logits if len(logits) == 2 else logits[0].split([len(self._scored_rows), self.facts])
        wanted = -cross_entropy(scored, self._targets, reduction="none")  # (n,)
        facts = self._fact_of_row[self._scored_rows]
        zeros = wanted.new_zeros(self.facts)
        weights = (self.weights / self.weights.sum())[self._scored_rows % len(self.weights)]
        nll = zeros.index_add(0, facts, -wanted * self._shares * weights)
        missed = zeros.index_add(0, facts, (scored.detach().argmax(-1) != self._targets).float())
        probability = wanted.new_zeros(len(self._fact_of_row)).index_add(
            0, self._scored_rows, wanted.detach().exp() * self._shares
        )
        lowest = probability.view(self.facts, -1).min(1).values
        states = [each.to(zeros.device)[: len(self._fact_of_row)] for each in seen.values()]
        states = [each.view(self.facts, len(self.weights), -1).float() for each in states]
        spreads = [spread_over_contexts(each, relative=relative) for each in states]
        spread = torch.stack(spreads).mean(0) if spreads else zeros
        return Scores(nll, kl_prompt.log_softmax(-1), lowest, missed == 0, spread)


def split_contexts(
    lm: LM, facts: list[list[EncodedText]], weights: Tensor, layer: int, batches: int
) -> list[FactBatch]:
    """The facts with every `batches`-th context, from the first on, from the second on …"""
    whole, batches = FactBatch(lm, facts, weights, layer), min(batches, len(weights))
    if batches == 1:
        return [whole]
    return [whole.select(range(len(facts)), slice(i, None, batches)) for i in range(batches)]
