"""The loss of In-Context Editing: answers, and what the model writes behind them by itself, sampled and learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.generation import sample
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import EncodedText, Text
from reknow.texts.writing import prepend

_Losses = Callable[[], tuple[Tensor, Tensor]]
"""Gives the losses of the answers' tokens and of the sampled ones, in nats, with the weights as they are now."""


SEPARATOR = "\n"


def prepend_context(edit: Edit, context: str, introduction: str = "", separator: str = SEPARATOR) -> Text:
    """The edit's question with its context in front: `Fact: Peru is in Asia.`, a line break, `Peru is in`."""
    return Text.asked(edit, prepend(f"{introduction}{context.strip()}{separator}", edit.text))


class SampledAnswers:
    """Answers to edits' questions, each with a sample of what the model writes behind it.

    Args:
        contexts: edits, each with a context; one pair for every sample.
        layer: the blocks below this one are run once for each draw; None: in every pass, which is cheaper where
            samples change at every step.
        loss: `algorithm_1` or `authors_script`.
        static: the samples come from the model before the edit.

    Attributes:
        samples: by context, the sampled tokens.
        plain: answers and samples behind the question alone.
        is_answer: (n,) bool, which of the tokens scored there are an answer's; the others are sampled.
        lengths: how many tokens are scored of the answer and sample that each of them belongs to.
    """

    plain: ScoredTokens
    is_answer: Tensor
    lengths: list[int]

    def __init__(
        self,
        lm: LM,
        contexts: Sequence[tuple[Edit, str]],
        layer: int | None,
        loss: Callable[[SampledAnswers], tuple[Tensor, _Losses]],
        static: bool,
    ):
        self.contexts, self.static = contexts, static
        self.samples: list[tuple[int, ...]] = [()] * len(contexts)
        self._lm, self._layer, self._loss = lm, layer, loss
        self._rows = lm.encode([Text.asked(edit) for edit, _ in contexts])
        self._informed: list[EncodedText] = []

    def draw(
        self,
        introductions: Sequence[str],
        separator: str,
        count: int,
        *,
        with_context: bool,
        behind_answer: bool,
        temperature: float,
        top_k: int | None,
        generator: torch.Generator,
    ) -> None:
        """Introduces every context anew, and samples from the model as it is now.

        Args:
            introductions: one of them is drawn for each context.
            separator: between context and question.
            count: tokens of a sample; 0: none is drawn.
            with_context: sample behind context and question; False: behind the question.
            behind_answer: the answer stands there too.
        """
        drawn: list[int] = torch.randint(len(introductions), (len(self.contexts),), generator=generator).tolist()
        texts = [
            prepend_context(edit, context, introductions[i], separator)
            for (edit, context), i in zip(self.contexts, drawn, strict=True)
        ]
        # The answer's tokens are those of the bare row, so that both sides are scored at the same places.
        self._informed = [
            EncodedText(row.ids[: row.prompt_length] + bare.target_ids, row.prompt_length)
            for row, bare in zip(self._lm.encode(texts), self._rows, strict=True)
        ]
        if count:
            source = self._informed if with_context else self._rows
            source = source if behind_answer else [_question(row) for row in source]
            self.samples = sample(self._lm, source, count, temperature=temperature, top_k=top_k, generator=generator)
        rows, is_answer, self.lengths = [], [], []
        for row, tail in zip(self._rows, self.samples, strict=True):
            together = behind_answer or not tail
            rows += [_longer(row, tail)] if together else [row, _longer(_question(row), tail)]
            is_answer += [True] * len(row.target_ids) + [False] * len(tail)
            tokens = len(row.target_ids) + len(tail)
            self.lengths += [tokens] * tokens
        self.plain = self._score(rows)
        self.is_answer = torch.tensor(is_answer, device=self._lm.device)
        self._weights, self._token_losses = self._loss(self)

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """(L_ft, L_ice, mean loss of the answers' tokens), with the weights as they are now."""
        answers, sampled = self._token_losses()
        of_answers, of_sampled = self._weights[self.is_answer], self._weights[~self.is_answer]
        mean = (answers.detach() * of_answers).sum() / of_answers.sum()
        return (answers * of_answers).sum(), (sampled * of_sampled).sum(), mean

    def score_informed(self) -> ScoredTokens:
        """The tokens that `plain` scores, with the context in front."""
        return self._score([_longer(row, drawn) for row, drawn in zip(self._informed, self.samples, strict=True)])

    def repetitions(self) -> int:
        """How many sampled tokens repeat one of the answer, or of their own sample before them."""
        new = [len({*drawn} - {*row.target_ids}) for row, drawn in zip(self._rows, self.samples, strict=True)]
        return sum(map(len, self.samples)) - sum(new)

    def _score(self, rows: list[EncodedText]) -> ScoredTokens:
        return ScoredTokens(self._lm, rows, [predictions(row, row.prompt_length) for row in rows], self._layer)


def algorithm_1(texts: SampledAnswers) -> tuple[Tensor, _Losses]:
    """The paper's loss, −log p(y* | q) − log p(x | [q, y*]): the weights of its tokens, for a mean over them, and
    the losses."""

    def losses() -> tuple[Tensor, Tensor]:
        nll = texts.plain.nll()
        return nll[texts.is_answer], nll[~texts.is_answer]

    weights = [1 / tokens / len(texts.samples) for tokens in texts.lengths]
    return torch.tensor(weights, device=texts.is_answer.device), losses


def authors_script(texts: SampledAnswers) -> tuple[Tensor, _Losses]:
    """The loss of the authors' script (`print_kl`), −log p(y* | q) − log p(y* | [c, q]) and at the sampled tokens
    KL(with context ‖ without) over the vocabulary: the weights of its tokens, for a sum over them, and the losses."""
    plain, informed, is_answer = texts.plain, texts.score_informed(), texts.is_answer
    with torch.no_grad():
        before = informed.log_probs() if texts.static else None

    def losses() -> tuple[Tensor, Tensor]:
        q, p = plain.log_probs(), informed.log_probs() if before is None else before
        answer = plain.targets[is_answer, None]
        nll = -(q[is_answer].gather(1, answer) + p[is_answer].gather(1, answer))[:, 0]
        return nll, kl_divergence(p[~is_answer].detach(), q[~is_answer])

    return torch.full(is_answer.shape, 1 / len(texts.samples), device=is_answer.device), losses


def _longer(row: EncodedText, tokens: Sequence[int]) -> EncodedText:
    return EncodedText((*row.ids, *tokens), row.prompt_length)


def _question(row: EncodedText) -> EncodedText:
    return EncodedText(row.ids[: row.prompt_length], row.prompt_length)
