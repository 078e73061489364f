"""What an edit will cost, estimated from the method's settings before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reknow.contract import Method, field_values
from reknow.editing.by_expert import bytes_kept
from reknow.editing.covariance import enough_tokens
from reknow.editing.layer_choice import is_guess, suggest_layer
from reknow.editing.layers import resolve_layers
from reknow.editing.papers_layers import band_around
from reknow.editing.triangle import LARGE
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.parts import embedding_matrix, groups, shape
from reknow.model.tokens import Text

_FORWARD, _BACKWARD, _TRAIN = 2, 2, 6
"""Floating-point operations per weight and token: of a forward pass; of the gradient by what flows; of a forward pass
with its whole backward pass."""
_ACTIVATIONS = 16
"""Rough number of hidden-sized tensors that a block keeps for the backward pass."""
_FACTORED, _DECOMPOSED, _REFINED = 4 + 8, 4 + 3 * 8, 2 + 4
"""Bytes per element of a covariance, float32, with its factor; with its eigenvectors and the room to find them; of a
large one's triangle with its factor."""


@dataclass(frozen=True)
class Step:
    """One part of the work."""

    what: str
    passes: int
    tokens: int
    """In all passes together, padding not counted."""
    flops: float


@dataclass(frozen=True)
class Estimate:
    """What will be touched and computed; the numbers are estimates, good to a factor of two or so."""

    layers: tuple[int, ...]
    guessed: bool
    """The layers are a guess by depth; trial edits, which nobody has made, might choose others."""
    matrices: dict[str, tuple[int, int]]
    """(out, in) of the value matrix of each of these layers."""
    parameters: int
    """How many numbers the whole model has."""
    steps: tuple[Step, ...]
    memory: int
    """Bytes at the peak, model included."""
    solver: int
    """Bytes of them that a layer's covariance takes and what is solved with it."""
    statistics: int
    """Bytes of the covariances of these layers on disk, read there or written there first."""

    @property
    def flops(self) -> float:
        return sum(step.flops for step in self.steps)


def estimate(lm: LM, method: Method, edits: Sequence[Edit]) -> Estimate:
    """The cost of making the edits with a method.

    Reads its fields by the names that methods share: `layer` or `layers`, `steps`, `context_groups`,
    `context_source`, `covariance_tokens`, `batch_size`; those that transform a gradient say how large their network
    is. Contexts that the model writes and covariances are kept, so that later edits of the same model cost less.

    Raises:
        InputError: the method cannot edit this model, for want of a trained editor.
    """
    method = method.resolve(lm).at_work(lm)
    settings = field_values(method)
    own = method.footprint(lm)
    layers, guessed = _layers(lm, settings) if own is None else (own.layers, False)
    modules = {name: lm.model.get_submodule(name) for name in (lm.parts.value[layer] for layer in layers)}
    matrices = {name: shape(module) for name, module in modules.items()}
    parameters = sum(p.numel() for p in lm.model.parameters())
    block = sum(p.numel() for p in lm.model.get_submodule(lm.parts.blocks[layers[0]]).parameters())
    vocabulary = len(embedding_matrix(lm.model))
    head = vocabulary * lm.parts.hidden_size
    above = lm.layers - layers[0]  # blocks that gradients go through

    widths = [(shape(module)[1], groups(module)) for module in modules.values()]
    rows = lm.encode([Text.asked(edit) for edit in edits])
    bare = sum(len(row.ids) for row in rows)
    groups_of_contexts = settings.get("context_groups", ())
    contexts = sum(count for count, _ in groups_of_contexts)
    prefixes = sum(count * length for count, length in groups_of_contexts)
    tokens = bare * (1 + contexts) + prefixes * len(edits)
    steps = []
    if prefixes and settings.get("context_source", "model") == "model":
        flops = _FORWARD * (block * lm.layers + head) * prefixes
        steps.append(Step("sampling contexts", max(length for _, length in groups_of_contexts), prefixes, flops))
    covered = settings.get("covariance_tokens", 0)
    if covered := enough_tokens(lm) if covered is None else covered:
        products = sum(inside**2 / parts for inside, parts in widths)
        flops = (_FORWARD * block * (layers[-1] + 1) + products) * covered
        steps.append(Step("covariance of the keys", -(-covered // 2048), covered, flops))
    if passes := settings.get("steps", 0):
        flops = _TRAIN * (block * above + head) * passes * tokens
        steps.append(Step("gradient descent", passes, passes * tokens, flops))
    if own is not None and own.takes_gradient:
        weights = own.weights_per_token * tokens + own.weights_per_edit * len(edits)
        flops = (_FORWARD * (block * lm.layers + head) + _BACKWARD * (block * above + head)) * tokens
        steps.append(Step("gradient of the edits", 1, tokens, flops))
        steps.append(Step("its transform", 0, tokens, _FORWARD * weights))
    longest = max(len(row.ids) for row in rows) + max((length for _, length in groups_of_contexts), default=0)
    together = 1 + contexts if groups_of_contexts else min(len(edits), settings.get("batch_size", len(edits)))
    kept = together * longest * (_ACTIVATIONS * lm.parts.hidden_size * above + 2 * vocabulary)  # numbers
    changed = sum(out * inside for out, inside in matrices.values())
    each, widest = _FACTORED, 0.0
    for inside, parts in widths if covered else ():
        widest = max(widest, inside**2 / parts)
        if parts == 1 and inside > LARGE:
            each = _REFINED
    solver = int(widest) * (_DECOMPOSED if "null_share" in settings else each)
    memory = parameters * next(lm.model.parameters()).element_size() + 4 * kept + 8 * 4 * changed + solver
    statistics = sum(bytes_kept(*width) for width in widths) if covered else 0
    return Estimate(tuple(layers), guessed, matrices, parameters, tuple(steps), memory, solver, statistics)


def _layers(lm: LM, settings: Mapping[str, Any]) -> tuple[list[int], bool]:
    """The layers that a method of these settings edits, and whether they are a guess: no trial edits were made."""
    if not {"layer", "layers"} & set(settings):
        return list(range(lm.layers)), False  # such a method looks for its places in all of them
    wanted = settings.get("layers", settings.get("layer"))
    if wanted is not None:
        return resolve_layers(lm, wanted if isinstance(wanted, (tuple, list)) else [wanted]), False
    count = None if "layers" in settings else settings.get("span", 1)
    return band_around(lm, suggest_layer(lm), count), is_guess(lm)
