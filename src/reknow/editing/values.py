"""The wanted value v* or state z: gradient descent on an addition δ at the subject's last token, batched over facts.

Shared by every locate-then-edit method (ROME, arXiv 2202.05262, eq. 4; MEMIT, arXiv 2210.07229, eq. 16; PMET, arXiv
2308.08742, eq. 10).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from reknow.editing.value_batch import Run, Scores, dealt, encode_facts, parts_of, room
from reknow.edits import Edit
from reknow.model.exact import finite_loss
from reknow.model.hooks import fused_gelu
from reknow.model.tokens import Row
from reknow.progress import stage, told
from reknow.texts.writing import full_stop

if TYPE_CHECKING:
    from reknow.lm import LM

Site = Literal["value", "block"]
"""Where a state is read: the value matrix's output, or the block's where an addition arrives there unchanged."""

BEHIND_NORM = 0.5
"""The unit of a step in root mean squares of what δ is added to, where that does not reach the block's output
unchanged. Whole ones cost Gemma 3 5 points of locality and 6 of NS, for 8 more of generalization (docs/log.md)."""

HALF = 4
"""Passes, at least, whose mean loss is set against that of as many before, to read off what a pass gains."""


@dataclass(frozen=True)
class ValueSearch:
    """How δ is searched; symbols and defaults are ROME's."""

    steps: int = 20
    """Passes of the model; the last one only measures, so that there are `steps - 1` updates."""
    learning_rate: float = 0.5
    """Of Adam; the size of a step of one coordinate, in units that `units` names."""
    units: Literal["relative", "absolute"] = "absolute"
    """`absolute`: learning rate and decay as plain numbers, as the papers give them, ‖v‖ of the bare prompt.
    `relative`: free of the model's scale, the learning rate in units of the root mean square of the block's output,
    or of half that of what δ is added to where that does not reach it unchanged; the decay on ‖δ‖ / ‖v‖; all of them
    medians over the contexts."""
    kl_weight: float = 0.0625
    """Weight of KL(new ‖ old) of the essence prompt."""
    kl_position: Literal["subject", "end"] = "subject"
    """Read that distribution at the subject's last token (the authors' code) or at the prompt's end (the paper)."""
    weight_decay: float = 0.5
    """Weight of ‖δ‖ / ‖v‖², a term of the loss; of ‖δ‖ / ‖v‖ where units are `relative`."""
    clamp: float = 4.0
    """Largest ‖δ‖ / ‖v‖."""
    stop_loss: float = 0.05
    """A fact is finished when its whole loss is below."""
    stop_probability: float = 1.0
    """A fact is finished when its target's tokens have at least this mean probability in every context; 1: never."""
    min_delta: float = 0.0
    """A fact whose target is the likeliest is finished when its loss falls by less than this per pass; 0: never."""
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
    context_batches: int = 1
    """The contexts are dealt into so many hands, and each pass reads the next one: less work per pass."""


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
    distinct = dict.fromkeys(contexts, 0.0)  # sampled texts are alike now and then
    for context in contexts:
        distinct[context] += 1 / len(contexts)
    facts = encode_facts(lm, edits, list(distinct), search.kl_position)
    weights = torch.tensor(list(distinct.values()), device=lm.device)
    owners = _owners(edits, search.merge_subjects)
    parts = parts_of(facts, owners, *room(lm))
    found = []
    for part in parts:
        numbers = {owner: i for i, owner in enumerate(dict.fromkeys(owners[i] for i in part))}
        mine = torch.tensor([numbers[owners[i]] for i in part])
        found.append(_find(lm, [facts[i] for i in part], weights, mine, layer, search))
    order = torch.tensor([i for part in parts for i in part]).argsort()
    names = [field.name for field in fields(Values) if field.name != "losses"]
    joined = {name: torch.cat([getattr(values, name) for values in found])[order] for name in names}
    losses = [fact for values in found for fact in values.losses]
    return Values(**joined, losses=[losses[i] for i in order.tolist()])


def _owners(edits: Sequence[Edit], merge_subjects: bool) -> list[int]:
    """Per edit the number of its δ: its own, or that of the first edit with its subject."""
    first: dict[str | int, int] = {}
    return [first.setdefault(edit.subject or i if merge_subjects else i, i) for i, edit in enumerate(edits)]


def _find(lm: LM, facts: list[list[Row]], weights: Tensor, owners: Tensor, layer: int, search: ValueSearch) -> Values:
    """δ of the facts of one batch; fact i is given the addition `owners[i]`."""

    def bare(name: str) -> Tensor:
        return hands[0].by_fact(name)[:, 0]  # (facts, features)

    def mean(name: str) -> Tensor:
        return sum((hand.mean(name) for hand in hands), torch.tensor(0.0))

    def length(name: str) -> Tensor:  # one context that is out of the common does not count
        return torch.cat([hand.by_fact(name).norm(dim=2) for hand in hands], 1).median(1).values  # (facts,)

    with fused_gelu(lm.model):
        hands = dealt(lm, facts, weights, layer, search.context_batches)
        block = search.site == "block" and lm.parts.residual_identity
        sites = (["attention"] if search.attention else []) + ["block" if block else "value"]
        start = torch.stack([bare(site) for site in sites])  # (sites, facts, hidden)
        sizes, units = start.norm(dim=2), torch.ones_like(start[..., 0])  # (sites, facts)
        if search.units == "relative":
            # A norm behind the MLP gives δ another size than the block's output has.
            arrives = lm.parts.residual_identity
            measured = ["block"] * len(sites) if arrives else sites
            sizes = torch.stack([length(site) for site in sites])
            units = torch.stack([length(name) for name in measured]) / start.shape[2] ** 0.5
            units *= 1 if arrives else BEHIND_NORM
        with torch.enable_grad():
            delta, losses = _descend(hands, sizes, units, start.shape[2], owners.to(start.device), search)
    return Values(delta, start[-1], bare("value"), bare("key"), mean("value"), mean("key"), losses)


def _descend(hands: list[Run], sizes: Tensor, units: Tensor, width: int, owners: Tensor, search: ValueSearch):
    """(δ per fact at the last site, losses).

    Args:
        sizes: ‖v‖, what lengths of δ are relative to. (sites, facts)
        units: of the learning rate. (sites, facts)
        width: of δ.
        owners: (facts,)
    """
    count = int(owners.max()) + 1
    radius = search.clamp * _smallest(sizes, owners, count)  # (sites, δs, 1)
    scale = _smallest(units, owners, count)  # (sites, δs, 1)
    # Adam's steps have the size of the learning rate whatever the gradient, so δ is searched in units of `scale`.
    scaled = sizes.new_zeros(len(sizes), count, width, requires_grad=True)
    optimizer = torch.optim.Adam([scaled], lr=search.learning_rate)
    active, essence = torch.arange(len(owners), device=owners.device), None
    running = torch.ones_like(active, dtype=torch.bool)  # by fact
    weight, calm = torch.ones_like(sizes[0]), torch.zeros_like(active)
    losses: list[list[float]] = [[] for _ in owners]
    for step in range(search.steps):
        if 4 * int(running.sum()) <= 3 * len(active):
            # Finished facts leave: the others' loss does not depend on them.
            hands = [hand.keep(running[active].nonzero()[:, 0].tolist()) for hand in hands]
            active = running.nonzero()[:, 0]
        mine = (scale * scaled)[:, owners[active]]
        scores = hands[step % len(hands)].score(mine)
        essence = scores.essence.detach() if essence is None else essence
        new, old = scores.essence, essence[active]
        drift = search.kl_weight * (new.exp() * (new - old)).sum(-1)  # KL(new ‖ old), as in the authors' code
        size = (mine.norm(dim=2) / sizes[:, active] ** (2 if search.units == "absolute" else 1)).sum(0)
        loss = weight[active] * scores.nll + drift + search.weight_decay * size
        finite_loss(loss.sum())
        for i, value in zip(active.tolist(), loss.tolist(), strict=True):
            if running[i]:
                losses[i].append(value)
        told(step, search.steps, float(loss.detach().mean()))
        weight[active] = torch.where(scores.hit, search.success_weight, 1.0)
        so_far = [losses[i] for i in active.tolist()]
        done = _satisfied(search, loss.detach(), drift.detach(), scores, so_far, len(hands))
        calm[active] = torch.where(done, calm[active] + 1, 0)
        done = calm[active] >= len(hands)
        unfinished = torch.zeros(count, dtype=torch.bool, device=owners.device).index_fill(
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


def _satisfied(
    search: ValueSearch, loss: Tensor, drift: Tensor, scores: Scores, so_far: list[list[float]], hands: int
) -> Tensor:
    """Which facts of a pass have what the search is for; `so_far`: each one's losses, this pass's too. (facts,)"""
    done = (loss < search.stop_loss) | (scores.lowest >= search.stop_probability)
    if search.stop_drift is not None:
        done |= scores.hit & (drift <= search.stop_drift)
    if search.min_delta > 0:
        gain = loss.new_tensor([_gain(losses, hands) for losses in so_far])
        done |= scores.hit & (gain < search.min_delta)
    return done


def _gain(losses: list[float], hands: int) -> float:
    """By how much a fact's loss falls from pass to pass, read off its last passes; infinite while they are too few.

    Hands differ, so both halves of what is read are whole rounds of them.
    """
    half = hands * math.ceil(HALF / hands)
    before, last = losses[-2 * half : -half], losses[-half:]
    return (sum(before) - sum(last)) / half**2 if len(before) == half else math.inf


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

    def sampled() -> tuple[str, ...]:
        texts: list[str] = []
        with lm.unpatched(), stage("writing contexts, groups", len(groups)) as advance:
            for count, tokens in groups:
                opening = [starts[i % len(starts)] if starts else "" for i in range(count)]
                continued = lm.generate(opening, tokens, top_k=5, seed=seed)
                said = [(a + b).strip() for a, b in zip(opening, continued, strict=True)]
                texts += [f"{text}{full_stop(text)} " for text in said]
                advance()
        return ("", *texts)

    return lm.cached(("contexts", tuple(tuple(group) for group in groups), tuple(starts), seed), sampled)
