"""A method with what its paper sets for the model that it edits: the names `rome-paper`, `memit-paper` …"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reknow.checks.bounds import Name
from reknow.contract import Method
from reknow.edits import Edit
from reknow.lm import LM
from reknow.patching.patches import Patch
from reknow.published import Published, published
from reknow.registry import PAPER, make


@dataclass(frozen=True)
class AsPublished(Method):
    """What a method is before its model is there. A patch is the method's own, and records all of its settings."""

    row: Name
    """Name of the method in the table."""
    model: Name | None
    """The model whose settings are taken; None: the one that is edited."""
    settings: Mapping[str, Any]
    """Fields that shall be different."""

    @property
    def name(self) -> str:
        return f"{self.row}{PAPER}{f':{self.model}' if self.model else ''}"

    def published(self, lm: LM) -> Published:
        """What is published for this model, or for the one that is named."""
        return published(self.row, self.model or lm)

    def resolve(self, lm: LM) -> Method:
        return make(self.row, self.published(lm).settings_with(self.settings))

    def check(self, edits: Sequence[Edit]) -> None:
        make(self.row, self.settings).check(edits)  # what it needs does not depend on what a paper sets

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        return self.resolve(lm).edit(lm, edits)

    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        return self.resolve(lm).edit_each(lm, edits)
