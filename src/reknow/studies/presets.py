"""Published studies as settings of a run, in a size that finishes in under 40 minutes on two cores.

The numbers of a paper belong to its models; on another model the order of the methods is what can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = MappingProxyType({})


class Preset(NamedTuple):
    """A study: what to run, and where it comes from."""

    study: str
    methods: tuple[str, ...]
    """Names in the table of methods, or LABEL=NAME to have a method several times with different settings."""
    settings: tuple[str, ...] = ()
    """Settings of the methods, as `label.field=value`."""
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
    plan: Mapping[str, Any] = _NONE
    """Fields of `Plan`."""
    convergence: bool = False
    """Not a comparison of answers but what happens inside ICE, see `studies.ice.convergence`."""
    script_ppl_r: bool = False
    """PPL_r also as the script of ICE's authors computes it."""
    full: Mapping[str, Any] = _NONE
    """Fields of the preset that differ in its full size."""


_SAMPLED: Mapping[str, Any] = MappingProxyType({"fluency": True})
"""The plan of studies whose tables have fluency, which takes most of their time."""
_KNOWEDIT = "wiki_recent,knowedit-zsre,wiki_counterfact,wikibio"
_ICE_PAPER = "Qi et al. 2024, arXiv 2406.11194"
_FT_M_ARTICLE = ("ft-m@article.span=5", "ft-m@article.clamp=0.12")
"""FT-M as in the article's repository (`hparams/FT`): ICE's layers, rate and bound, what λ = 0 leaves of ICE."""
_FT_ARTICLE = (*_FT_M_ARTICLE, "ft-l@article.span=5", "ft-l@article.clamp=0.12")
"""FT-M and FT-L, which differ in the loss alone there."""

PRESETS: dict[str, Preset] = {
    "rome": Preset(
        "Single edits of CounterFact: ROME against fine-tuning. Meng et al. 2022, arXiv 2202.05262, Table 4",
        ("rome", "ft-l"),
        plan={**_SAMPLED, "seeds": (0, 1, 2)},
    ),
    "rebuilding-rome": Preset(
        "Sequential edits of CounterFact: ROME collapses, R-ROME does not. Gupta et al. 2024, arXiv 2403.07175",
        ("rome", "r-rome"),
        limit=100,
        plan={**_SAMPLED, "mode": "sequential", "checkpoints": (10, 25, 50)},
    ),
    "knowedit": Preset(
        "Single edits with consequences: fine-tuning on the answer. Zhang et al. 2024, arXiv 2401.01286",
        ("rome", "ft-l", "ft-m"),
        data="wiki_counterfact",
        plan=_SAMPLED,
    ),
    "ice-table": Preset(
        f"Single edits: In-Context Editing against fine-tuning, ROME and MEMIT. {_ICE_PAPER}, Table 1",
        ("ice", "ft-m@article=ft-m", "ft-l@article=ft-l", "ft-m", "ft-l", "ft-t", "memit", "rome"),
        _FT_ARTICLE,
        data=f"{_KNOWEDIT},counterfact",
        limit=16,
        limits={"wikibio": 4},
        probes_per_name=2,
        plan={**_SAMPLED, "in_context": ("ice",)},
        script_ppl_r=True,
        full={
            "limit": None,
            "limits": _NONE,
            "probes_per_name": None,
            "plan": {**_SAMPLED, "in_context": ("ice",), "seeds": (0, 1, 2)},
        },
    ),
    "ice-ablation": Preset(
        f"What ICE is made of: target, context, sampling, temperature, introductions. {_ICE_PAPER}, Tables 2 and 4",
        (
            *("ice", "static=ice", "no-context=ice", "static-no-context=ice", "ft-m@article=ft-m", "no-answer=ice"),
            *("t0.1=ice", "t10=ice", "t100=ice", "bare-context=ice", "no-now=ice", "script=ice"),
        ),
        (
            *_FT_M_ARTICLE,
            *("static.targets=static", "no-context.with_context=false", "no-answer.sample_target=false"),
            *("static-no-context.targets=static", "static-no-context.with_context=false"),
            *("t0.1.temperature=0.1", "t10.temperature=10", "t100.temperature=100"),
            *('bare-context.context_introductions=[""]', 'no-now.context_separator=" "', "script.variant=code"),
        ),
        data="wiki_recent,wiki_counterfact",
        limit=15,
        probes_per_name=2,
        plan=_SAMPLED,
        script_ppl_r=True,
        full={"data": _KNOWEDIT, "limit": None, "probes_per_name": None, "plan": {**_SAMPLED, "seeds": (0, 1, 2)}},
    ),
    "ice-lambda": Preset(
        f"How much consistency: λ from 0, plain fine-tuning, upwards. {_ICE_PAPER}, Table 3",
        tuple(f"lambda-{weight}=ice" for weight in ("0", "0.25", "0.5", "1", "2", "4")),
        tuple(f"lambda-{weight}.consistency_weight={weight}" for weight in ("0", "0.25", "0.5", "1", "2", "4")),
        data="wiki_recent,wiki_counterfact",
        limit=15,
        probes_per_name=2,
        plan={"seeds": (0, 1)},
        script_ppl_r=True,
        full={"data": _KNOWEDIT, "limit": None, "probes_per_name": None, "plan": {**_SAMPLED, "seeds": (0, 1, 2)}},
    ),
    "ice-continual": Preset(
        f"300 edits one after the other, all kept, read right after each and after all. {_ICE_PAPER}, Table 5",
        ("ice", "ft-m@article=ft-m", "ft-l@article=ft-l", "ft-m", "ft-l", "memit", "rome"),
        _FT_ARTICLE,
        data=_KNOWEDIT,
        limit=100,
        limits={"wiki_counterfact": 90, "wikibio": 10},
        probes_per_name=2,
        one_run=True,
        plan={**_SAMPLED, "mode": "sequential", "checkpoints": (100, 200), "fluency_every": 10},
        script_ppl_r=True,
        full={
            "limit": None,
            "limits": _NONE,
            "probes_per_name": None,
            "one_run": False,
            "plan": {**_SAMPLED, "mode": "sequential"},
        },
    ),
    "ice-convergence": Preset(
        f"Losses at each step by temperature and target; the consistency condition. {_ICE_PAPER}, Figures 2 and 3",
        ("ft-m", "ft-m@article=ft-m", "ice", "no-context=ice", "no-answer=ice", "script=ice"),
        (*_FT_M_ARTICLE, "no-context.with_context=false", "no-answer.sample_target=false", "script.variant=code"),
        data="wiki_counterfact",
        limit=12,
        convergence=True,
        full={"limit": None},
    ),
    "zsre-table": Preset(
        "Single edits of ZsRE in KnowEdit's form: editing against fine-tuning. Zhang et al. 2024, arXiv 2401.01286",
        ("ft-l", "ft-m", "rome", "memit", "ike", "kn", "serac", "mend"),
        data="knowedit-zsre",
        plan=_SAMPLED,
    ),
    "zsre-table-batch": Preset(
        "The same, 500 edits in one patch; give the whole file: --data knowedit-zsre:FILE",
        ("ft-l", "ft-m", "rome", "memit", "ike", "kn"),  # the bundled editors have learned from a part of that file
        data="knowedit-zsre",
        limit=500,
        plan={**_SAMPLED, "mode": "batch"},
    ),
}
