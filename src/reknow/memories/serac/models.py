"""What SERAC trains: the scope classifier and the counterfactual model. (Mitchell et al. 2022, arXiv 2206.06520, §3)

The classifier reads an edit and a question; the counterfactual model answers the question with the edit before it. It
is the base model or another decoder, with a low-rank change ΔW = left right of every value matrix that is computed
beside it, and only while it answers: the base model is never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from reknow.checks.bounds import Formerly, Name, Number, Rank, check_settings
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.learning.loop import seeded
from reknow.lm import LM, Score
from reknow.memories.serac.scope import AttentionPooling, Cross, log_in_scope
from reknow.memories.serac.states import TEXTS, token_states
from reknow.model.hooks import forwards_replaced
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.tokens import Text
from reknow.patching.deltas import LowRank
from reknow.patching.weights import with_unmerged

__all__ = ["ScopeAndCounterfactual", "TrainedSettings"]

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class TrainedSettings:
    """The settings with which the two are trained, and which no edit can change afterwards."""

    classifier: Literal["embedding", "cosine", "cross"] = "embedding"
    """`embedding`: p = exp(−‖a − b‖²) of two learned vectors; `cosine`: p = exp(cos − 1) of them; `cross`: a small
    transformer reads edit and question together, for the `candidates` that learned vectors find."""
    encoder: Name | None = None
    """Folder or name of a Hugging Face encoder whose token states the classifier reads; None: the base model's."""
    counterfactual: Name | None = None
    """Folder or name of a decoder with the same tokenizer that answers in scope; None: the base model itself."""
    template: str = "Fact: {edit} {answer}. {input}"
    """What the counterfactual model reads; the paper: `{edit} {answer} {input}`. An answer right behind the edit's
    prompt, as there, follows it as the edit's separator says: without a space where the language has none."""
    embedding_size: Annotated[Rank, Formerly("size")] = 64
    """How many numbers a learned vector has; a multiple of `pooling_queries`."""
    pooling_queries: Annotated[Number, Formerly("queries")] = 4
    """How many learned queries attend to the tokens of a text; each gives an equal part of its vector."""
    rank: Rank = 8
    """Rank of the change of each value matrix of the counterfactual model."""

    def __post_init__(self):
        check_settings(self)  # a method's other fields too
        rest = re.sub(r"\{(edit|answer|input)\}", "", self.template)  # a format could ask for a gigabyte of spaces
        if not all(part in self.template for part in ("{edit}", "{answer}", "{input}")) or set("{}") & set(rest):
            raise InputError(
                f"expected a template with {{edit}}, {{answer}} and {{input}} and no other braces; got "
                f"{self.template!r}: correct it"
            )
        if self.embedding_size % self.pooling_queries:
            raise InputError(
                "expected an embedding_size that is a multiple of pooling_queries; "
                f"got {self.embedding_size} and {self.pooling_queries}: correct them"
            )

    def difference(self, other: TrainedSettings) -> str | None:
        """The name of the first of these settings that is another in `other`; None where all are the same."""
        names = (field.name for field in fields(TrainedSettings))
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    def prompt_with_edit(self, edit: Edit, question: str) -> str:
        """What the counterfactual model reads to answer the question as the edit says."""
        statement = edit.answered(edit.text, edit.target_new)
        parts = {"{edit} {answer}": statement, "{edit}": edit.text, "{answer}": edit.target_new, "{input}": question}
        return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], self.template)


class ScopeAndCounterfactual(nn.Module):
    """The scope classifier and the counterfactual model.

    Args:
        tensors: what was trained, frozen here; None: random first weights, to be trained.

    Attributes:
        digests: tell the encoder and the counterfactual model from others; None where the base model is it.

    Raises:
        InputError: tensors of other settings, or an encoder or a counterfactual model that cannot be used.
    """

    def __init__(self, settings: TrainedSettings, lm: LM, tensors: dict[str, Tensor] | None = None):
        super().__init__()
        self.prompt_with_edit = settings.prompt_with_edit
        self.states = token_states(lm, settings.encoder)
        self.counterfactual_lm = answers = _counterfactual_model(lm, settings.counterfactual)
        self.digests = [self.states.digest, None if answers is lm else answers.fingerprint.digest]
        self._names = list(answers.parts.value)
        features, rank = self.states.features, settings.rank
        with seeded("serac", settings.embedding_size, rank):
            self.cosine = settings.classifier == "cosine"
            self.scope = AttentionPooling(features, settings.embedding_size, settings.pooling_queries)
            self.cross = Cross(features) if settings.classifier == "cross" else None
            shapes = [tuple(answers.weight(name).shape) for name in self._names]
            self.left = nn.ParameterList([torch.zeros(out, rank) for out, _ in shapes])
            self.right = nn.ParameterList([torch.randn(rank, wide) * wide**-0.5 for _, wide in shapes])
        if tensors is not None:
            own = self.state_dict()
            if odd := [n for n in own if n not in tensors or tensors[n].shape != own[n].shape]:
                raise InputError(f"expected what these settings learn; {odd[0]} is of another size: train anew")
            self.load_state_dict({name: tensors[name].float() for name in own})
            self.requires_grad_(False)
        self.to(lm.device)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """A vector for each text, of length 1 where cosines count. (texts, embedding_size)"""
        vectors = torch.cat([self.scope(self.states(batch)) for batch in _batches(texts)])
        return nn.functional.normalize(vectors, dim=-1) if self.cosine else vectors

    @torch.no_grad()
    def log_p(self, edits: Sequence[str], inputs: Sequence[str]) -> Tensor:
        """log p that each question is in the scope of the edit beside it. (pairs,)"""
        if self.cross is not None:
            pairs = zip(_batches(edits), _batches(inputs), strict=True)
            return torch.cat([self.cross(self.states(first), self.states(second)) for first, second in pairs])
        vectors = zip(self.embed(edits), self.embed(inputs), strict=True)
        return torch.cat([log_in_scope(x[None], z[None], cosine=self.cosine)[0] for z, x in vectors])

    @contextmanager
    def counterfactual(self) -> Iterator[LM]:
        """While open, the counterfactual model, its change computed beside its matrices: they stay as they are."""
        lm = self.counterfactual_lm
        matrices = [lm.model.get_submodule(name) for name in self._names]
        changes = zip(matrices, map(LowRank, self.left, self.right), strict=True)
        with (
            lm.unpatched(),
            forwards_replaced({matrix: with_unmerged(matrix.forward, delta) for matrix, delta in changes}),
        ):
            yield lm

    def answer_loss(self, questions: Sequence[tuple[Edit, str]]) -> Tensor:
        """Mean −log P of the tokens of the edits' answers, under the counterfactual model that reads each edit before
        a question; a scalar with gradients."""
        texts = [Text.asked(edit, self.prompt_with_edit(edit, question)) for edit, question in questions]
        nll = []
        with self.counterfactual() as lm:
            for batch in _batches(texts):
                rows = lm.encode(batch)
                nll.append(ScoredTokens(lm, rows, [predictions(row, row.prompt_length) for row in rows], None).nll())
        return torch.cat(nll).mean()

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], separators: Sequence[str | None] | None = None
    ) -> list[Score]:
        with self.counterfactual() as lm:
            return lm.score(prompts, targets, separators)

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **sampling: Any) -> list[str]:
        with self.counterfactual() as lm:
            return list(lm.generate(list(prompts), max_new_tokens, **sampling))

    def likeliest(self, prompts: Sequence[str], count: int = 5) -> list[list[tuple[str, float]]]:
        with self.counterfactual() as lm:
            return lm.likeliest(list(prompts), count)


def _batches(texts: Sequence[_T]) -> list[Sequence[_T]]:
    return [texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS)]


def _counterfactual_model(lm: LM, source: str | None) -> LM:
    """The decoder that answers in scope; kept with the LM.

    Raises:
        InputError: it has another tokenizer.
    """
    if source is None:
        return lm

    def load() -> LM:
        model = type(lm)(source, dtype=lm.dtype, device=lm.device, chat=lm.chat)
        if model.fingerprint.tokenizer != lm.fingerprint.tokenizer:
            raise InputError(
                f"expected a counterfactual model with the tokenizer of {lm.name}; {source} has another, so that its "
                "scores could not be compared: choose one of the same family"
            )
        return model

    return lm.cached(("counterfactual", source), load)
