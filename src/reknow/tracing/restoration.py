"""Corrupted runs of a prompt in which some states are put back to their clean values: the engine of causal tracing.

A restored run differs from the corrupted one only above the layer and from the token on that it restores, so it
joins there: one pass through the blocks per token carries the runs of all layers and kinds, each from its own layer
on, over the columns from that token on, in one batch with all noise samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from reknow.errors import InputError
from reknow.lm import LM
from reknow.model.head import apply_head
from reknow.model.hooks import by_row, hidden_states, hooked, output_edited
from reknow.model.replay import Call, record_block_calls, select_cache_rows
from reknow.model.scoring import check_logits
from reknow.model.tokens import EncodedText

RestorationKind = Literal["hidden", "mlp", "attention", "mlp_severed", "attention_severed"]
"""What is restored: a block's output, or the MLP's or attention's in a window of layers. Severed: a block's output,
while the token's MLP or attention stays as in the corrupted run in all layers."""

TOKENS_PER_PASS = 8192
"""Rows × columns that one batch of restored runs may have; bounds the memory."""

_ROWS_PER_HEAD = 128
"""Rows whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True)
class Restoration:
    """What one run restores, at one token: the states of a kind in layers `first` to `last`."""

    kind: RestorationKind
    layer: int
    """The column of the table that it fills."""
    first: int
    last: int


def list_restorations(kind: RestorationKind, layers: int, window: int) -> list[Restoration]:
    """One per layer l: l alone, or for MLP and attention the window [l − window/2, l + window/2 − 1] that exists."""
    if kind not in ("mlp", "attention"):
        return [Restoration(kind, layer, layer, layer) for layer in range(layers)]
    below, above = window // 2, (window + 1) // 2 - 1
    return [Restoration(kind, n, max(0, n - below), min(layers - 1, n + above)) for n in range(layers)]


class Prompt:
    """The clean run of a prompt and its corrupted runs, one per noise sample.

    Args:
        row: an encoded prompt without a target, with the places of its subject's tokens.
        noise: what is added to the embeddings of those tokens. (samples, subject tokens, embedding)
        answer: the tokens of the answer whose probability is followed; None: the most likely one.

    Attributes:
        width: tokens of the prompt.
        clean: output of every block, value matrix and attention projection, by name. (1, columns, hidden)
        corrupted: the same in the corrupted runs. (samples, columns, hidden)
        answer: the answer's first token.
        probability, corrupted_probability: of the whole answer; the second is the mean over the samples.
    """

    @torch.no_grad()
    def __init__(self, lm: LM, row: EncodedText, noise: Tensor, answer: Sequence[int] | None = None):
        assert row.subject_first is not None and row.subject_last is not None, "the caller gives a subject"
        self.lm, self.noise = lm, noise.to(lm.device, lm.dtype)
        # An answer's last token predicts nothing that is read.
        self.ids = torch.tensor([[*row.ids, *(answer or ())[:-1]]], device=lm.device)
        self.subject = (row.subject_first, row.subject_last + 1)
        self.samples, self.width, self._columns = len(noise), len(row.ids), self.ids.shape[1]
        self._calls: list[Call] = []
        self._trailing: list[tuple | None] = []
        self.clean, logits = self._record(noised=False)
        self._answer_ids = torch.tensor(answer or [int(logits[0, -1].argmax())], device=logits.device)
        self.answer = int(self._answer_ids[0])
        self.probability = float(self._probability(logits))
        self.corrupted, logits = self._record(noised=True)
        self.corrupted_probability = float(self._probability(logits).mean())

    def _run(self, rows: int, columns: slice, cache: Cache | None, *, noised: bool):
        """A pass over some columns of the prompt, in `rows` equal rows; with noise, row i gets sample i."""
        ids = self.ids[:, columns].expand(rows, -1)
        mask = torch.ones(rows, columns.stop, dtype=torch.long, device=ids.device)
        positions = torch.arange(columns.start, columns.stop, device=ids.device).expand(rows, -1)

        def corrupt(states: Tensor) -> Tensor:
            start, end = (min(max(place, columns.start), columns.stop) for place in self.subject)
            states = states.clone()
            states[:, start - columns.start : end - columns.start] += self.noise[
                :, start - self.subject[0] : end - self.subject[0]
            ]
            return states

        with ExitStack() as stack:
            if noised:
                stack.enter_context(output_edited(self.lm.model.get_input_embeddings(), corrupt))
            kept, whole = min(self._columns - self.width, columns.stop - columns.start - 1) + 1, columns.start == 0
            ends = torch.full((rows,), self.width, device=ids.device) if whole and kept > 1 else None
            return self.lm.forward(ids, mask, positions, cache, ends=ends, logits_to_keep=kept)

    def _probability(self, logits: Tensor) -> Tensor:
        """Probability of the answer in each row. logits: (rows, tokens of the answer, vocabulary); result: (rows,)"""
        wanted = self._answer_ids.to(logits.device).expand(len(logits), -1)[..., None]
        return logits.float().softmax(-1).gather(-1, wanted)[..., 0].prod(-1)

    def _record(self, *, noised: bool) -> tuple[dict[str, Tensor], Tensor]:
        """(states by name, the answer's logits) of a full run; keeps what its blocks were called with."""
        rows = self.samples if noised else 1
        model, parts = self.lm.model, self.lm.parts
        self._calls, self._trailing = [], []
        seen: dict[str, Tensor] = {}

        def keep_call(_module, args, kwargs, output):
            self._calls.append((args, kwargs))
            self._trailing.append(output[1:] if isinstance(output, tuple) else None)

        def keep_states(name: str):
            def hook(_module, _args, output):
                # A copy, since Falcon adds attention's output to the MLP's in place.
                seen[name] = by_row(hidden_states(output), rows).clone()

            return hook

        calls = (
            partial(model.get_submodule(name).register_forward_hook, keep_call, with_kwargs=True)
            for name in parts.blocks
        )
        states = (
            partial(model.get_submodule(name).register_forward_hook, keep_states(name))
            for name in (*parts.blocks, *parts.value, *parts.attention_out)
        )
        with hooked(*calls, *states):
            logits = self._run(rows, slice(0, self._columns), None, noised=noised).logits
        if not bool(check_logits(self.lm, logits).all()):
            raise InputError(
                "expected a model to trace whose logits are numbers; with the applied patches they are NaN: take "
                "them off"
            )
        return seen, logits

    # --- restored runs -----------------------------------------------------------------------------------

    @torch.no_grad()
    def restored(self, columns: Iterable[int], runs: Sequence[Restoration]) -> Iterator[tuple[int, list[float]]]:
        """For every column in ascending order: (column, mean probability of the answer in each run)."""
        first_changed, done = self.subject[0], 0
        cache = DynamicCache(config=self.lm.model.config)
        # A memory decides at the prompt's last token, which blocks by themselves do not show it.
        batched = self.lm.parts.replayable and not self.lm.hooked
        starts: set[tuple[RestorationKind, int]] = {(run.kind, run.first) for run in runs if batched}
        outputs = {start: self._restored_output(*start) for start in starts}
        for column in sorted(columns):
            if column < first_changed:  # nothing was corrupted there
                yield column, [self.corrupted_probability] * len(runs)
                continue
            if not batched:
                yield column, [self.run_full_pass(column, run) for run in runs]
                continue
            if column > done:
                self._run(self.samples, slice(done, column), cache, noised=True)
                done = column
            at_once = max(1, TOKENS_PER_PASS // (self.samples * (self._columns - column)))
            order = sorted(runs, key=lambda run: run.first)
            found: dict[Restoration, float] = {}
            for i in range(0, len(order), at_once):
                found |= self._batched_pass(column, order[i : i + at_once], outputs, cache if column else None)
            yield column, [found[run] for run in runs]

    def _restored_output(self, kind: RestorationKind, layer: int) -> Tensor:
        """Output of block `layer` with what the kind restores there, at every column as if at that one alone.

        Within a block a restored token reaches no other one, so one replay serves all columns.
        (samples or 1, columns, hidden)
        """
        block = self.lm.parts.blocks[layer]
        if kind not in ("mlp", "attention"):
            return self.clean[block]
        matrix = self._matrices(kind)[layer]

        def restore(states: Tensor) -> Tensor:
            return self.clean[matrix].repeat(self.samples, 1, 1).view(states.shape)

        args, kwargs = self._calls[layer]
        with output_edited(self.lm.model.get_submodule(matrix), restore):
            return hidden_states(self.lm.model.get_submodule(block)(*args, **kwargs))

    def _matrices(self, kind: str) -> tuple[str, ...]:
        """Names of the matrices whose output a kind restores or holds, one per layer."""
        return self.lm.parts.value if kind.startswith("mlp") else self.lm.parts.attention_out

    def _batched_pass(
        self,
        column: int,
        runs: Sequence[Restoration],
        outputs: dict[tuple[RestorationKind, int], Tensor],
        cache: Cache | None,
    ) -> dict[Restoration, float]:
        """Runs restored at `column`, in ascending order of their first layer, carried up through all blocks at once.

        The batch holds the noise samples of one run side by side and grows by the runs that join behind each block.
        """
        arguments = self._arguments(len(runs), slice(column, self._columns), cache)
        hidden: Tensor | None = None
        joined = 0
        for layer, block in enumerate(self.lm.parts.blocks):
            if hidden is not None:
                args, kwargs = arguments(layer, joined, hidden)
                with self._hold_states(runs[:joined], layer, column):
                    hidden = hidden_states(self.lm.model.get_submodule(block)(*args, **kwargs))
            batch = [] if hidden is None else [hidden]
            for run in (run for run in runs if run.first == layer):
                state = self.corrupted[block][:, column:].clone()  # (samples, columns, hidden)
                state[:, 0] = outputs[run.kind, layer][:, column]
                batch.append(state if hidden is None else state.to(hidden.device))
                joined += 1
            hidden = torch.cat(batch) if batch else None
        assert hidden is not None and joined == len(runs)
        tokens = len(self._answer_ids)
        chunks = hidden[:, -tokens:].split(max(1, _ROWS_PER_HEAD // tokens))  # (rows, tokens of the answer, hidden)
        logits = (apply_head(self.lm, chunk.flatten(0, 1)).view(len(chunk), tokens, -1) for chunk in chunks)
        probabilities = torch.cat([self._probability(chunk) for chunk in logits])
        means = probabilities.view(len(runs), self.samples).mean(1)
        return dict(zip(runs, means.tolist(), strict=True))

    def _arguments(self, runs: int, columns: slice, cache: Cache | None):
        """A function (layer, runs joined, hidden) → the arguments of that block for so many runs.

        What the model would call its blocks with is asked for once for all runs and once for a single row: tensors
        that differ in length have an entry per row and are cut.
        """
        rows = runs * self.samples
        many, one = (
            record_block_calls(self.lm, lambda n=n: self._run(n, columns, cache, noised=False), self._trailing)
            for n in (rows, 1)
        )
        sample = torch.arange(self.samples, device=self.ids.device)

        def arguments(layer: int, joined: int, hidden: Tensor) -> Call:
            own = select_cache_rows(cache, layer, sample.repeat(joined))

            def cut(value, single):
                if isinstance(value, Cache):
                    return own
                if isinstance(value, tuple):
                    return tuple(cut(v, s) for v, s in zip(value, single, strict=True))
                if not isinstance(value, Tensor) or value.shape == single.shape:
                    return value
                return value[: len(value) * joined // runs]

            (args, kwargs), (lone_args, lone_kwargs) = many[layer], one[layer]
            rest = (cut(value, single) for value, single in zip(args[1:], lone_args[1:], strict=True))
            return (hidden, *rest), {key: cut(value, lone_kwargs[key]) for key, value in kwargs.items()}

        return arguments

    @contextmanager
    def _hold_states(self, runs: Sequence[Restoration], layer: int, column: int):
        """While open, block `layer` computes what the runs restore or hold in it, in the batch's first column."""
        with ExitStack() as stack:
            for kind, severed in (("mlp", "mlp_severed"), ("attention", "attention_severed")):
                restoring = [i for i, run in enumerate(runs) if run.kind == kind and layer <= run.last]
                holding = [i for i, run in enumerate(runs) if run.kind == severed]
                if not restoring and not holding:
                    continue
                matrix = self._matrices(kind)[layer]
                clean = self.clean[matrix][:, column].expand(self.samples, -1)
                corrupted = self.corrupted[matrix][:, column]
                places, states = [*restoring, *holding], [clean] * len(restoring) + [corrupted] * len(holding)

                def put(output: Tensor, places=places, states=states) -> Tensor:
                    found = by_row(output, len(runs) * self.samples).clone()
                    found.view(len(runs), self.samples, *found.shape[1:])[places, :, 0] = torch.stack(states)
                    return found.view(output.shape)

                stack.enter_context(output_edited(self.lm.model.get_submodule(matrix), put))
            yield

    @torch.no_grad()
    def run_full_pass(self, column: int, run: Restoration) -> float:
        """The mean probability of the answer in one restored run, by a full pass of the model: the definition."""
        model, parts = self.lm.model, self.lm.parts

        def put(name: str, source: dict[str, Tensor]):
            def replace(output: Tensor) -> Tensor:
                states = by_row(output, self.samples).clone()
                states[:, column] = source[name][:, column]
                return states.view(output.shape)

            return output_edited(model.get_submodule(name), replace)

        with ExitStack() as stack:
            restored = parts.blocks if run.kind not in ("mlp", "attention") else self._matrices(run.kind)
            for name in restored[run.first : run.last + 1]:
                stack.enter_context(put(name, self.clean))
            if run.kind in ("mlp_severed", "attention_severed"):
                for name in self._matrices(run.kind):
                    stack.enter_context(put(name, self.corrupted))
            logits = self._run(self.samples, slice(0, self._columns), None, noised=True).logits
        return float(self._probability(logits).mean())
