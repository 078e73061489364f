"""reknow and a checkout of EasyEdit side by side: same process, model, requests, prefixes, steps and covariance.

    python benchmarks/speed.py rome --easyedit PATH                  # on the bundled GPT-2-shaped model
    python benchmarks/speed.py rome --easyedit PATH --shape 124M     # on GPT-2's size, random weights
    python benchmarks/speed.py rome --easyedit PATH --model demo:smollm2   # on a model that others trained
    python benchmarks/speed.py rome --easyedit PATH --shape 7B       # on Llama's size, random, bf16, on a GPU
    python benchmarks/speed.py report                                # the tables of everything that was run

Parts: `rome`, `memit`, `evaluation`, `tuning`, `first` (the first edit of a model, statistics and contexts included),
`scaling` (reknow alone), `work` (operations and rates per phase).
Each writes a JSON file under `--out`; one that is there is not run again. Both sides take turns, fact by fact, in one
process and on one thread; seconds are processor time, so that other work on the machine counts little, and those of
the clock on a GPU. Not timed on either side, since both do it once per model: covariances, prefixes, layer. Our
settings hold on both: as EasyEdit takes learning rate and decay as plain numbers, it gets those that ours amount to
for each fact. Reliability, generalization and locality of both are read by reknow: teacher-forced, every token right.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from easyedit import EasyEdit, Made
from reknow import FT, ICE, LM, MEMIT, ROME, Edit, load_cases
from reknow.editing.covariance import statistics
from reknow.editing.layers import resolve_layer
from reknow.editing.papers_layers import band_around
from reknow.editing.search import ValueSearchMethod
from reknow.edits import Case
from reknow.evaluation.metrics import case_metrics
from reknow.evaluation.probing import read_cases
from reknow.model.generation import sample
from reknow.model.tokens import Text
from reknow.patching.patches import Patch
from reknow.tracing.known import known_cases
from speed_first import first
from speed_reading import evaluation
from speed_report import report
from speed_work import matmul_rate, onednn_rate, phases, timed, total_flops

FACTS = {
    "demo": {"rome": 20, "memit": 100, "tuning": 100},
    "124M": {"rome": 5, "memit": 5, "tuning": 4},
    "7B": {"rome": 5, "memit": 5, "work": 50},
    "model": {"rome": 5, "memit": 5, "tuning": 5, "work": 5},
}
"""Facts that EasyEdit runs. Its time is proportional to their number, so on the large shapes a few are enough."""
MANY = {"model": 30}
"""Where EasyEdit runs fewer facts of MEMIT, reknow runs this many besides: 20 where nothing else is said."""
LAYER = {"demo": 0, "124M": 4, "7B": 5}
"""The demo's is the one that `suggest_layer` finds; the others are at the depth at which the papers edit."""
COVARIANCE_TOKENS = 20_000
RATE = 5e-4
"""The published learning rate of fine-tuning."""
UNTIL = "reknow, until found"
"""Our default: at most 60 passes, each of which reads a fifth of the contexts (MEMIT: half), ended when every context
gives the answer a probability of 0.95, or has it as the most likely and the loss hardly falls any more."""
ALL_PASSES: dict[str, Any] = {"stop_probability": 1.0, "min_delta": 0.0}
EXACT: dict[str, Any] = {**ALL_PASSES, "context_batches": 1}
"""All passes, with all contexts in each, as in the papers; rate and decay stay the library's, free of the scale."""
LARGER = 0.3
"""A learning rate of MEMIT's search that needs fewer passes than its default of 0.1, for more generalization and less
locality; chosen on other facts (docs/log.md)."""
KINDS = ("reliability", "generalization", "locality")


def opened(shape: str) -> LM:
    if shape == "7B":
        return random_llama("cuda")
    demo = LM.demo("gpt2")
    if shape == "demo":
        return demo
    torch.manual_seed(0)
    return LM((GPT2LMHeadModel(GPT2Config()).eval(), demo.tokenizer))


def random_llama(device: str, **shape: int) -> LM:
    """A decoder of Llama's shape, by default its 7B, with random weights in bf16, and the demo tokenizer."""
    tokenizer = LM.demo("llama").tokenizer
    torch.manual_seed(0)
    # Tokens that this tokenizer does not have could not be read in sampled contexts.
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return LM((model, tokenizer))


def asked_cases(lm: LM, kind: str, count: int) -> list[Case]:
    """Facts of CounterFact: of a trained model those that it knows."""
    if kind not in ("demo", "model"):
        return load_cases("counterfact", limit=count)
    known: list[Case] = []
    every = load_cases("counterfact", limit=1000)
    for start in range(0, len(every), 100):
        if len(known) < count:
            known += known_cases(lm, every[start : start + 100])
    return known[:count]


class Quality:
    """What edits of each side score."""

    def __init__(self, lm: LM, cases: Sequence[Case]):
        self._lm = lm
        self._before = dict(zip(cases, read_cases(lm, cases, fluency=False), strict=True))
        self._found: dict[str, list[dict]] = {}

    def add(self, label: str, patch: Patch, cases: Sequence[Case]) -> None:
        with self._lm.patched(patch):
            after = read_cases(self._lm, cases, fluency=False)
        for case, now in zip(cases, after, strict=True):
            self._found.setdefault(label, []).append(case_metrics(now, self._before[case]))

    def table(self) -> dict[str, dict[str, float]]:
        def mean(found: Iterable[dict], kind: str) -> float:
            return round(100 * fmean(one[f"{kind}@teacher_forced_exact"] for one in found), 1)

        return {label: {kind: mean(found, kind) for kind in KINDS} for label, found in self._found.items()}


def plain(lm: LM, case: Case, layer: int, site: str, rate: float = 0.1, decay: float = 0.05) -> dict[str, float]:
    """Our scale-free learning rate and decay as the plain numbers that they are for this fact."""
    (row,) = lm.encode([Text.of(case.edit.prompt, case.edit.subject or "")])
    assert row.subject_last is not None
    names = {"block": lm.parts.blocks[layer], "value": lm.parts.value[layer]}
    found = lm.read([row], [row.subject_last], outputs=list(names.values())).outputs
    scale = found[names["block"]].square().mean().sqrt()
    return {"v_lr": rate * float(scale), "v_weight_decay": decay * float(found[names[site]].norm())}


def variants(same: ValueSearchMethod) -> dict[str, Any]:
    """Our ways to search: as many passes as the paper, the same with a part of the contexts in each, and ours."""
    own = type(same)
    until = replace(same, **{name: getattr(own, name) for name in ("steps", *EXACT)})
    return {
        "reknow": same,
        f"reknow, {own.context_batches} context batches": replace(same, context_batches=own.context_batches),
        UNTIL: until,
    }


def rome(lm: LM, theirs: EasyEdit, cases: list[Case], layer: int) -> dict:
    ours = ROME(layer=layer, covariance_tokens=COVARIANCE_TOKENS, steps=20, **EXACT)
    methods = variants(ours)
    prefixes = ours.contexts(lm)
    numbers = [plain(lm, case, layer, "value") for case in cases]

    def their(i: int, steps: int = ours.steps) -> Made:
        settings = {"v_num_grad_steps": steps, "clamp_norm_factor": ours.clamp, **numbers[i]}
        return theirs.rome(cases[i].edit, layer, prefixes, COVARIANCE_TOKENS, **settings)

    ours.edit(lm, [cases[0].edit])
    their(0, steps=2)
    quality, rows = Quality(lm, cases), []
    for i, case in enumerate(cases):
        row: dict = {"steps": {}}
        for label, method in methods.items():
            patch, row[label] = timed(lambda method=method, case=case: method.edit(lm, [case.edit]))
            row["steps"][label] = len(patch.notes["losses"])
            quality.add(label, patch, [case])
        made = their(i)
        quality.add("EasyEdit", made.patch, [case])
        row["EasyEdit"], row["steps"]["EasyEdit"] = made.seconds, made.steps[0]
        rows.append(row)
    edits = [case.edit for case in cases]
    for label, method in methods.items():
        patches, seconds = timed(lambda method=method: method.edit_each(lm, edits))
        for row, patch, case in zip(rows, patches, cases, strict=True):
            row[f"{label}, together"] = seconds / len(edits)
            row["steps"][f"{label}, together"] = len(patch.notes["losses"])
            quality.add(f"{label}, together", patch, [case])
    return {"layer": layer, "facts": rows, "quality": quality.table()}


def memit(lm: LM, theirs: EasyEdit, cases: list[Case], layer: int, many: list[Case], rates: Sequence[float]) -> dict:
    """All facts in one call on both sides, and `many` on ours.

    Args:
        rates: learning rates with which EasyEdit searches.
    """
    layers = band_around(lm, layer)
    statistics(lm, layers, tokens=COVARIANCE_TOKENS)  # of all layers in one pass
    ours = MEMIT(layers=tuple(layers), covariance_tokens=COVARIANCE_TOKENS, steps=25, **EXACT)
    prefixes = ours.contexts(lm)
    numbers = [plain(lm, case, layers[-1], "block") for case in cases]
    same = {key: fmean(one[key] for one in numbers) for key in numbers[0]}
    weight = effective_weight(lm, ours, cases, layers[0])
    ours = replace(ours, covariance_weight=weight)
    settings = {"mom2_update_weight": weight, "clamp_norm_factor": ours.clamp, **same}
    edits = [case.edit for case in cases]
    ours.edit(lm, edits[:1])
    theirs.memit(edits[:1], layers, prefixes, COVARIANCE_TOKENS, v_num_grad_steps=2, **settings)
    quality = Quality(lm, list(dict.fromkeys([*cases, *many])))
    found: dict = {"layers": layers, "weight": weight, "facts": len(cases), "steps": {}}
    ways = variants(ours)
    ways[f"{UNTIL}, learning rate {LARGER}"] = replace(ways[UNTIL], learning_rate=LARGER)
    for label, method in ways.items():
        patch, found[label] = timed(lambda method=method: method.edit(lm, edits))
        found["steps"][label] = fmean(map(len, patch.notes["losses"]))
        quality.add(label, patch, cases)
    for rate in rates:
        label = "EasyEdit" if rate == ours.learning_rate else f"EasyEdit, learning rate {rate}"
        settings["v_lr"] = same["v_lr"] * rate / ours.learning_rate
        made = theirs.memit(edits, layers, prefixes, COVARIANCE_TOKENS, v_num_grad_steps=ours.steps, **settings)
        quality.add(label, made.patch, cases)
        found[label], found["steps"][label] = made.seconds, fmean(made.steps)
    for label, method in ways.items() if many else ():
        if "until" in label and not known_cases(lm, many):
            continue  # with random weights nothing is found
        if len(rates) == 1 and label != UNTIL and known_cases(lm, many):
            continue  # of a large trained model what the library does
        patch, found[f"{label}, {len(many)} facts"] = timed(
            lambda method=method: method.edit(lm, [c.edit for c in many])
        )
        quality.add(f"{label}, {len(many)} facts", patch, many)
    found["quality"] = quality.table()
    return found


def effective_weight(lm: LM, method: MEMIT, cases: Sequence[Case], layer: int) -> float:
    """The λ that the scale-free regularization amounts to in the first layer, since EasyEdit takes a number."""
    from reknow.editing.keys import Subjects

    keys = Subjects(lm, [case.edit for case in cases], [""]).keys(layer)
    white = keys @ method.whitening(lm, layer)
    return float(method.regularization * white.square().sum(1).mean())


def tuning(lm: LM, theirs: EasyEdit, cases: list[Case], layer: int, *, ice: bool = True) -> dict:
    """FT-M with the published learning rate, fact by fact and all in one call; ICE beside it."""
    plain_ft, fast = FT(layer=layer, learning_rate=RATE, units="absolute"), FT(layer=layer)
    methods = {
        "reknow FT-M": plain_ft,
        "reknow FT-M, 25 steps": replace(fast, stop_loss=0.0),
        "reknow ICE, 25 steps": ICE(layers=(layer,), stop_loss=0.0),
        "reknow ICE, λ = 0, 25 steps": ICE(layers=(layer,), consistency_weight=0, stop_loss=0.0),
    }
    if not ice:
        methods = {"reknow FT-M": plain_ft}
    quality, rows = Quality(lm, cases), []
    for method in methods.values():
        method.edit(lm, [cases[0].edit])
    theirs.ft([cases[0].edit], layer, 2, RATE)
    for case in cases:
        row: dict = {"steps": {}}
        for label, method in methods.items():
            patch, row[label] = timed(lambda method=method, case=case: method.edit(lm, [case.edit]))
            row["steps"][label] = len(patch.notes["losses"])
            quality.add(label, patch, [case])
        made = theirs.ft([case.edit], layer, FT().steps, RATE)
        row["EasyEdit FT-M"], row["steps"]["EasyEdit FT-M"] = made.seconds, made.steps[0]
        quality.add("EasyEdit FT-M", made.patch, [case])
        rows.append(row)
    edits = [case.edit for case in cases]
    together = {}
    patches, seconds = timed(lambda: plain_ft.edit_each(lm, edits))
    together["reknow FT-M, side by side"] = {
        "seconds": seconds,
        "steps": fmean(len(p.notes["losses"]) for p in patches),
    }
    for patch, case in zip(patches, cases, strict=True):
        quality.add("reknow FT-M, side by side, together", patch, [case])
    patch, seconds = timed(lambda: plain_ft.edit(lm, edits))
    together["reknow FT-M"] = {"seconds": seconds, "steps": len(patch.notes["losses"])}
    quality.add("reknow FT-M, together", patch, cases)
    for size in (1, plain_ft.batch_size):
        made = theirs.ft(edits, layer, FT().steps, RATE, batch_size=size)
        label = f"EasyEdit FT-M, batches of {size}"
        together[label] = {"seconds": made.seconds, "steps": made.steps[0]}
        quality.add(f"{label}, together", made.patch, cases)
    found = {"layer": layer, "facts": rows, "together": together, "quality": quality.table()}
    return found | {"sampling": seconds_of_sampling(lm, cases[0].edit)} if ice else found


def seconds_of_sampling(lm: LM, edit: Edit) -> float:
    """What the texts cost that ICE draws in all its steps."""
    ice, asked = ICE(), lm.encode([Text(edit.text, edit.target_new)])

    def draw():
        drawn = torch.Generator()
        return sample(lm, asked, ice.sample_tokens, temperature=ice.temperature, top_k=ice.top_k, generator=drawn)

    return timed(lambda: [draw() for _ in range(ice.steps)])[1]


def scaling(lm: LM, name: str, layer: int, sizes: Sequence[int], data: Sequence[Path], **changes: int) -> dict:
    """Seconds of reknow alone for more and more facts: ROME one after the other, MEMIT all at once.

    ROME takes 20 passes for each: until found it takes more and more on a model that it has wrecked. So does MEMIT,
    25, where weights are random and nothing can be found.

    Args:
        data: EasyEdit's files of CounterFact; none: the bundled sample of 1,000.
        changes: other fields of the method.
    """
    cases = [case for file in data for case in load_cases("counterfact-easyedit", path=file)]
    edits = list({case.edit.text: case.edit for case in cases or load_cases("counterfact", limit=1000)}.values())
    rome = ROME(layer=layer, steps=20, covariance_tokens=COVARIANCE_TOKENS, **ALL_PASSES)
    memit = MEMIT(layers=tuple(band_around(lm, layer)), covariance_tokens=COVARIANCE_TOKENS)
    if not lm.name.startswith("demo"):
        memit = replace(memit, steps=25, **ALL_PASSES)
    method = replace({"ROME": rome, "MEMIT": memit}[name], **changes)
    method.edit(lm, edits[:1])
    rows = []
    for n in sizes:
        some = edits[:n]
        if lm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows.append({"facts": len(some), "seconds": timed(lambda some=some: method.edit(lm, some))[1]})
        if lm.device.type == "cuda":
            rows[-1]["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        print(rows[-1], flush=True)
    return {f"{name}, {method.steps} passes at most, {method.context_batches} context batches": rows}


def work(lm: LM, theirs: EasyEdit, cases: list[Case], layer: int) -> dict:
    """Operations of one ROME edit and of MEMIT on some facts, and how fast each phase of ours runs."""
    one = ROME(layer=layer, steps=20, covariance_tokens=COVARIANCE_TOKENS, **EXACT)
    many = MEMIT(layers=tuple(band_around(lm, layer)), steps=25, covariance_tokens=COVARIANCE_TOKENS, **EXACT)
    edits = [case.edit for case in cases]
    prefixes = one.contexts(lm)
    number = plain(lm, cases[0], layer, "value")
    settings = {"v_num_grad_steps": one.steps, "clamp_norm_factor": one.clamp, **number}
    theirs.rome(edits[0], layer, prefixes, COVARIANCE_TOKENS, **{**settings, "v_num_grad_steps": 2})
    found: dict = {"matmul GFLOP/s": matmul_rate(lm.weight(lm.parts.value[0])) / 1e9}
    if lm.device.type == "cpu" and lm.dtype == torch.float32:
        found["oneDNN GFLOP/s"] = onednn_rate() / 1e9
    made, flops = total_flops(lambda: theirs.rome(edits[0], layer, prefixes, COVARIANCE_TOKENS, **settings))
    seconds = theirs.rome(edits[0], layer, prefixes, COVARIANCE_TOKENS, **settings).seconds
    found["EasyEdit ROME"] = {"all": {"seconds": seconds, "flops": flops}}
    for label, method, some in (("ROME", one, edits[:1]), ("MEMIT", many, edits)):
        for way, searched in variants(method).items():
            searched.edit(lm, some[:1])
            found[f"{label}, {way}"] = phases(lambda searched=searched, some=some: searched.edit(lm, some))
    return {**found, "facts of MEMIT": len(edits), "steps": made.steps}


def machine() -> dict:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", choices=["rome", "memit", "evaluation", "tuning", "first", "scaling", "work", "report"]
    )
    parser.add_argument("--easyedit", type=Path, help="the folder of the checkout")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--shape", choices=list(LAYER), default="demo")
    where.add_argument("--model", help="a folder or name, instead of a shape")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    parser.add_argument("--layer", type=int, help="another layer than usual; of a model: than the library chooses")
    parser.add_argument("--facts", type=int, help="fewer facts than usual")
    parser.add_argument("--method", choices=["ROME", "MEMIT"], default="MEMIT", help="of `scaling`")
    parser.add_argument("--context-batches", type=int, help="of `scaling`: other than the method's")
    parser.add_argument("--steps", type=int, help="of `scaling`: other than usual")
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="of `scaling`: EasyEdit's counterfact-*.json"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="of `scaling`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "report":
        print(report(options.out))
        return
    if options.shape == "7B" and not torch.cuda.is_available():
        parser.error("expected a GPU for --shape 7B; got none: run it where torch.cuda.is_available()")
    kind = options.shape if options.model is None else "model"
    name = kind if options.model is None else Path(options.model).name.replace("demo:", "").replace("-", "_")
    where = "" if options.layer is None else f"-layer{options.layer}"
    changes = {key: value for key in ("context_batches", "steps") if (value := getattr(options, key)) is not None}
    if options.part == "scaling":
        where += "-".join(["", options.method, *map(str, options.sizes), *(f"{v}{k}" for k, v in changes.items())])
    file = options.out / f"{name}-{options.part}{where}.json"
    if file.exists():
        print(f"{file} is there already: delete it to run this part again")
        return
    lm = LM(options.model) if options.model else opened(kind)
    layer = resolve_layer(lm, LAYER.get(kind) if options.layer is None else options.layer)
    count = options.facts or FACTS[kind].get(options.part, 10)
    many = MANY.get(kind, 20) if options.part == "memit" and count < MANY.get(kind, 20) else 0
    cases = asked_cases(lm, kind, max(count, many))
    cases, many = cases[:count], cases[:many]
    if options.part == "scaling":
        found = scaling(lm, options.method, layer, options.sizes, options.data, **changes)
    else:
        if options.easyedit is None:
            parser.error("this part needs --easyedit, the folder of a checkout of EasyEdit")
        theirs = EasyEdit(options.easyedit, lm)
        if options.part == "evaluation":
            found = evaluation(lm, theirs, options.facts or 100)
        else:
            parts: dict = {"rome": rome, "memit": memit, "tuning": tuning, "first": first, "work": work}
            more: dict = {}
            if options.part == "memit":
                more = {"many": many, "rates": [MEMIT.learning_rate] + [LARGER] * (kind != "model")}
            elif options.part == "tuning":
                more = {"ice": kind != "model"}
            found = parts[options.part](lm, theirs, cases, layer, **more)
    about = {"command": " ".join(sys.argv[1:]), "date": time.strftime("%Y-%m-%d"), **machine()}
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"about": about, **found}, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
