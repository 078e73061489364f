"""The wanted value v* or state z: gradient descent on an addition δ at the subject's last token, batched over facts.

Shared by every locate-then-edit method (ROME, arXiv 2202.05262, eq. 4; MEMIT, arXiv 2210.07229, eq. 16; PMET, arXiv
2308.08742, eq. 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reknow.edits import Edit
from reknow.errors import EditFailed
from reknow.tokens import TOKENS_PER_BATCH, Row, Text
from reknow.trace import Suffix, fused_gelu

if TYPE_CHECKING:
    from reknow.lm import LM

ESSENCE = "{} is a"
"""The prompt whose next-token distribution must not drift: what the subject is."""

SMALL = 64
"""Tokens that a step of the search hardly notices."""

Site = Literal["value", "block"]
"""Where a state is read: the value matrix's output, or the block's where an addition arrives there unchanged."""


@dataclass(frozen=True)
class ValueSearch:
    """How δ is searched; symbols and defaults are ROME's."""

    steps: int = 20
    """Passes of the model; the last one only measures, so that there are `steps - 1` updates."""
    learning_rate: float = 0.5
    """Of Adam; the size of a step of one coordinate, in units that `absolute` names."""
    absolute: bool = True
    """Learning rate and decay as plain numbers, as the papers give them. False: free of the model's scale, the
    learning rate in units of the root mean square of the block's output, the decay on ‖δ‖ / ‖v‖."""
    kl_weight: float = 0.0625
    """Weight of KL(new ‖ old) of the essence prompt."""
    kl_position: Literal["subject", "end"] = "subject"
    """Read that distribution at the subject's last token (the authors' code) or at the prompt's end (the paper)."""
    decay: float = 0.5
    """Weight of ‖δ‖ / ‖v‖², a term of the loss; of ‖δ‖ / ‖v‖ where nothing is `absolute`."""
    clamp: float = 4.0
    """Largest ‖δ‖ / ‖v‖."""
    stop_loss: float = 0.05
    """A fact is finished when its whole loss is below."""
    stop_probability: float = 1.0
    """A fact is finished when its target's tokens have at least this mean probability in every context; 1: never."""
    site: Site = "value"
    """What δ is added to, and measured against: the value matrix's output (ROME) or the block's (MEMIT)."""
    attention: bool = False
    """Search a second addition at attention's output together with δ, and throw it away (PMET)."""
    success_weight: float = 1.0
    """Weight of the likelihood while the target is the likeliest answer in every context (PMET: 0.1)."""
    stop_drift: float | None = None
    """A fact whose target is the likeliest is finished when its weighted KL is not above (PMET: 0.01)."""
    merge_subjects: bool = False
    """One δ for all edits of the same subject (MEMIT-Merge, arXiv 2502.07322)."""


@dataclass(frozen=True)
class Values:
    """What the search found, one row per fact."""

    delta: Tensor  # (facts, hidden), float32
    start: Tensor  # (facts, hidden), what δ is added to, at the bare prompt
    value: Tensor  # (facts, hidden), output of the value matrix at the bare prompt, before any addition
    key: Tensor  # (facts, in), its input there
    mean_value: Tensor  # (facts, hidden), the same as means over all contexts
    mean_key: Tensor  # (facts, in)
    losses: list[list[float]]
    """Per fact: the loss at every pass until it was finished."""

    @property
    def z(self) -> Tensor:
        """The wanted state at the bare prompt. (facts, hidden)"""
        return self.start + self.delta


def find_values(lm: LM, edits: Sequence[Edit], layer: int, contexts: Sequence[str], search: ValueSearch) -> Values:
    """δ for every edit, many facts at a time; the model is left as it is.

    Args:
        contexts: texts to put before the prompt; the first must be "" (the bare prompt).

    Raises:
        EditFailed: the loss is not a number.
    """
    facts = _encode(lm, edits, contexts, search.kl_position)
    owners = _owners(edits, search.merge_subjects)
    parts = _parts(facts, owners)
    found = []
    for part in parts:
        distinct = {owner: i for i, owner in enumerate(dict.fromkeys(owners[i] for i in part))}
        mine = torch.tensor([distinct[owners[i]] for i in part])
        found.append(_find(lm, [facts[i] for i in part], mine, layer, search))
    order = torch.tensor([i for part in parts for i in part]).argsort()
    names = [field.name for field in fields(Values) if field.name != "losses"]
    joined = {name: torch.cat([getattr(values, name) for values in found])[order] for name in names}
    losses = [fact for values in found for fact in values.losses]
    return Values(**joined, losses=[losses[i] for i in order.tolist()])


def _encode(lm: LM, edits: Sequence[Edit], contexts: Sequence[str], kl_position: str) -> list[list[Row]]:
    """Rows of every fact: one per context, then the essence, up to where it is read."""
    texts = []
    for edit in edits:
        assert edit.subject is not None, "methods check that every edit has a subject"
        texts += [Text.of(edit.prompt, edit.subject, edit.target_new, prefix=prefix) for prefix in contexts]
        texts.append(Text.of(ESSENCE, edit.subject))
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


def _owners(edits: Sequence[Edit], merge_subjects: bool) -> list[int]:
    """Per edit the number of its δ: its own, or that of the first edit with its subject."""
    first: dict[str | int, int] = {}
    return [first.setdefault(edit.subject or i if merge_subjects else i, i) for i, edit in enumerate(edits)]


def _parts(facts: list[list[Row]], owners: list[int]) -> list[list[int]]:
    """Indices of facts in batches of at most TOKENS_PER_BATCH tokens, one δ in one batch.

    What is run at every step is as wide as the widest fact of a batch, so other widths open another batch, unless
    the one at hand is so small that its passes cost more than their tokens.
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
        open_still = parts and (sizes[owner][0] == step or len(parts[-1]) * len(facts[0]) * step < SMALL)
        if open_still and (len(parts[-1]) + len(mine)) * len(facts[0]) * wider <= TOKENS_PER_BATCH:
            parts[-1] += mine
            step, width = sizes[owner][0], wider
        else:
            parts.append(list(mine))
            step, width = sizes[owner]
    return parts


@dataclass(frozen=True)
class _Scores:
    """How a batch reads its facts with some δ."""

    nll: Tensor  # (facts,) mean over contexts of the target's mean NLL
    essence: Tensor  # (facts, vocabulary) log distribution
    lowest: Tensor  # (facts,) smallest mean probability of the target's tokens over contexts
    hit: Tensor  # (facts,) whether every token of the target is the likeliest in every context


class _Run:
    """Facts as one batch, run once up to the edited layer."""

    def __init__(self, lm: LM, facts: list[list[Row]], layer: int, search: ValueSearch):
        rows = [row for fact in facts for row in fact]
        anchors = [row.subject_last for row in rows if row.subject_last is not None]
        # The last token of a target predicts nothing that is scored.
        cut = [Row(row.ids[:-1], row.prompt_length) if row.target_ids else row for row in rows]
        batch = lm.pad(cut, anchors)
        self.suffix = Suffix(lm, batch, layer, max(anchors))
        self.facts, self.contexts = len(facts), len(facts[0]) - 1
        scored = [(r, c, t, w) for r, row in enumerate(rows) for c, t, w in _predictions(row)]
        columns = [torch.tensor(column, device=lm.device) for column in zip(*scored, strict=True)]
        self._rows, places, self._targets, self._weights = columns
        self._owners = torch.arange(len(facts), device=lm.device).repeat_interleave(len(facts[0]))
        ends = [len(fact[-1].ids) - 1 for fact in facts]
        self._essence_rows = torch.arange(len(facts), device=lm.device) * len(facts[0]) + self.contexts
        self._columns = places + batch.starts[self._rows]
        self._essence_columns = torch.tensor(ends, device=lm.device) + batch.starts[self._essence_rows]

    def by_fact(self, states: Tensor) -> Tensor:
        """(rows, features) as (facts, contexts, features), float32; the essence is left out."""
        return states.view(self.facts, self.contexts + 1, -1)[:, :-1].float()

    def score(self, delta: Tensor) -> _Scores:
        """delta: (sites, facts, hidden); the value matrix's last."""
        rows = torch.cat([self._rows, self._essence_rows])
        columns = torch.cat([self._columns, self._essence_columns])
        added = [site[self._owners] for site in delta]
        attention = added[0] if len(added) == 2 else None
        logits = self.suffix(added[-1], rows, columns, attention=attention).float()
        scored, essence = logits.split([len(self._rows), self.facts])
        wanted = -cross_entropy(scored, self._targets, reduction="none")  # (n,)
        owners = self._owners[self._rows]
        zeros = wanted.new_zeros(self.facts)
        nll = zeros.index_add(0, owners, -wanted * self._weights / self.contexts)
        missed = zeros.index_add(0, owners, (scored.detach().argmax(-1) != self._targets).float())
        probability = wanted.new_zeros(len(self._owners)).index_add(
            0, self._rows, wanted.detach().exp() * self._weights
        )
        lowest = probability.view(self.facts, -1)[:, :-1].min(1).values
        return _Scores(nll, essence.log_softmax(-1), lowest, missed == 0)


def _predictions(row: Row) -> list[tuple[int, int, float]]:
    """(index of the token that predicts, token predicted, 1 / tokens of the target) of a row's target."""
    wanted = row.target_ids
    return [(row.prompt_length - 1 + i, token, 1 / len(wanted)) for i, token in enumerate(wanted)]


def _find(lm: LM, facts: list[list[Row]], owners: Tensor, layer: int, search: ValueSearch) -> Values:
    """δ of the facts of one batch; fact i is given the addition `owners[i]`."""
    run = _Run(lm, facts, layer, search)
    suffix = run.suffix
    keys, values = run.by_fact(suffix.key), run.by_fact(suffix.value)  # (facts, contexts, …)
    block = search.site == "block" and lm.parts.residual_identity
    start = [run.by_fact(suffix.block)[:, 0] if block else values[:, 0]]
    if search.attention:
        start.insert(0, run.by_fact(suffix.attention)[:, 0])
    with torch.enable_grad(), fused_gelu(lm.model):
        delta, losses = _descend(lm, run, facts, torch.stack(start), owners.to(values.device), layer, search)
    return Values(delta, start[-1], values[:, 0], keys[:, 0], values.mean(1), keys.mean(1), losses)


def _descend(lm: LM, run: _Run, facts, start: Tensor, owners: Tensor, layer: int, search: ValueSearch):
    """(δ per fact at the last site, losses). start: (sites, facts, hidden); owners: (facts,)."""
    count = int(owners.max()) + 1
    sizes = start.norm(dim=2)  # (sites, facts)
    radius = search.clamp * _smallest(sizes, owners, count)  # (sites, δs, 1)
    scale = start.new_ones(1, count, 1)
    if not search.absolute:
        states = run.by_fact(run.suffix.block)[:, 0]  # (facts, hidden)
        scale = _smallest(states.square().mean(1).sqrt()[None], owners, count)
    # Adam's steps have the size of the learning rate whatever the gradient, so δ is searched in units of `scale`.
    scaled = start.new_zeros(len(start), count, start.shape[2], requires_grad=True)
    optimizer = torch.optim.Adam([scaled], lr=search.learning_rate)
    active, essence = torch.arange(len(facts), device=start.device), None
    running = torch.ones_like(active, dtype=torch.bool)  # by fact
    weight = torch.ones_like(sizes[0])
    losses: list[list[float]] = [[] for _ in facts]
    for step in range(search.steps):
        if 2 * int(running.sum()) <= len(active):
            # Finished facts leave: the others' loss does not depend on them.
            active = running.nonzero()[:, 0]
            run = _Run(lm, [facts[i] for i in active.tolist()], layer, search)
        mine = (scale * scaled)[:, owners[active]]
        scores = run.score(mine)
        essence = scores.essence.detach() if essence is None else essence
        new, old = scores.essence, essence[active]
        drift = search.kl_weight * (new.exp() * (new - old)).sum(-1)  # KL(new ‖ old), as in the authors' code
        size = (mine.norm(dim=2) / sizes[:, active] ** (2 if search.absolute else 1)).sum(0)
        loss = weight[active] * scores.nll + drift + search.decay * size
        if not bool(loss.isfinite().all()):
            raise EditFailed(
                "expected a finite loss while searching the value; got NaN or infinity: lower learning_rate"
            )
        for i, value in zip(active.tolist(), loss.tolist(), strict=True):
            if running[i]:
                losses[i].append(value)
        weight[active] = torch.where(scores.hit, search.success_weight, 1.0)
        done = (loss.detach() < search.stop_loss) | (scores.lowest >= search.stop_probability)
        if search.stop_drift is not None:
            done |= scores.hit & (drift.detach() <= search.stop_drift)
        unfinished = torch.zeros(count, dtype=torch.bool, device=start.device).index_fill(
            0, owners[active[~done]], True
        )
        running &= unfinished[owners]
        if step == search.steps - 1 or not bool(running.any()):
            break
        optimizer.zero_grad()
        loss.sum().backward()
        before = scaled.detach().clone()
        optimizer.step()
        with torch.no_grad():
            length = (scale * scaled).norm(dim=2, keepdim=True)
            scaled *= (radius / length.clamp(min=1e-12)).clamp(max=1)
            # Adam's momentum would carry finished facts on.
            finished = owners[~running]
            scaled[:, finished] = before[:, finished]
    return (scale * scaled).detach()[-1, owners], losses


def _smallest(sizes: Tensor, owners: Tensor, count: int) -> Tensor:
    """The smallest size among the facts that share a δ. sizes: (sites, facts); result: (sites, δs, 1)."""
    largest = sizes.new_full((len(sizes), count), torch.inf)
    return largest.scatter_reduce(1, owners.expand_as(sizes), sizes, "amin")[..., None]


def contexts(
    lm: LM, groups: Sequence[tuple[int, int]], *, starts: Sequence[str] = (), seed: int = 0
) -> tuple[str, ...]:
    """Texts to put before a prompt: "" and what the unedited model says of itself, each closed by ". ".

    Args:
        groups: (how many, of how many tokens at most) of each kind; ROME: (10, 5), (10, 10).
        starts: first words; none: the token that begins texts, or ends them.
    """
    memo = ("contexts", tuple(tuple(group) for group in groups), tuple(starts), seed)
    if memo not in lm.memo:
        texts: list[str] = []
        with lm.unpatched():
            for count, tokens in groups:
                opening = [starts[i % len(starts)] if starts else "" for i in range(count)]
                continued = lm.generate(opening, tokens, top_k=5, seed=seed)
                texts += [f"{(a + b).strip()}. " for a, b in zip(opening, continued, strict=True)]
        lm.memo[memo] = ("", *texts)
    return lm.memo[memo]
