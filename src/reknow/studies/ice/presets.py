"""The tables and figures of In-Context Editing (Qi et al. 2024, arXiv 2406.11194) as settings of a run."""

from __future__ import annotations

from reknow.evaluation.plan import Plan
from reknow.studies.preset import Preset, Selection, Size, Variant, plain

__all__ = ["CONVERGENCE", "ICE_PRESETS"]

_PAPER = "Qi et al. 2024, arXiv 2406.11194"
_KNOWEDIT = "wiki_recent,knowedit-zsre,wiki_counterfact,wikibio"
_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_ARTICLE = {"span": 5, "clamp": 0.12}
"""Fine-tuning as in the article's repository (`hparams/FT`): ICE's layers, rate and bound."""
_FT_M_ARTICLE = Variant("ft-m@article", "ft-m", _ARTICLE)
"""What λ = 0 leaves of ICE."""
_FT_L_ARTICLE = Variant("ft-l@article", "ft-l", _ARTICLE)
"""Differs from FT-M in the loss alone there."""
_ICE, *_ = plain("ice")
_NO_CONTEXT = Variant("no-context", "ice", {"with_context": False})
_NO_ANSWER = Variant("no-answer", "ice", {"sample_target": False})
_SCRIPT = Variant("script", "ice", {"variant": "code"})
_TWO_SETS = Selection("wiki_recent,wiki_counterfact", 15, probes_per_name=2)
_ALL_CASES = Selection(_KNOWEDIT, None)

CONVERGENCE = "ice-convergence"
"""The preset that compares no answers but shows what happens inside ICE, see `convergence`. Of all others PPL_r is
also measured as the article's script computes it."""

ICE_PRESETS: dict[str, Preset] = {
    "ice-table": Preset(
        f"Single edits: In-Context Editing against fine-tuning, ROME and MEMIT. {_PAPER}, Table 1",
        (_ICE, _FT_M_ARTICLE, _FT_L_ARTICLE, *plain("ft-m", "ft-l", "ft-t", "memit", "rome")),
        Size(
            Selection(f"{_KNOWEDIT},counterfact", 16, {"wikibio": 4}, probes_per_name=2),
            Plan(fluency=True, in_context=("ice",)),
        ),
        Size(Selection(f"{_KNOWEDIT},counterfact", None), Plan(fluency=True, in_context=("ice",), seeds=(0, 1, 2))),
    ),
    "ice-ablation": Preset(
        f"What ICE is made of: target, context, sampling, temperature, introductions. {_PAPER}, Tables 2 and 4",
        (
            _ICE,
            Variant("static", "ice", {"targets": "static"}),
            _NO_CONTEXT,
            Variant("static-no-context", "ice", {"targets": "static", "with_context": False}),
            _FT_M_ARTICLE,
            _NO_ANSWER,
            Variant("t0.1", "ice", {"temperature": 0.1}),
            Variant("t10", "ice", {"temperature": 10.0}),
            Variant("t100", "ice", {"temperature": 100.0}),
            Variant("bare-context", "ice", {"context_introductions": ("",)}),
            Variant("space", "ice", {"context_separator": " "}),
            Variant("now", "ice", {"context_separator": " Now: "}),
            _SCRIPT,
        ),
        Size(_TWO_SETS, Plan(fluency=True)),
        Size(_ALL_CASES, Plan(fluency=True, seeds=(0, 1, 2))),
    ),
    "ice-lambda": Preset(
        f"How much consistency: λ from 0, plain fine-tuning, upwards. {_PAPER}, Table 3",
        tuple(Variant(f"lambda-{weight:g}", "ice", {"consistency_weight": weight}) for weight in _WEIGHTS),
        Size(_TWO_SETS, Plan(seeds=(0, 1))),
        Size(_ALL_CASES, Plan(fluency=True, seeds=(0, 1, 2))),
    ),
    "ice-continual": Preset(
        f"300 edits one after the other, all kept, read right after each and after all. {_PAPER}, Table 5",
        (_ICE, _FT_M_ARTICLE, _FT_L_ARTICLE, *plain("ft-m", "ft-l", "memit", "rome")),
        Size(
            Selection(_KNOWEDIT, 100, {"wiki_counterfact": 90, "wikibio": 10}, probes_per_name=2, one_run=True),
            Plan("sequential", checkpoints=(100, 200), fluency=True, fluency_every=10),
        ),
        Size(_ALL_CASES, Plan("sequential", fluency=True)),
    ),
    CONVERGENCE: Preset(
        f"Losses at each step by temperature and target; the consistency condition. {_PAPER}, Figures 2 and 3",
        (*plain("ft-m"), _FT_M_ARTICLE, _ICE, _NO_CONTEXT, _NO_ANSWER, _SCRIPT),
        Size(Selection("wiki_counterfact", 12)),
        Size(Selection("wiki_counterfact", None)),
    ),
}
