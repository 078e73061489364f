"""The layers that a method edits: those that its user names, or what `layer_choice` suggests."""

from __future__ import annotations

from collections.abc import Sequence

from reknow.editing.layer_choice import suggest_layer
from reknow.editing.papers_layers import band_around
from reknow.errors import InputError
from reknow.lm import LM

__all__ = ["resolve_layer", "resolve_layers"]


def resolve_layer(lm: LM, layer: int | None) -> int:
    """The layer asked for, checked; or the one suggested for this model."""
    if layer is not None:
        return lm.check_layer(layer)
    return suggest_layer(lm)


def resolve_layers(lm: LM, layers: Sequence[int] | None, count: int | None = None) -> list[int]:
    """The layers asked for, checked and in order; or the range of `count` around the one suggested for this model.

    Raises:
        InputError: it is no list, or empty, or the model does not have one of them.
    """
    if isinstance(layers, int):
        raise InputError(f"expected layers as a list; got {layers}: put it in brackets")
    if layers is not None and not layers:
        raise InputError("expected at least one layer; got an empty list: name one, or leave it to the library")
    if layers is not None:
        return sorted({lm.check_layer(layer) for layer in layers})
    return band_around(lm, resolve_layer(lm, None), count)
