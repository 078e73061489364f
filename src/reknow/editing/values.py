"""The wanted value v* or state z: gradient descent on an addition δ at the subject's last token.

Shared by every locate-then-edit method (ROME, arXiv 2202.05262, eq. 4; MEMIT, arXiv 2210.07229, eq. 16; PMET, arXiv
2308.08742, eq. 10). With v what δ is added to, v* = v + δ, and δ minimises by Adam, within ‖δ‖ ≤ clamp · ‖v‖,

    L(δ) = mean over contexts of  − 1/T Σ_t log P(target_t | context, prompt, target_<t; δ)
         + kl_weight · KL( P(· | "{subject} is a"; δ) ‖ P(· | "{subject} is a"; 0) )
         + weight_decay · ‖δ‖ / ‖v‖

With `units="absolute"` the last term is weight_decay · ‖δ‖ / ‖v‖², as in the papers. `context_variance` adds CoRE's
term (`value_batch.spread_over_contexts`). Where a norm follows the value matrix (`parts.value_normed`) only the
direction of v* counts, and ‖v*‖ = ‖v‖ is kept (`turn`), again but for `units="absolute"`. `value_loss` is the
equation, `_descend` the loop around it, `Convergence` says when a fact is finished, and `value_batch` how facts are
read: a group of them at a time, with one batch of the contexts in every pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reknow.editing.search import ValueSearchMethod
from reknow.editing.value_batch import (
    FactBatch,
    Scores,
    check_reach,
    group_facts,
    number_of_batches,
    of_like_weights,
    split_contexts,
    token_budget,
    weighted_rows,
)
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.lm import LM
from reknow.model.exact import finite_loss
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import EncodedText
from reknow.progress import progress

__all__ = ["Convergence", "Values", "decrease_per_pass", "find_values", "turn", "value_loss"]

_BEHIND_NORM = 0.5
"""The unit of a step in root mean squares of what δ is added to, where that does not reach the block's output
unchanged. Whole ones cost Gemma 3 5 points of locality and 6 of NS, for 8 more of generalization (docs/log.md)."""

_WINDOW = 4
"""Passes, at least, whose mean loss is set against that of as many before, to see what a pass gains."""


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

    def of(self, i: int) -> Values:
        """Those of fact i alone."""
        own = {name: getattr(self, name)[i : i + 1] for name in (field.name for field in fields(self))}
        return Values(**own)


def find_values(
    lm: LM,
    edits: Sequence[Edit],
    layer: int,
    contexts: Sequence[str],
    method: ValueSearchMethod,
    *,
    apart: bool = False,
) -> Values:
    """δ for every edit, many facts at a time; the model is left as it is.

    Args:
        contexts: texts to put before the prompt; the first must be "" (the bare prompt).
        apart: each edit is for a patch of its own, so that none has its δ from another of its subject.

    Raises:
        InputError: settings by which nothing is searched, or a term of the loss has nothing to count.
        EditRefused: no answer sees what is added at that layer.
        EditFailed: the loss is not a number.
    """
    index = _delta_index(edits, method.rules.merge_subjects and not apart)
    method.check_search(lm, layer)
    facts, weights = weighted_rows(lm, edits, contexts, rephrased=method.rephrased)
    if layer == lm.layers - 1:
        check_reach(edits, facts, layer)
    groups = []
    for alike in of_like_weights(weights):
        some = group_facts(
            [facts[i] for i in alike], [index[i] for i in alike], *token_budget(lm), method.context_batches
        )
        groups += [[alike[i] for i in group] for group in some]
    found = []
    for group in progress.each("searching", groups, unit="groups of facts", parts=1):
        _, own_index = torch.tensor([index[i] for i in group]).unique(return_inverse=True)
        own_weights = torch.tensor(weights[group[0]], device=lm.device)
        found.append(_search_group(lm, [facts[i] for i in group], own_weights, own_index, layer, method))
    order = torch.tensor([i for group in groups for i in group]).argsort()
    names = [field.name for field in fields(Values) if field.name != "losses"]
    device = lm.device_of(lm.parts.value[layer])  # the search was where logits are
    joined = {name: torch.cat([getattr(values, name) for values in found])[order].to(device) for name in names}
    losses = [fact for values in found for fact in values.losses]
    return Values(**joined, losses=[losses[i] for i in order.tolist()])


def _delta_index(edits: Sequence[Edit], merge_subjects: bool) -> list[int]:
    """Per edit the number of its δ: its own, or that of the first edit with its subject."""
    first: dict[str | int, int] = {}
    return [first.setdefault(edit.subject or i if merge_subjects else i, i) for i, edit in enumerate(edits)]


def _search_group(
    lm: LM, facts: list[list[EncodedText]], weights: Tensor, index: Tensor, layer: int, method: ValueSearchMethod
) -> Values:
    """The values of a group of facts; fact i is given the addition `index[i]`."""

    def bare(name: str) -> Tensor:
        return context_batches[0].by_context(name)[:, 0]  # (facts, features)

    def mean(name: str) -> Tensor:
        return sum((batch.mean(name) for batch in context_batches), torch.tensor(0.0))

    number = number_of_batches(facts, method.context_batches)
    if method.context_variance:  # contexts of one pass are compared
        if (contexts := len(facts[0]) - 1) < 2:
            raise InputError(
                "expected two contexts for context_variance; got one: set context_groups, or leave it out"
            )
        number = min(number, contexts // 2)
    context_batches = split_contexts(lm, facts, weights, layer, number)
    site = method.rules.site if lm.parts.residual_identity else "value"
    sites = ["attention", site] if method.rules.moves_attention else [site]
    start = torch.stack([bare(name) for name in sites])  # (sites, facts, hidden)
    if method.units == "absolute":
        sizes, units = start.norm(dim=2), start.new_ones(start.shape[:2])
    else:
        sizes, units = _relative_units(context_batches, sites, lm.parts.residual_identity)
    sphere = start[-1] if lm.parts.value_normed and method.units == "relative" else None
    with torch.enable_grad():
        delta, losses = _descend(context_batches, sizes, units, index.to(start.device), method, sphere)
    return Values(delta, start[-1], bare("value"), bare("key"), mean("value"), mean("key"), losses)


def _relative_units(
    context_batches: list[FactBatch], sites: list[str], residual_identity: bool
) -> tuple[Tensor, Tensor]:
    """(‖v‖, root mean square of what a step is measured by) of every fact, (sites, facts) each."""

    def length(name: str) -> Tensor:  # one context that is out of the common does not count
        return torch.cat([batch.by_context(name).norm(dim=2) for batch in context_batches], 1).median(1).values

    sizes = torch.stack([length(site) for site in sites])
    if residual_identity:
        return sizes, torch.stack([length("block") for _ in sites]) / context_batches[0].width ** 0.5
    # A norm behind the MLP gives δ another size than the block's output has.
    return sizes, sizes / context_batches[0].width ** 0.5 * _BEHIND_NORM


def value_loss(
    delta: Tensor, scores: Scores, unedited: Tensor, sizes: Tensor, nll_weight: Tensor, method: ValueSearchMethod
) -> tuple[Tensor, Tensor]:
    """L(δ) of this module's equation, and its KL term by itself. (facts,) each

    Args:
        delta: δ of every fact at every place where one is added. (sites, facts, hidden)
        scores: how the facts are read with it.
        unedited: log P(· | "{subject} is a"; 0). (facts, vocabulary)
        sizes: ‖v‖. (sites, facts)
        nll_weight: 1, but PMET's once it has the answer. (facts,)
    """
    drift = method.kl_weight * kl_divergence(scores.kl_prompt, unedited)
    length = (delta.norm(dim=2) / sizes ** (2 if method.units == "absolute" else 1)).sum(0)
    variance = method.context_variance * scores.spread
    return nll_weight * scores.nll + drift + method.weight_decay * length + variance, drift


def _descend(
    context_batches: list[FactBatch],
    sizes: Tensor,
    units: Tensor,
    index: Tensor,
    method: ValueSearchMethod,
    sphere: Tensor | None = None,
) -> tuple[Tensor, list[list[float]]]:
    """(δ of every fact at the last site, losses): Adam on δ, each pass with the next batch of contexts.

    Args:
        sizes: ‖v‖. (sites, facts)
        units: of the learning rate. (sites, facts)
        index: number of each fact's δ. (facts,)
        sphere: v of every fact, whose length v + δ keeps; None: it has any. (facts, hidden)
    """
    convergence, count = Convergence(index.cpu(), len(context_batches), method), int(index.max()) + 1
    radius, unit = method.clamp * _smallest(sizes, index, count), _smallest(units, index, count)  # (sites, δs, 1)
    if sphere is not None:  # that of the first fact of each δ
        numbers = torch.arange(len(index), device=index.device)
        sphere = sphere[numbers.new_full((count,), len(index)).scatter_reduce(0, index, numbers, "amin")]
    relative, above = method.units == "relative", method.variance_layers if method.context_variance else 0
    # Adam's steps have the size of the learning rate whatever the gradient, so δ is searched in its units.
    scaled = sizes.new_zeros(len(sizes), count, context_batches[0].width, requires_grad=True)
    optimizer, unedited = torch.optim.Adam([scaled], lr=method.learning_rate), None
    for step in progress.each("finding values", range(method.steps), unit="passes", parts=1):
        if (left := convergence.drop_finished()) is not None:
            context_batches = [batch.select(left) for batch in context_batches]
        read = convergence.read.to(index.device)
        weight = convergence.nll_weight[convergence.read].to(index.device)
        delta = (unit * scaled)[:, index[read]]  # (sites, facts read, hidden)
        scores = context_batches[step % len(context_batches)].score(delta, above, relative=relative)
        unedited = scores.kl_prompt.detach() if unedited is None else unedited
        loss, drift = value_loss(delta, scores, unedited[read], sizes[:, read], weight, method)
        # The one place of a pass that waits for a GPU.
        passed = torch.stack([loss.detach(), drift.detach(), scores.probability, scores.predicted.float()]).cpu()
        finite_loss(passed[0].sum())
        progress.note(f"loss {float(passed[0].mean()):.3g}")
        convergence.record(passed[0], passed[1], passed[2], passed[3].bool())
        if step == method.steps - 1 or not bool(convergence.running.any()):
            break
        finished = convergence.finished.to(index.device)  # Adam's momentum would carry them on
        before = scaled.detach()[:, finished]
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        with torch.no_grad():
            scaled *= (radius / (unit * scaled).norm(dim=2, keepdim=True).clamp(min=1e-12)).clamp(max=1)
            if sphere is not None:
                scaled[-1] = turn(sphere, (unit * scaled)[-1], radius[-1]) / unit[-1]
            scaled[:, finished] = before
    return (unit * scaled).detach()[-1, index], convergence.losses


def turn(value: Tensor, delta: Tensor, radius: Tensor) -> Tensor:
    """The addition that gives v + δ the length of v, and its own direction as far as ‖δ‖ ≤ `radius` allows.

    Behind a norm the gradient is orthogonal to v + δ, but a step of Adam is not, and lengthens v + δ again and again
    (Heo et al. 2021, arXiv 2006.08217): nothing for the answer, and all the more for whatever has a part of the key.

    Args:
        value, delta: (n, hidden).
        radius: (n, 1).
    """
    length, wanted = value.norm(dim=1, keepdim=True).clamp(min=1e-12), value + delta
    axis = value / length
    along = (wanted * axis).sum(1, keepdim=True)
    across = wanted - along * axis
    width = across.norm(dim=1, keepdim=True)
    angle = torch.minimum(torch.atan2(width, along), 2 * torch.asin((radius / (2 * length)).clamp(max=1)))
    return length * (torch.cos(angle) * axis + torch.sin(angle) * across / width.clamp(min=1e-12)) - value


def _smallest(sizes: Tensor, index: Tensor, count: int) -> Tensor:
    """The smallest size among the facts that share a δ. sizes: (sites, facts); result: (sites, δs, 1)."""
    infinite = sizes.new_full((len(sizes), count), torch.inf)
    return infinite.scatter_reduce(1, index.expand_as(sizes), sizes, "amin")[..., None]


class Convergence:
    """Which facts of a group are still searched: a fact is finished when every batch of its contexts in turn was
    read as it should be, and facts that share a δ are finished together. All of it lies on the CPU.

    Args:
        index: number of each fact's δ. (facts,)
        context_batches: into how many the contexts are split.

    Attributes:
        losses: per fact, of every pass until it was finished.
        running: which facts are not finished. (facts,), boolean
        read: indices of the facts that are read: those that run, and of late those that did. (facts read,)
        nll_weight: of each fact's likelihood in the next pass. (facts,)
    """

    def __init__(self, index: Tensor, context_batches: int, method: ValueSearchMethod):
        self._index, self._context_batches, self._method = index, context_batches, method
        self.losses: list[list[float]] = [[] for _ in index]
        self.read = torch.arange(len(index))
        self.running = torch.ones_like(self.read, dtype=torch.bool)
        self.nll_weight = torch.ones_like(self.read, dtype=torch.float32)
        self._satisfied = torch.zeros_like(self.read)  # consecutive passes that satisfied the fact, up to the last

    def drop_finished(self) -> list[int] | None:
        """Places of the running facts among those that are read, which they are alone from now on, once a quarter is
        finished; None before. The others' loss does not depend on those that leave."""
        if 4 * int(self.running.sum()) > 3 * len(self.read):
            return None
        left = self.running[self.read].nonzero()[:, 0].tolist()
        self.read = self.running.nonzero()[:, 0]
        return left

    @property
    def finished(self) -> Tensor:
        """Numbers of the δs that move no more, one for every fact of theirs."""
        return self._index[~self.running]

    def record(self, loss: Tensor, drift: Tensor, probability: Tensor, predicted: Tensor) -> None:
        """Takes note of a pass: per fact that is read the loss, its KL term, and the rest as in `Scores`."""
        running = self.running.tolist()
        for i, value in zip(self.read.tolist(), loss.tolist(), strict=True):
            if running[i]:
                self.losses[i].append(value)
        self.nll_weight[self.read] = torch.where(predicted, self._method.rules.success_weight, 1.0)
        satisfied = self._ends(loss, drift, probability, predicted)
        self._satisfied[self.read] = torch.where(satisfied, self._satisfied[self.read] + 1, 0)
        unfinished = self.read[self._satisfied[self.read] < self._context_batches]
        open_deltas = torch.zeros_like(self.running).index_fill(0, self._index[unfinished], True)
        self.running &= open_deltas[self._index]

    def _ends(self, loss: Tensor, drift: Tensor, probability: Tensor, predicted: Tensor) -> Tensor:
        """Which of the facts that are read have what the search is for. (facts read,), boolean"""
        method, rules = self._method, self._method.rules
        ends = (loss < rules.stop_loss) | (probability >= method.stop_probability)
        if rules.stop_drift is not None:
            ends |= predicted & (drift <= rules.stop_drift)
        if method.min_delta > 0:
            gains = [decrease_per_pass(self.losses[i], self._context_batches) for i in self.read.tolist()]
            ends |= predicted & (loss.new_tensor(gains) < method.min_delta)
        return ends


def decrease_per_pass(losses: list[float], context_batches: int) -> float:
    """By how much a fact's loss falls from pass to pass, read off its last passes; infinite while they are too few.

    Batches of contexts differ, so both halves of what is compared are whole rounds of them.
    """
    half = context_batches * math.ceil(_WINDOW / context_batches)
    before, last = losses[-2 * half : -half], losses[-half:]
    return (sum(before) - sum(last)) / half**2 if len(before) == half else math.inf
