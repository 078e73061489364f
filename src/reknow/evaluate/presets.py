"""Published studies as settings of a run, in a size that finishes in under 40 minutes on two cores.

The numbers of a paper belong to its models; on another model the order of the methods is what can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A study: what to run, and where it comes from."""

    study: str
    methods: tuple[str, ...]
    settings: tuple[str, ...] = ()
    """Settings of the methods, as `method.field=value`."""
    data: str = "counterfact"
    limit: int = 50
    plan: Mapping[str, Any] = MappingProxyType({})
    """Fields of `Plan`."""


PRESETS: dict[str, Preset] = {
    "rome": Preset(
        "Single edits of CounterFact: ROME against fine-tuning. Meng et al. 2022, arXiv 2202.05262, Table 4",
        ("rome", "ft-l"),
        plan={"seeds": (0, 1, 2)},
    ),
    "rebuilding-rome": Preset(
        "Sequential edits of CounterFact: ROME collapses, R-ROME does not. Gupta et al. 2024, arXiv 2403.07175",
        ("rome", "r-rome"),
        limit=100,
        plan={"mode": "sequential", "checkpoints": (10, 25, 50)},
    ),
    "knowedit": Preset(
        "Single edits with consequences: fine-tuning on the answer. Zhang et al. 2024, arXiv 2401.01286",
        ("rome", "ft-l", "ft-m"),
        data="wiki_counterfact",
    ),
    "ice": Preset(
        "Single edits with consequences: In-Context Editing against fine-tuning. Qi et al. 2024, arXiv 2406.11194",
        ("ice", "ft-m", "ft-t", "rome"),
        data="wiki_counterfact",
    ),
    "zsre-table": Preset(
        "Single edits of ZsRE in KnowEdit's form: editing against fine-tuning. Zhang et al. 2024, arXiv 2401.01286",
        ("ft-l", "ft-m", "rome", "memit"),
        data="knowedit-zsre",
    ),
    "zsre-table-batch": Preset(
        "The same, 500 edits in one patch; give the whole file: --data knowedit-zsre:FILE",
        ("ft-l", "ft-m", "rome", "memit"),
        data="knowedit-zsre",
        limit=500,
        plan={"mode": "batch"},
    ),
}
