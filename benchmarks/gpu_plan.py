"""What MEMIT on many facts costs, derived before it is run: matrix products by phase, tokens, memory.

The derivation follows the search as `reknow.editing` makes it: facts in groups, padded; what rows begin with alike
once for all of them; what else stands left of the subject once, in all blocks; the rest once up to the edited layer,
and in the blocks above it in every pass, forward and back. Frozen weights have no gradient, so that a pass back is as
much work as one forward. Padding is run, as on a GPU; on a CPU most models leave it out. Attention's own two products
are left out, some per cent at these lengths; counted on a CPU the rest is right to the digit
(`tests/test_benchmarks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from reknow import LM, MEMIT, Edit
from reknow.editing.sinks import avoid_sinks
from reknow.editing.value_batch import encode_facts, group_facts, replayed_tokens, token_budget
from reknow.model.beginnings import Beginnings, rows_together
from reknow.model.parts import Conv1D
from reknow.model.tokens import EncodedText, Text, make_batches


@dataclass(frozen=True)
class Rectangle:
    """Padded rows: `left` columns are run once, `right` ones in every pass."""

    rows: int
    left: int
    right: int
    ran: tuple[int, int] = (0, 0)
    """What is run of the left columns: tokens, and rows whose last token goes through the head."""

    @classmethod
    def of(cls, rows: Sequence[EncodedText]) -> Rectangle:
        ends = [len(row.ids) - bool(row.target_ids) for row in rows]
        lasts = [row.subject_last or 0 for row in rows]
        left = max(lasts)
        right = max(end - last for end, last in zip(ends, lasts, strict=True))
        return cls(len(rows), left, right, _run_left([row.ids[:last] for row, last in zip(rows, lasts, strict=True)]))


def _run_left(rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Tokens and rows that `left_cache` runs for these."""
    begun, longest = Beginnings(rows), max(map(len, rows))
    if not longest:
        return 0, 0
    if not begun.worth:
        return len(rows) * longest, len(rows)
    behind = [(len(part), max(begun.missing[i] for i in part)) for part in rows_together(begun.missing)]
    behind = [(count, width) for count, width in behind if width]
    tokens = _begun(begun) + sum(count * width for count, width in behind)
    return tokens, len(begun.texts) + sum(count for count, _ in behind)


def _begun(begun: Beginnings) -> int:
    """Padded tokens of the beginnings; an empty one is run as a token."""
    return len(begun.texts) * max(max(map(len, begun.texts)), 1)


class Sizes:
    """Operations of a model's parts, by token."""

    def __init__(self, lm: LM):
        self.lm, self.layers, self.hidden = lm, lm.layers, lm.parts.hidden_size
        block = lm.model.get_submodule(lm.parts.blocks[0])
        self.block = 2 * sum(m.weight.numel() for m in block.modules() if isinstance(m, (nn.Linear, Conv1D)))
        self.out, self.inside = lm.weight(lm.parts.value[0]).shape
        self.down = 2 * self.out * self.inside
        name, value = lm.parts.value[-1].rpartition(".")[0], lm.model.get_submodule(lm.parts.value[-1])
        mlp = [m for m in lm.model.get_submodule(name).modules() if isinstance(m, (nn.Linear, Conv1D))]
        assert value in mlp
        self.mlp = 2 * sum(m.weight.numel() for m in mlp)
        self.head = 2 * lm.unembedding.numel()


def memit_work(lm: LM, edits: Sequence[Edit], method: MEMIT, layers: Sequence[int]) -> dict:
    """Operations of MEMIT by phase, groups of facts, passes, and the memory at its peak.

    The method has to take all its passes (`stop_probability` 1, `min_delta` 0), and no subject may be a sink.

    Returns:
        `flops` by the phases of `speed_work`; `groups`; `passes` of all groups; `chains` of blocks that they run, two
        for each where the KL prompts run by themselves; `tokens` of the padded facts; `bytes` at the peak, roughly.
    """
    sizes, contexts = Sizes(lm), method.contexts(lm)
    distinct = list(dict.fromkeys(contexts))
    facts = encode_facts(lm, edits, distinct)
    limit, free = token_budget(lm)
    groups = group_facts(facts, list(range(len(facts))), limit, free, method.context_batches)
    once = search = tokens = chains = 0
    searched = 0.0
    above = sizes.layers - layers[-1] - 1
    for group in groups:
        here = [facts[i] for i in group]
        prompts, kl = [row for fact in here for row in fact[:-1]], [fact[-1] for fact in here]
        spared = len(here) * (max(map(replayed_tokens, prompts)) - max(map(replayed_tokens, kl)))
        apart = spared > free
        chains += method.steps * (1 + apart)
        wholes = [Rectangle.of(prompts), Rectangle.of(kl)] if apart else [Rectangle.of(prompts + kl)]
        for whole in wholes:
            ran, ends = whole.ran  # each pass ends with the logits of a row's last token
            once += ran * sizes.layers * sizes.block + whole.rows * whole.right * (layers[-1] + 1) * sizes.block
            once += (ends + whole.rows) * sizes.head
            tokens += whole.rows * (whole.left + whole.right)
        batches = min(method.context_batches, len(distinct))
        for step in range(method.steps):
            some = len(distinct[step % batches :: batches])
            rows = [len(here) * some, len(here)] if apart else [len(here) * (some + 1)]
            read = sum(n * whole.right for n, whole in zip(rows, wholes, strict=True))
            places = [row for fact in here for row in fact[:-1][step % batches :: batches]]
            scored = sum(len(row.target_ids) for row in places) + len(here)
            work = read * (above * sizes.block - sizes.mlp) + scored * (sizes.mlp + sizes.head)
            search += work * (1 if step == method.steps - 1 else 2)
            searched = max(searched, search_bytes(sizes, wholes, rows, scored, above))
    flops = {
        "lower blocks, left columns": once,
        "search of δ": search,
        "keys and states": _reading(lm, edits, contexts, sizes, layers),
        "least squares": len(layers) * _solving(sizes, len(edits)),
    }
    weights = sum(p.nbytes for p in lm.model.parameters()) + 8 * len(layers) * sizes.inside**2
    return {
        "flops": flops,
        "groups": len(groups),
        "passes": len(groups) * method.steps,
        "chains": chains,
        "tokens": tokens,
        "bytes": weights + max(searched, 8 * 4 * len(edits) ** 2),
    }


def search_bytes(sizes: Sizes, wholes: Sequence[Rectangle], rows: Sequence[int], scored: int, above: int) -> float:
    """What the search of a group holds besides the weights, of a decoder like Llama.

    The keys and values of all blocks, and either those once more, while contexts are split, or what a pass keeps for
    its way back: keys and values put together, and of every token it runs about 7 vectors of the model's width and 3
    of the MLP's in every block; and the scored tokens' logits, in float32.

    Args:
        wholes: all rows of the group, in one rectangle or two.
        rows: of each rectangle, how many a pass reads.
        scored: places whose logits it reads.
        above: blocks that it runs.
    """
    item, width = sizes.lm.dtype.itemsize, sizes.hidden
    cache = sum(w.rows * (w.left + w.right) for w in wholes) * 2 * sizes.layers * width * item
    joined = sum(n * (w.left + w.right) for n, w in zip(rows, wholes, strict=True)) * 2 * above * width * item
    run = sum(n * w.right for n, w in zip(rows, wholes, strict=True))
    kept = run * above * (7 * width + 3 * sizes.inside) * item + 4 * scored * len(sizes.lm.unembedding)
    return cache + max(cache, joined + kept)


def _reading(lm: LM, edits: Sequence[Edit], contexts: Sequence[str], sizes: Sizes, layers: Sequence[int]) -> int:
    """Operations of the subjects' keys in every layer, and of their states behind the last one."""
    prefixes = avoid_sinks(lm, edits, contexts)
    texts = [Text.about(edit, prefix) for edit, own in zip(edits, prefixes, strict=True) for prefix in own]
    rows = [row.ids[: (row.subject_last or 0) + 1] for row in lm.encode(texts)]

    def padded(some: list[int]) -> int:
        return sum(len(part) * max(some[i] for i in part) for part in make_batches(some, lm.device))

    begun, whole = Beginnings([row[:-1] for row in rows]), [len(row) for row in rows]
    read = _begun(begun) + padded([missing + 1 for missing in begun.missing]) if begun.worth else padded(whole)
    keys = read * sum((layer + 1) * sizes.block - sizes.down for layer in layers)
    return keys + len(layers) * padded(whole[:: len(contexts)]) * (layers[-1] + 1) * sizes.block


def _solving(sizes: Sizes, facts: int) -> int:
    """Operations of one layer's least squares; triangular systems are not counted."""
    inside = sizes.inside
    products = 2 * facts**2 * inside * 2 if facts <= inside else 2 * facts * inside**2
    written = 2 * sizes.out * facts * inside
    factors = facts * (sizes.out + inside) < sizes.out * inside
    return products + (0 if factors else written)
