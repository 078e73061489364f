"""What every method that searches a wanted value shares: ROME, MEMIT, PMET, EMMET and AlphaEdit.

What the settings mean is in the equation at the top of `values`, which has the search itself.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from reknow.checks.bounds import Formerly, Name, NonNegative, Number, Rate, Seed, Share, Units
from reknow.contract import Method
from reknow.datasets.text import text_source
from reknow.editing import factors, triangle
from reknow.editing.by_expert import ExpertWhitening
from reknow.editing.contexts import sample_contexts, text_contexts
from reknow.editing.factors import Made
from reknow.editing.keys import Site, Subjects
from reknow.editing.refined import Refined
from reknow.editing.sinks import reworded
from reknow.editing.solvers import Whitening
from reknow.edits import Edit
from reknow.errors import EditRefused, InputError
from reknow.lm import LM
from reknow.registry import METHODS, NEED_A_SUBJECT
from reknow.texts.templates import split_template

__all__ = ["SearchRules", "ValueSearchMethod"]


@dataclass(frozen=True, kw_only=True)
class SearchRules:
    """In what the searches of the methods differ, beyond the settings that all of them have."""

    site: Site = "block"
    """What δ is added to, and measured against: the block's output (MEMIT) or the value matrix's (ROME, PMET)."""
    moves_attention: bool = False
    """Search a second addition at attention's output together with δ, and throw it away (PMET)."""
    merge_subjects: bool = False
    """Search one δ for all edits of the same subject (MEMIT-Merge)."""
    stop_loss: float = 0.05
    """End a fact's search when its whole loss is below."""
    success_weight: float = 1.0
    """Weight of the likelihood while the target is the most likely answer in every context (PMET: 0.1)."""
    forward_targets: bool = False
    """Search z behind the first layer of a band and carry it forward to the others (MEMIT-FE)."""
    stop_drift: float | None = None
    """Weighted KL term at which a fact's search ends, once the target is the most likely answer (PMET: 0.01)."""


@dataclass(frozen=True, kw_only=True)
class ValueSearchMethod(Method):
    """A method that searches wanted values and spares general text: its settings, its checks, its statistics."""

    steps: Number = 60
    """Passes of the model at most; the last one only measures, so that there is one update less. In the papers 20 to
    30, all of them."""
    learning_rate: Rate = 0.1
    """Adam's step of one coordinate of the addition, in root mean squares of the block's output, or in half those of
    the value matrix's output where a norm or a multiplier follows it."""
    kl_weight: NonNegative = 0.0625
    """Weight of the drift of what the model says after "{subject} is a"."""
    weight_decay: Annotated[NonNegative, Formerly("decay")] = 0.05
    """Weight in the loss of the addition's length, relative to what it is added to; not Adam's weight decay."""
    context_variance: NonNegative = 0.0
    """Weight in the loss of how far contexts differ in what the next layers make of the subject, as CoRE has it: the
    mean squared distance relative to the squared length; `absolute`: its sum over pairs by the width. The
    contexts of a pass are compared, which are two at least."""
    variance_layers: Number = 1
    """How many layers above these are, where `context_variance` is not 0."""
    clamp: Rate = 1.0
    """Largest length of the addition, relative to what it is added to; in the papers 0.75."""
    units: Units = "relative"
    """`relative`: the learning rate and the addition's length are measured by the model's own states. `absolute`: the
    learning rate is a plain number, and the length is divided by the square of the state's, as in the papers."""
    stop_probability: Share = 0.95
    """End a fact's search when the mean probability of the new answer's tokens is this in every context; 1: at a
    loss < 0.05 only, as in the papers."""
    min_delta: Annotated[NonNegative, Formerly("stop_gain")] = 0.005
    """End a fact's search too once the new answer is the most likely in every context and the loss falls by less than
    this per pass; 0: never, as in the papers."""
    context_batches: Annotated[Number, Formerly("turns")] = 2
    """Split the contexts into so many batches, or more where texts are long, of which each pass reads the next:
    several times less work; 1: all contexts in every pass, as in the papers."""
    context_source: Literal["text", "model"] = "text"
    """Where the texts come from that are put before the prompt: `text`: they are beginnings of general text, that of
    `covariance_text`; `model`: the model writes them, as in the papers, some models nonsense."""
    context_groups: tuple[tuple[Number, Number], ...] = ((5, 9),)
    """(how many, of how many tokens) texts to put before the prompt."""
    context_first_words: Annotated[tuple[str, ...], Formerly("context_starts", also={"context_source": "model"})] = (
        "The",
        "Therefore",
        "Because",
        "I",
        "You",
    )
    """First words of texts that the model writes; none: the token that begins texts."""
    key_contexts: Literal["prefixes", "rephrasings", "both"] = "prefixes"
    """What a key is a mean over, and a value searched for: `prefixes`: the prompt by itself and behind those texts;
    `rephrasings`: the prompt and the edit's rephrasings; `both`: all of them. Each weighs alike in the search and in
    ROME's key; the mean key of MEMIT and its kin is half the bare prompt's, as always."""
    covariance_tokens: Number | None = None
    """Tokens of general text for C; None: twenty for each input of the matrix, 100,000 at most."""
    covariance_text: Name | None = None
    """A file, a folder or `hub:owner/name` to read general text from, also for contexts; None: the bundled WikiText
    sample."""
    seed: Seed = 0
    """Seed of the contexts."""

    @property
    def rules(self) -> SearchRules:
        """What the method fixes of the search."""
        return SearchRules()

    def check(self, edits: Sequence[Edit]) -> None:
        for edit in edits:
            if edit.subject is None:
                others = [name for name in METHODS if name not in NEED_A_SUBJECT]
                raise EditRefused(
                    f"{self.name} edits at the subject's last token and needs a subject; {edit.prompt!r} has none: "
                    "mark it with braces, as in 'The capital of {France} is', which Edit.parse reads in Python, or "
                    f"take a method that needs none: {', '.join(others)}",
                    edit,
                )
        if not self.rules.merge_subjects:
            _warn_of_shared_keys(self.name, edits)
        if self.rephrased:
            _check_rephrasings(self.name, edits, alike=self.rules.merge_subjects)

    @property
    def rephrased(self) -> bool:
        """Whether edits are read in their rephrasings too."""
        return self.key_contexts != "prefixes"

    def subjects(self, lm: LM, edits: Sequence[Edit]) -> Subjects:
        """The last tokens of the edits' subjects in all that a key is a mean over."""
        return Subjects(lm, edits, self.contexts(lm), rephrased=self.rephrased)

    def contexts(self, lm: LM) -> tuple[str, ...]:
        """The texts to put before the prompt; the first is empty."""
        if self.key_contexts == "rephrasings":
            return ("",)
        if self.context_source == "text":
            source = text_source(self.covariance_text)
            return text_contexts(lm, self.context_groups, source, seed=self.seed)
        return sample_contexts(lm, self.context_groups, first_words=self.context_first_words, seed=self.seed)

    def keep_statistics(self, lm: LM, layers: Sequence[int]) -> None:
        """Reads what C of these layers needs, in one pass over the text."""
        if self.covariance_tokens != 0:  # which ROME alone may have
            factors.keep_statistics(lm, layers, tokens=self.covariance_tokens, text=self.covariance_text)

    def whitening(self, lm: LM, layer: int) -> Whitening | Refined | ExpertWhitening:
        """`factors.whitening` of the settings' text."""
        return factors.whitening(lm, layer, tokens=self.covariance_tokens, text=self.covariance_text)

    def check_search(self, lm: LM, layer: int) -> None:
        """Raises InputError where δ would stay 0, or fewer layers are above than `context_variance` wants."""
        if self.steps == 1:
            raise InputError("expected steps of at least 2, of which the last only measures; got 1: raise it")
        if self.context_variance and self.variance_layers > (above := lm.layers - 1 - layer):
            raise InputError(
                f"expected variance_layers of at most {above}, which are above layer {layer}; got "
                f"{self.variance_layers}: lower it, take an earlier layer, or leave context_variance out"
            )

    def check_null_space(self, lm: LM, layers: Sequence[int]) -> None:
        """Raises InputError where a layer is too large for all its eigenvectors."""
        for layer in filter(partial(factors.is_large, lm), layers):
            raise InputError(
                f"expected layers of at most {triangle.LARGE:,} inputs, whose directions can be found; layer {layer} "
                f"of {lm.name} has more: take memit, emmet or rome"
            )

    def from_covariance(self, lm: LM, layer: int, make: Callable[..., Made], *settings) -> Made:
        """`factors.from_covariance` of the settings' text."""
        tokens, text = self.covariance_tokens, self.covariance_text
        return factors.from_covariance(lm, layer, make, *settings, tokens=tokens, text=text)


def _check_rephrasings(method: str, edits: Sequence[Edit], *, alike: bool) -> None:
    """Raises EditRefused where an edit has no rephrasings or, if they must be alike, edits of a subject not as many;
    InputError where one does not hold the subject once."""
    counts: dict[str | None, int] = {}
    for edit in edits:
        count = len(reworded(edit))
        if not count:
            raise EditRefused(
                f"expected rephrasings of every edit; {edit.text!r} has none: give Edit(…, rephrasings=[…]) with "
                "{} for the subject, or key_contexts=prefixes",
                edit,
            )
        if alike and counts.setdefault(edit.subject, count) != count:
            raise EditRefused(
                f"expected as many rephrasings of every edit of a subject, since {method} searches them together; "
                f"{edit.text!r} has {count}, another of {edit.subject!r} {counts[edit.subject]}: even them out",
                edit,
            )


def _warn_of_shared_keys(method: str, edits: Sequence[Edit]) -> None:
    """Warns where edits begin with the same text up to the subject's end: one key can have one value only."""
    begins = {edit.text: split_template(edit.prompt)[0] + str(edit.subject) for edit in edits}
    shared = {begin: count for begin, count in Counter(begins.values()).items() if count > 1}
    if shared:
        begin, count = next(iter(shared.items()))
        more = f" (and {len(shared) - 1} more such texts)" if len(shared) > 1 else ""
        warnings.warn(
            f"{method} finds one key for all {count} edits that begin with {begin!r}{more}, so at most one of "
            "them will be made: memit-merge makes them together",
            stacklevel=1,  # said once, whoever calls
        )
