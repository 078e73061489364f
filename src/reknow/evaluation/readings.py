"""What a model answered to a probe, raw: what metrics are computed from and run folders keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import FailFast, Field

from reknow.edits import Kind

__all__ = ["Positive", "Reading", "finite_nats"]

_IMPOSSIBLE = 690.0
"""Nats recorded for a likelihood that is NaN or less than e^-690: both ways its exponential is still a number."""

Positive = Annotated[float, Field(gt=0)]
_Nats = Annotated[float, Field(ge=-1, le=700)]
"""A mean −log P, such that its exponential and that of its negative are numbers."""


@dataclass(frozen=True)
class Reading:
    """What a model answered to one probe: everything the metrics need, kept raw in the run folder.

    The bounds hold for what is read from a file, see `evaluation.run_folder`.
    """

    kind: Kind
    name: str
    prompt: str
    answers: Annotated[tuple[str, ...], FailFast()]
    """Accepted answers; `hits`, `top` and `nll` belong to the first."""
    hits: tuple[bool, ...] = ()
    """Per token of the first answer: is it the argmax, teacher-forced?"""
    top: tuple[int, ...] = ()
    """The argmax token ids at those positions."""
    nll: _Nats | None = None
    """Mean negative log-likelihood per token, in nats: of the first answer; for fluency, of the prompt
    with the sampled text under the unedited model."""
    nll_new: _Nats | None = None
    """Mean NLL of the edit's `target_new` on this prompt, where the contrast is asked."""
    nll_true: _Nats | None = None
    """Mean NLL of its `target_true`."""
    text: str | None = None
    """Greedy continuation of the prompt, for fluency a sampled one; None where none was asked for."""
    divergence: float | None = None
    """KL(unedited ‖ now) per token of the first answer, in nats, where it is asked: on another topic in ConvSent."""
    ppl_r: Positive | None = None
    """PPL_r of a text that was sampled behind the request."""

    def to_json(self) -> dict:
        """Plain JSON types; `from_json` gives the reading back."""
        return asdict(self) | {"hits": [int(hit) for hit in self.hits]}

    @classmethod
    def from_json(cls, record: Mapping) -> Reading:
        """The reading that `to_json` wrote."""
        fields = {**record, **{name: tuple(record[name]) for name in ("answers", "top")}}
        if earlier := fields.pop("ratios", None):  # PPL_r, and as its authors' script reads it
            fields["ppl_r"] = earlier[0]
        return cls(**{**fields, "hits": tuple(map(bool, record["hits"]))})


def finite_nats(nll: float) -> float:
    """The number, or one whose exponential is none too large for a float."""
    return _IMPOSSIBLE if math.isnan(nll) else min(nll, _IMPOSSIBLE)
