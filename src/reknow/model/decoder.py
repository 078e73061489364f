"""What everything that runs a model knows of it: a decoder, its tokenizer, its parts, and how a pass is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reknow.errors import InputError, ModelError, TextRefused
from reknow.model.chat import Chat
from reknow.model.exclusive import exclusive, exclusively
from reknow.model.fast_modules import fast_modules
from reknow.model.forward_context import RunningPass
from reknow.model.hooks import by_row, recorded
from reknow.model.parts import Parts, accepts_positions, device_of, embedding_matrix, find_parts
from reknow.model.tokens import Batch, EncodedText, Text, encode, make_batches, pad
from reknow.progress import progress

_T = TypeVar("_T")


class ModuleStates(NamedTuple):
    """What modules took in and gave out at one token of every row: name → (rows, features)."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Decoder(ABC):
    """A wrapped decoder. `LM`, the one class of this kind, adds scores, texts and the stack of patches.

    Attributes:
        name: what messages call the model.
        chat: prompts are put into the tokenizer's chat template.
        parts: where its matrices are.
        running: what is known of the pass that runs.
        progress: who hears how far a long work is.
        memo: see `cached`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str, chat: Chat | None):
        self.model, self.tokenizer, self.name, self.chat = model, tokenizer, name, chat
        self.model.requires_grad_(False).eval()
        self.model.config.return_dict = True  # outputs are read by name
        self.memo: dict[tuple, Any] = {}
        self.running = RunningPass()
        self.progress = progress
        self.parts: Parts = find_parts(self.model)
        self._takes_positions = accepts_positions(self.model)

    # --- structure ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self.model.get_input_embeddings(), self.model.device)

    def device_of(self, name: str) -> torch.device:
        """Where the module of that name computes, which is elsewhere where layers are spread over several devices."""
        return device_of(self.model.get_submodule(name), self.device)

    @property
    def dtype(self) -> torch.dtype:
        return embedding_matrix(self.model).dtype

    @property
    def layers(self) -> int:
        return len(self.parts.blocks)

    @property
    def max_tokens(self) -> int | None:
        """How many tokens a text may have; None: any number."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def check_layer(self, layer: int) -> int:
        """The layer itself; raises InputError where the model has none of that number."""
        if not isinstance(layer, int) or not 0 <= layer < self.layers:
            raise InputError(f"expected a layer from 0 to {self.layers - 1}; got {layer}: {self.name} has no other")
        return layer

    def mlp_in(self, layer: int) -> tuple[str, ...]:
        """Names of the matrices that read the stream into the MLP of a layer.

        Raises:
            ModelError: the layer is a mixture of experts.
        """
        if names := self.parts.mlp_in[layer]:
            return names
        raise ModelError(
            f"expected a layer with a dense MLP, for its matrices that read the stream; layer {layer} of {self.name} "
            "is a mixture of experts, which are fused: change the value matrix, as rome, memit and ft do"
        )

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """The current weight of the matrix `name`, seen as (out, in)."""

    @property
    def unembedding(self) -> Tensor:
        """The current matrix that makes logits of final states. (vocabulary, features)"""
        head = self.model.get_output_embeddings()
        return self.weight(next(name for name, module in self.model.named_modules() if module is head))

    @property
    @abstractmethod
    def hooked(self) -> bool:
        """Whether a memory is applied that changes what modules compute, beyond what the weights say."""

    @property
    @abstractmethod
    def patched_now(self) -> bool:
        """Whether any patch is applied."""

    def cached(self, key: tuple, make: Callable[[], _T], *, budget: int | None = None) -> _T:
        """What `make` gives, computed once for this model; the key holds everything that it depends on.

        Args:
            budget: how many bytes tensors under keys with the same first part may take together; the oldest go.
        """
        if key in self.memo:
            return self.memo[key]
        value = self.memo[key] = make()
        if budget is not None:
            kept = [other for other in self.memo if other[0] == key[0]]
            while sum(self.memo[other].nbytes for other in kept) > budget:
                del self.memo[kept.pop(0)]
        return value

    # --- running -----------------------------------------------------------------------------------------

    @exclusively
    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, *, ends: Tensor | None = None, **options: Any
    ):
        """One pass of the model.

        Args:
            ids: (rows, columns) tokens.
            mask: (rows, columns) 1 on real tokens, 0 on padding.
            positions: (rows, columns) of each token in its text.
            cache: key/value cache, or None to run without.
            ends: (rows,) column behind each prompt's last token, for memories; None: all text is the prompt.
            **options: `logits_to_keep`, how many of the last columns get logits.
        """
        if "logits_to_keep" in options:  # as a slice the head would be multiplied row by row
            options["logits_to_keep"] = torch.arange(-options["logits_to_keep"], 0)
        if self._takes_positions:
            options["position_ids"] = positions
        self.running.ends = ends
        try:
            with fast_modules(self.model):
                return self.model(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None, **options
                )
        finally:
            self.running.ends = None

    @exclusively
    def encode(self, texts: Sequence[Text]) -> list[EncodedText]:
        """Tokens of the texts, each with the place of its parts; ModelError where the embedding lacks one."""
        rows = encode(self.tokenizer, texts, chat=self.chat or False)
        self._check_ids(rows)
        return rows

    def pad(self, rows: Sequence[EncodedText], anchors: Sequence[int] | None = None) -> Batch:
        """The rows as one rectangle on the model's device; see `tokens.pad`.

        Raises:
            TextRefused: a row is longer than what the model has positions for.
            ModelError: it has a token for which the embedding has no row.
        """
        self.check_length(rows)
        self._check_ids(rows)
        own = self.tokenizer.pad_token_id  # what pads is masked, so that any token will do
        pad_id = own if own is not None and own < len(embedding_matrix(self.model)) else 0
        return pad(rows, pad_id, anchors=anchors, device=self.device)

    def check_length(self, rows: Sequence[EncodedText], extra: int = 0) -> None:
        """Raises TextRefused where a row and `extra` tokens behind it do not fit into the model's positions."""
        longest = max((len(row.ids) for row in rows), default=0) + extra
        if self.max_tokens is not None and longest > self.max_tokens:
            raise TextRefused(
                f"expected texts of at most {self.max_tokens} tokens, for which {self.name} has positions; got "
                f"{longest}{' with what is to be written' if extra else ''}: shorten them"
            )

    def _check_ids(self, rows: Sequence[EncodedText]) -> None:
        """Raises ModelError where a row has a token for which the model's embedding has no row."""
        known = len(embedding_matrix(self.model))
        highest = max((max(row.ids) for row in rows), default=0)
        if highest >= known:
            raise ModelError(
                f"expected token ids below {known}, the rows of the embedding of {self.name}; got {highest}, "
                f"the token {self.tokenizer.convert_ids_to_tokens(highest)!r}: call "
                "model.resize_token_embeddings(len(tokenizer)), or use the tokenizer that the model was trained with"
            )

    @exclusively
    @torch.no_grad()
    def read(
        self,
        rows: Sequence[EncodedText],
        columns: Sequence[int],
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
    ) -> ModuleStates:
        """Inputs and outputs of modules at one token of every row.

        Args:
            rows: encoded texts.
            columns: index of the wanted token in each row.
            inputs: names of modules whose inputs are wanted; the pass stops behind the last module.
            outputs: names of modules whose outputs are.

        Returns:
            `inputs` and `outputs`, each of the modules named there.
        """
        found = [defaultdict[str, list[Tensor]](list) for _ in ModuleStates._fields]
        parts = make_batches([len(row.ids) for row in rows], self.device)
        for part in progress.each("reading states", parts, unit="batches"):
            batch = self.pad([rows[i] for i in part], anchors=[columns[i] for i in part])
            column = max(columns[i] for i in part)
            with recorded(self.model, inputs, outputs, stop=True) as seen:
                self.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends)
            for kept, states_of in zip(found, seen, strict=True):
                for name, states in states_of.items():
                    # A view would hold the states of all columns.
                    kept[name].append(by_row(states, len(part))[:, column].clone())
        order = torch.tensor([i for part in parts for i in part]).argsort()
        joined = [{k: torch.cat(v)[order.to(v[0].device)] for k, v in kept.items()} for kept in found]
        return ModuleStates(*joined)

    def exclusive(self):
        """While open, other threads that use the model wait; every operation opens it for itself."""
        return exclusive(self.model)
