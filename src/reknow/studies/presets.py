"""Published studies as settings of a run, in a size that finishes in under 40 minutes on two cores.

The numbers of a paper belong to its models; on another model the order of the methods is what can be compared.
"""

from __future__ import annotations

from reknow.evaluation.plan import Plan
from reknow.studies.ice.presets import ICE_PRESETS
from reknow.studies.preset import Preset, Selection, Size, plain

__all__ = ["PRESETS"]

_SAMPLED = Plan(fluency=True)
"""The plan of studies whose tables have fluency, which takes most of their time."""

PRESETS: dict[str, Preset] = {
    "rome": Preset(
        "Single edits of CounterFact: ROME against fine-tuning. Meng et al. 2022, arXiv 2202.05262, Table 4",
        plain("rome", "ft-l"),
        Size(plan=Plan(fluency=True, seeds=(0, 1, 2))),
    ),
    "rebuilding-rome": Preset(
        "Sequential edits of CounterFact: ROME collapses, R-ROME does not. Gupta et al. 2024, arXiv 2403.07175",
        plain("rome", "r-rome"),
        Size(Selection(limit=100), Plan("sequential", checkpoints=(10, 25, 50), fluency=True)),
    ),
    "knowedit": Preset(
        "Single edits with consequences: fine-tuning on the answer. Zhang et al. 2024, arXiv 2401.01286",
        plain("rome", "ft-l", "ft-m"),
        Size(Selection("wiki_counterfact"), _SAMPLED),
    ),
    **ICE_PRESETS,
    "zsre-table": Preset(
        "Single edits of ZsRE in KnowEdit's form: editing against fine-tuning. Zhang et al. 2024, arXiv 2401.01286",
        plain("ft-l", "ft-m", "rome", "memit", "ike", "kn", "serac", "mend"),
        Size(Selection("knowedit-zsre"), _SAMPLED),
    ),
    "zsre-table-batch": Preset(
        "The same, 500 edits in one patch; give the whole file: --data knowedit-zsre:FILE",
        plain(
            "ft-l", "ft-m", "rome", "memit", "ike", "kn"
        ),  # the bundled editors have learned from a part of that file
        Size(Selection("knowedit-zsre", 500), Plan("batch", fluency=True)),
    ),
}
