"""A checkout of EasyEdit, run on reknow's model, requests, prefixes and covariance.

Only the modules of the methods and of the teacher-forced evaluation are loaded: the package's own `__init__` files,
which import every method, are passed over, and what those modules import but do not use here (data sets, judges,
trainers) is an empty module where it is not installed. Nothing of it is changed besides that its statistics and its
prefixes are given instead of computed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reknow import LM, Edit
from reknow.editing.covariance import covariance
from reknow.edits import Case
from reknow.evaluation.probing import SAMPLED_TOKENS
from reknow.model.parts import Conv1D
from reknow.patching.deltas import Dense
from reknow.patching.patches import Patch
from speed_work import now, timed

UNUSED = ("datasets", "nltk", "openai", "sklearn.metrics", "regex", "scipy", "matplotlib.style")
"""What its modules import and the parts run here never call."""


@dataclass(frozen=True)
class Made:
    """What one call of an editor gave."""

    patch: Patch
    seconds: float
    steps: list[int]
    """Passes of each fact's search, as counted from what it prints."""


class EasyEdit:
    """The checkout at `path`, working on `lm.model` itself, whose weights are put back after every edit."""

    def __init__(self, path: Path, lm: LM):
        _load(path)
        self.lm, self.path = lm, path
        self.tokenizer = copy.deepcopy(lm.tokenizer)
        self.tokenizer.padding_side = "right"  # as its editor sets it for these methods
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._name, self._device = lm.model.config.model_type, str(lm.device)
        self._modules = _modules(lm)
        self._statistics: Callable = importlib.import_module("easyeditor.models.rome.layer_stats").layer_stats

    def rome(self, edit: Edit, layer: int, prefixes: Sequence[str], tokens: int, **settings) -> Made:
        """Its ROME on one fact; `settings` are fields of its ROMEHyperParams."""
        main = importlib.import_module("easyeditor.models.rome.rome_main")
        main.__dict__["CONTEXT_TEMPLATES_CACHE"] = ["{}", *(_template(text) for text in prefixes[1:])]
        self._give_statistics(importlib.import_module("easyeditor.models.rome.compute_u"), tokens)
        hparams = main.ROMEHyperParams(
            **self._modules
            | self._common("ROME")
            | {"layers": [layer], "context_template_length_params": []}
            | settings
        )
        return self._edited([edit], main.apply_rome_to_model, [_request(edit)], hparams)

    def first(self, edit: Edit, layer: int, texts: Sequence[str], folder: Path) -> tuple[Made, dict[str, float]]:
        """Its ROME with contexts and statistics of its own, nothing kept of either, and the seconds of its parts.

        Its statistics read a data set of the hub, in whose place these texts are put; what they found lies in
        `folder` afterwards.
        """
        main = importlib.import_module("easyeditor.models.rome.rome_main")
        keys = importlib.import_module("easyeditor.models.rome.compute_u")
        reading = importlib.import_module("easyeditor.models.rome.layer_stats")
        reading.__dict__["load_dataset"] = lambda *_: {"train": [{"text": text} for text in texts]}
        main.__dict__["CONTEXT_TEMPLATES_CACHE"] = None
        keys.__dict__["inv_mom2_cache"].clear()
        parts = {"statistics": 0.0, "contexts": 0.0}

        def counted(part: str, run: Callable) -> Callable:
            def call(*args, **kwargs):
                found, seconds = timed(lambda: run(*args, **kwargs))
                parts[part] += seconds
                return found

            return call

        keys.__dict__["layer_stats"] = counted("statistics", self._statistics)
        own, main.__dict__["generate_fast"] = main.generate_fast, counted("contexts", main.generate_fast)
        settings = self._modules | self._common("ROME")
        settings |= {"mom2_n_samples": len(texts), "stats_dir": str(folder), "clamp_norm_factor": 4}
        settings |= {"layers": [layer], "context_template_length_params": [[5, 10], [10, 10]]}
        hparams = main.ROMEHyperParams(**settings, v_num_grad_steps=20, v_lr=0.5, v_weight_decay=0.5)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                made = self._edited([edit], main.apply_rome_to_model, [_request(edit)], hparams)
        finally:
            main.__dict__["generate_fast"], main.__dict__["CONTEXT_TEMPLATES_CACHE"] = own, None
        return made, parts | {"edit": made.seconds - sum(parts.values())}

    def memit(self, edits: Sequence[Edit], layers: Sequence[int], prefixes, tokens: int, **settings) -> Made:
        """Its MEMIT on all facts together; `settings` are fields of its MEMITHyperParams."""
        main = importlib.import_module("easyeditor.models.memit.memit_main")
        main.__dict__["CONTEXT_TEMPLATES_CACHE"] = [["{}"], [_template(text) for text in prefixes[1:]]]
        self._give_statistics(main, tokens)
        hparams = main.MEMITHyperParams(
            **self._modules | self._common("MEMIT") | {"layers": list(layers), "layer_selection": "all"} | settings
        )
        return self._edited(edits, main.apply_memit_to_model, [_request(edit) for edit in edits], hparams)

    def ft(self, edits: Sequence[Edit], layer: int, steps: int, rate: float, batch_size: int = 1) -> Made:
        """Its fine-tuning with the teacher-forced loss (FT-M)."""
        main = importlib.import_module("easyeditor.models.ft.ft_main")
        hparams = main.FTHyperParams(
            **self._modules,
            layers=[layer],
            num_steps=steps,
            lr=rate,
            weight_decay=0,
            kl_factor=0,
            norm_constraint=False,  # type: ignore[arg-type]
            device=self._device,  # type: ignore[arg-type]
            alg_name="FT",
            model_name=self._name,
            objective_optimization="target_new",
            batch_size=batch_size,
        )
        requests = [{**_request(edit), "prompt": edit.text} for edit in edits]
        made = self._edited(edits, main.apply_ft_to_model, requests, hparams, counted="Epoch")
        self.lm.model.requires_grad_(False)
        return made

    def quality(self, cases: Sequence[Case]) -> tuple[list[dict], float]:
        """Its teacher-forced scores of every case (token accuracy), and the seconds they took."""
        evaluate = importlib.import_module("easyeditor.evaluate.evaluate")
        hparams = types.SimpleNamespace(alg_name="ROME", max_length=40)
        records = [_record(case) for case in cases]
        name, device = self._name, self._device
        start = now()
        found = [
            evaluate.compute_edit_quality(self.lm.model, name, hparams, self.tokenizer, record, device)
            for record in records
        ]
        return found, now() - start

    def fluency(self, cases: Sequence[Case]) -> float:
        """Seconds of sampling its text of 100 tokens, prompt included, behind every request, case by case."""
        generate = importlib.import_module("easyeditor.util.generate").generate_fast
        start = now()
        for case in cases:
            generate(self.lm.model, self.tokenizer, [case.edit.text], max_out_len=SAMPLED_TOKENS)
        return now() - start

    def _common(self, name: str) -> dict:
        return {
            "fact_token": "subject_last",
            "v_loss_layer": self.lm.layers - 1,
            "kl_factor": 0.0625,
            "mom2_adjustment": True,
            "mom2_dataset": "wikipedia",
            "mom2_n_samples": 0,
            "mom2_dtype": "float32",
            "alg_name": name,
            "device": self._device,
            "model_name": self._name,
            "stats_dir": "",
        }

    def _give_statistics(self, module, tokens: int) -> None:
        """Its covariances are ours; it keeps them, so only its first edit of a layer reads them."""

        def given(_model, _tokenizer, name: str, *_, **__):
            found = covariance(self.lm, self.lm.parts.value.index(name), tokens=tokens)
            return types.SimpleNamespace(mom2=types.SimpleNamespace(moment=lambda: found))

        module.layer_stats = given

    def _edited(self, edits: Sequence[Edit], apply, requests, hparams, counted: str = "loss ") -> Made:
        """Runs an editor, takes its change off the model again and gives it as a patch."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            start = now()
            model, before = apply(self.lm.model, self.tokenizer, requests, hparams, return_orig_weights=True)
            seconds = now() - start
        deltas = {}
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, old in before.items():
                matrix = name.removesuffix(".weight")
                if matrix in self.lm.parts.value:  # its fine-tuning trains the bias too
                    change = (weights[name] - old).float()
                    turned = isinstance(model.get_submodule(matrix), Conv1D)
                    deltas[matrix] = Dense((change.T if turned else change).clone())
                weights[name].copy_(old)
        patch = Patch(hparams.alg_name.lower(), {}, tuple(edits), deltas, self.lm.fingerprint)
        return Made(patch, seconds, _passes(printed.getvalue(), counted))


def _passes(printed: str, counted: str) -> list[int]:
    """How many passes it reports for each search."""
    steps: list[int] = []
    for line in printed.splitlines():
        if line.startswith(("Computing right vector", "Weights to be updated")):
            steps.append(0)
        elif line.startswith(counted):
            steps[-1] += 1
    return steps


def _modules(lm: LM) -> dict[str, str]:
    """The names of a decoder's parts, as its settings give them."""
    head, value = lm.model.get_output_embeddings(), lm.parts.value[0]
    names = {
        "rewrite_module_tmp": value,
        "layer_module_tmp": lm.parts.blocks[0],
        "mlp_module_tmp": value.rpartition(".")[0],
        "attn_module_tmp": lm.parts.attention_out[0].rpartition(".")[0],
    }
    every = {key: f"{name}.".replace(".0.", ".{}.", 1)[:-1] for key, name in names.items()}
    # It looks the matrix up among the parameters, where one that is tied to the embedding has that name.
    matrix = next(name for name, weight in lm.model.named_parameters() if weight is head.weight)
    return every | {"ln_f_module": lm.parts.final_norm[-1], "lm_head_module": matrix.removesuffix(".weight")}


def _template(prefix: str) -> str:
    return prefix.replace("{", " ").replace("}", " ") + "{}"


def _request(edit: Edit) -> dict:
    return {"prompt": edit.prompt, "subject": edit.subject, "target_new": edit.target_new, "case_id": edit.id}


def _record(case: Case) -> dict:
    """The case in its form: the request, one rephrasing, and the other facts."""
    rephrased = [probe for probe in case.probes if probe.kind == "generalization"]
    others = [probe for probe in case.probes if probe.kind == "locality"]
    facts = {"prompt": [probe.prompt for probe in others], "ground_truth": [probe.answers[0] for probe in others]}
    return {
        "prompt": case.edit.text,
        "target_new": case.edit.target_new,
        "ground_truth": case.edit.target_true,
        "rephrase_prompt": rephrased[0].prompt,
        "locality": {"neighborhood": facts},
    }


def _load(path: Path) -> None:
    """Makes `easyeditor.…` importable, module by module."""
    if "easyeditor" in sys.modules:
        return
    if not (path / "easyeditor" / "models" / "rome" / "rome_main.py").is_file():
        raise SystemExit(f"expected a checkout of EasyEdit at {path}; there is none: give its folder with --easyedit")
    for name in (
        "easyeditor",
        "easyeditor.models",
        "easyeditor.models.melo",
        "easyeditor.util",
        "easyeditor.evaluate",
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(path / name.replace(".", "/"))]
        sys.modules[name] = package
    for name in UNUSED:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            sys.modules[name] = _empty(name)
    sys.modules["easyeditor.trainer"] = types.ModuleType("easyeditor.trainer")
    sys.modules["easyeditor.models.melo.melo"] = _empty("easyeditor.models.melo.melo")
    # Its `util/__init__` would load every method; the evaluation wants one name of it.
    settings = importlib.import_module("easyeditor.util.hparams")
    sys.modules["easyeditor.util"].HyperParams = settings.HyperParams  # type: ignore[attr-defined]


def _empty(name: str) -> types.ModuleType:
    """A module in which every name is an empty class."""
    module = types.ModuleType(name)
    module.__getattr__ = lambda attribute: type(attribute, (), {})  # type: ignore[method-assign]
    module.__path__ = []
    return module
