"""ConvSent's own metrics (Mitchell et al. 2022, arXiv 2206.06520, §4): is a topic spoken of as wanted?

    z_sentiment = σ(log p'(wanted) − log p'(unwanted))
    z_topic     = min(1, exp(log p'(wanted) − log p(wanted)))
    sentiment   = z_sentiment · z_topic                       the edit's success
    drawdown    = KL(p ‖ p') on texts about another topic      in nats

p is the unedited model and p' the edited one; log p(texts) is the mean over all tokens of the texts behind their
questions, as in the authors' code. z_topic falls where the edit makes texts of either sentiment unlikely.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from reknow.evaluation.readings import Reading

_WANTED, _UNWANTED, OTHER_TOPIC = "wanted", "unwanted", "other_topic"


def sentiment_metrics(after: Sequence[Reading], before: Sequence[Reading] | None) -> dict[str, float]:
    """The metrics of one case, as far as its readings have them: metric@protocol → value."""
    found = {}
    wanted, unwanted = (_mean_log(after, name) for name in (_WANTED, _UNWANTED))
    if wanted is not None and unwanted is not None:
        found["z_sentiment@likelihood"] = 1 / (1 + math.exp(min(700.0, unwanted - wanted)))
        earlier = None if before is None else _mean_log(before, _WANTED)
        if earlier is not None:
            found["z_topic@likelihood"] = math.exp(min(0.0, wanted - earlier))
            found["sentiment@likelihood"] = found["z_sentiment@likelihood"] * found["z_topic@likelihood"]
    if (drawdown := _token_mean((reading.divergence, len(reading.hits)) for reading in after)) is not None:
        found["drawdown@divergence"] = drawdown
    return found


def _mean_log(readings: Sequence[Reading], name: str) -> float | None:
    texts = [reading for reading in readings if reading.kind == "sentiment" and reading.name == name]
    mean = _token_mean((reading.nll, len(reading.hits)) for reading in texts)
    return None if mean is None else -mean


def _token_mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean of values weighted by their tokens; None where there is none."""
    pairs = [(value, tokens) for value, tokens in values if value is not None]
    tokens = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs) / tokens if tokens else None
