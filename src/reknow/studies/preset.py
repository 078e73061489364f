"""What a published study is made of: the record that presets are written in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from reknow.evaluation.plan import Plan

__all__ = ["Preset", "Selection", "Size", "Variant"]

_NONE: Mapping[str, Any] = MappingProxyType({})


class Variant(NamedTuple):
    """A method of a study, by a name of the table of methods, and the settings in which it differs from that."""

    label: str
    method: str
    settings: Mapping[str, Any] = _NONE


class Selection(NamedTuple):
    """Which cases a study edits."""

    data: str = "counterfact"
    """A data set, or several with commas between: each is a run of its own, in a folder under the study's."""
    limit: int | None = 50
    """Cases of each set; None: all."""
    limits: Mapping[str, int] = _NONE
    """Other limits of some sets."""
    probes_per_name: int | None = None
    """At most so many probes of one name in a case; None: all."""
    one_run: bool = False
    """One run over the cases of all sets, merged in proportion, instead of one for each set."""


class Size(NamedTuple):
    """How much of a study is run."""

    cases: Selection = Selection()
    plan: Plan = Plan()


class Preset(NamedTuple):
    """A study: what to run, and where it comes from."""

    study: str
    methods: tuple[Variant, ...]
    size: Size = Size()
    full: Size | None = None
    """Its full size, which takes hours; None: the same."""


def plain(*names: str) -> tuple[Variant, ...]:
    """Methods as they are, under their own names."""
    return tuple(Variant(name, name) for name in names)
