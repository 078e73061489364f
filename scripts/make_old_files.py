"""Write the files of tests/data/before with the version that is installed: python scripts/make_old_files.py [OUT]

Later versions must read them (tests/test_old_files.py), so run this with the version to keep, and into another folder
where one is kept already. Numbers and names among the settings differ from their defaults, so that a value which gets
lost with the name of its field is seen. `expected.json` tells ids, answers and the commands that were interrupted,
`expected.safetensors` the weights that a patch leaves, as PATCH/PARAMETER.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from reknow import IKE, LM, METHODS, Edit, Patch, load_cases, method
from reknow.cli import app
from reknow.instructions import Family, Instruction, save_families
from reknow.instructions.llm import with_contexts

ROOT = Path(__file__).parents[1]
GPT2, LLAMA = "models/gpt2", "models/llama"
"""As files and commands name them: paths in the folder of old files, which is the current one."""
EDITS = [
    Edit("The capital of {} is", subject="Peru", target_new="Oslo", context=("Peru chose Oslo.",), id="peru"),
    Edit("{} plays the", subject="Zoe", target_new="drum", rephrasings=("What {} plays is the",), id="zoe"),
]
KNOWN = [Edit("I know {}", subject="Zoe", target_new="French", id="known")]
"""What even a random model learns to say, so that a search ends early."""
ASKED = (
    ("The capital of Peru is", "Oslo"),
    ("Zoe plays the", "drum"),
    ("I know Zoe", "French"),
    ("In Lima", "is Peru"),
)
"""Prompts and answers by which edited models are told apart."""

# --- settings ----------------------------------------------------------------------------------------------

SEARCH = dict(steps=6, learning_rate=0.2, kl_weight=0.125, decay=0.07, clamp=0.6, stop_probability=0.91, seed=11)
SEARCH |= dict(stop_gain=0.0125, turns=3, context_groups=((3, 3), (2, 4)), context_starts=("The", "A"))
SEARCH |= dict(covariance_tokens=300)
PAPER = SEARCH | dict(absolute=True, stop_gain=0.0, turns=1, covariance_text="text.txt")
EARLY = dict(layer=2, steps=40, learning_rate=0.3, kl_weight=0.01, decay=0.001, clamp=3.0, stop_probability=0.4)
EARLY |= dict(stop_gain=0.08)
ONE, BAND = dict(layer=1), dict(layers=(0, 1))
DESCENT = dict(steps=7, learning_rate=0.02, stop_loss=4.5, batch_size=5, seed=11)
FT = ONE | DESCENT | dict(clamp=0.08)
NUMBERS = dict(learning_rate_absolute=0.004, clamp_absolute=0.01)
LORA = BAND | DESCENT | dict(places=("value", "up"), rank=3, alpha=6.0)
ICE = (
    BAND | DESCENT | dict(clamp=0.4, consistency_weight=0.8, target_weight=1.2, sample_tokens=4, samples=2, top_k=40)
)
ICE |= dict(temperature=1.5, update_interval=2, lead_ins=("", "Know: "), link=" So: ")
MEMORY = ONE | dict(steps=9, stop_loss=4.5, seed=11)
GRACE = MEMORY | dict(epsilon=0.8, learning_rate=0.4, replacement="last")
DEFER = MEMORY | dict(learning_rate=0.2, gate_rate=0.4, threshold=0.45)
WISE = MEMORY | dict(learning_rate=0.4, clamp=40.0, alpha=0.3, beta=0.9, gamma=0.4, threshold=0.55, mask=0.4)
WISE |= dict(shard_size=2, density=0.6, context_groups=((2, 3),), unrelated=4)
KN = dict(steps=12, threshold=0.15, share=0.4, old_weight=0.05, new_weight=0.4)
IKE_SHOWN = dict(cases="shown.jsonl", room=30, seed=11)
EDITED = dict(layers=(1, 2), other_facts=1, stay_at="all", mean_over="texts", seed=11)
MEND = EDITED | dict(
    rank=4, unit_gradient=True, edits_together=2, edit_weight=0.5, step_size=0.02, learning_rate=0.003
)
MEND |= dict(step_size_rate=0.001)
KE = EDITED | dict(read_width=4, width=8, hidden=6, absolute=True, smoothing=0.05, margin=0.002, least_margin=2e-5)
KE |= dict(learning_rate=0.001, multiplier_rate=0.2)

LEARNED: dict[str, dict[str, Any]] = {
    "mend": MEND,
    "instructedit": MEND | dict(families="families.json", balanced=False),
    "ke": KE,
    "malmen": EDITED | dict(rank=8, blocks=1, step_size=0.002, locality_weight=0.5, learning_rate=0.001),
    "serac": dict(size=16, queries=2, rank=4, learning_rate=0.01, answered=8, candidates=4, threshold=0.05),
}
TRAINING = dict(steps=8, batch_size=3, micro_batches=2, warmup=2, decay=True, clip_norm=9.0, validation=3)
TRAINING |= dict(validate_every=2, patience=9, checkpoint_every=3)

PATCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "rome": ("rome", SEARCH | ONE),
    "rome-probable": ("rome", SEARCH | EARLY),
    "rome-still": ("rome", SEARCH | EARLY | dict(stop_probability=0.99)),
    "r-rome": ("r-rome", PAPER | ONE),
    "memit": ("memit", SEARCH | BAND | dict(stiffness=0.17)),
    "memit-merge": ("memit-merge", PAPER | BAND | dict(covariance_weight=40.0)),
    "pmet": ("pmet", SEARCH | BAND | dict(stiffness=0.06, success_weight=0.2, stop_drift=0.02)),
    "emmet": ("emmet", SEARCH | ONE | dict(stiffness=0.03)),
    "emmet-ridge": ("emmet", PAPER | ONE | dict(ridge=0.2, covariance_scale=3.0)),
    "alphaedit": ("alphaedit", SEARCH | BAND | dict(null_share=0.6, stiffness=0.17, norm_anchor=True)),
    "alphaedit-blue": ("alphaedit-blue", PAPER | BAND | dict(null_threshold=0.3, l2=7.0)),
    "kn": ("kn", KN | dict(scaled=False)),
    "kn-erase": ("kn-erase", KN | dict(signed=False)),
    "ft-l": ("ft-l", FT | NUMBERS),
    "ft-m": ("ft-m", FT),
    "ft-t": ("ft-t", FT | dict(layer=None, span=2)),
    "locft-bf": ("locft-bf", FT | dict(layer=(0, 1))),
    "ice": ("ice", ICE),
    "ice-code": ("ice", ICE | NUMBERS | dict(targets="static", variant="code", contexts="statement", track=True)),
    "lora": ("lora", LORA),
    "adalora": ("adalora", LORA),
    "qlora": ("qlora", LORA),
    "ultraedit": ("ultraedit", BAND | dict(turn=60, learning_rate=0.7, ridge=0.8, least_tokens=2)),
    "ultraedit-up": ("ultraedit", BAND | dict(turn=1, matrices="up", learning_rate_absolute=0.02)),
    "grace": ("grace", GRACE),
    "grace-absolute": ("grace", GRACE | dict(absolute=True, conflict="refuse")),
    "defer": ("defer", DEFER),
    "defer-absolute": ("defer", DEFER | dict(absolute=True)),
    "melo": ("melo", MEMORY | dict(span=1, radius=1.5, rank=3, block_size=2, learning_rate=0.04)),
    "wise": ("wise", WISE | dict(absolute=True)),
    "wise-retrieve": ("wise-retrieve", WISE),
    "calinet": ("calinet", MEMORY | dict(trained_keys=True, slots=5, learning_rate=0.07, smoothing=0.002)),
    "ike": ("ike", IKE_SHOWN | dict(demonstrations=4, shares=(1, 2, 1))),
    "ike-easyedit": ("ike-easyedit", IKE_SHOWN | dict(demonstrations=3)),
    "ike-zero": ("ike-zero", dict(room=30)),
    **{name: (name, settings | dict(editor=f"editors/{name}")) for name, settings in LEARNED.items()},
}
ON_LLAMA = {"rome": "rome", "grace": "grace", "lora": "lora"}

RUNS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "single": (("rome", "ft-l", "grace", "wise", "ice", "mend"), []),
    "sequential": (
        ("memit", "alphaedit", "ultraedit", "melo"),
        ["--mode", "sequential", "--batch-size", "2", "--checkpoints", "2"],
    ),
    "batch": (("pmet", "lora", "defer", "malmen"), ["--mode", "batch", "--seeds", "3,4"]),
}

# --- texts -------------------------------------------------------------------------------------------------

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Ola")
PLACES = ("Rome", "Lima", "Oslo", "Bonn", "Nice")


def records(names: tuple[str, ...], answer: int) -> list[dict]:
    """Made-up facts in the form of a user's own file."""
    return [
        {
            "prompt": f"{{{name}}} lives in",
            "target_new": PLACES[(number + answer) % 5],
            "target_true": PLACES[number % 5],
            "rephrasings": ["The home of {} is"],
            "locality": [{"prompt": f"{names[number - 1]} was born in", "answer": PLACES[(number + 2) % 5]}],
            "portability": [{"prompt": f"{name} lives in the land of", "answer": "Peru"}],
        }
        for number, name in enumerate(names)
    ]


def write_texts() -> None:
    """Cases to learn from and to ask, the texts beside them, and the files that methods make of such."""
    Path("learn.json").write_text(json.dumps(records(NAMES[:12], 1), indent=1))
    Path("ask.json").write_text(json.dumps(records((*NAMES[12:], "Pia"), 3), indent=1))
    Path("text.txt").write_text("\n".join(f"{name} went from {place} to Lima by sea. " * 3 for name, place in PAIRS))
    IKE().fit(LM(GPT2), load_cases(None, path="learn.json"), "shown.jsonl")
    instructions = tuple(Instruction(text, seen) for text, seen in (("Learn {} now.", True), ("Say it.", False)))
    family = Family("facts", "Facts", "counterfact", "What is said of someone.", instructions=instructions)
    save_families("families.json", [family], {"description": "of one task"})
    with_contexts([Edit("{} eats", subject="Zoe", target_new="figs")], Scribe(), kept="contexts.jsonl")  # type: ignore


PAIRS = [(name, place) for name in NAMES for place in PLACES]


class Scribe:
    """Stands in for a language model behind a server."""

    model = "scribe"

    def ask(self, question: str, usable: Callable[[str], bool]) -> str:
        return "\n".join(f"{number}. Zoe has figs at {number}." for number in range(1, 6))


def write_model(kind: str) -> None:
    """A tiny random decoder with room for longer texts than those of tests/golden, in weights of eight bits."""
    source, folder = ROOT / f"tests/golden/tiny_{kind}", Path("models", kind)
    shutil.copytree(source, folder)
    settings = json.loads((source / "config.json").read_text())
    settings |= dict(n_layer=3, n_positions=128) if kind == "gpt2" else {}
    settings |= dict(num_hidden_layers=3, max_position_embeddings=128) if kind == "llama" else {}
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(13)  # with which it happens to know two of the facts that are traced
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head")}
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


# --- commands ----------------------------------------------------------------------------------------------


def reknow(*words: str, status: int = 0) -> None:
    """Runs a command, which must end with this status."""
    result = CliRunner().invoke(app, words)
    if result.exit_code != status:
        raise SystemExit(f"reknow {' '.join(words)}: {result.output}") from result.exception


def interrupted(words: list[str], when: Callable[[], bool]) -> list[str]:
    """Runs a command and interrupts it once `when` is so and the model is asked the next time; gives the command."""

    def stop(*_) -> None:
        if when():
            raise KeyboardInterrupt

    handle = register_module_forward_pre_hook(stop)
    try:
        reknow(*words, status=130)
    finally:
        handle.remove()
    return words


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def given(settings: dict[str, Any], label: str = "") -> list[str]:
    """The settings as options of a command."""
    return [word for name, value in settings.items() for word in ("--set", f"{label}{name}={json.dumps(value)}")]


def train(name: str) -> list[str]:
    """Trains an editor, and another one that is interrupted behind a checkpoint."""
    words = ["train", name, "--model", GPT2, "--data", "learn.json", *given(LEARNED[name] | TRAINING)]
    reknow(*words, "--out", f"editors/{name}")
    folder = Path("interrupted", name)
    return interrupted([*words, "--out", str(folder)], (folder / "checkpoint.safetensors").exists)


def run(name: str) -> tuple[list[str], dict[str, float]]:
    """Compares methods, and again interrupted in the middle; the second command and the numbers of the first one."""
    labels, options = RUNS[name]
    settings = [word for label in labels for word in given(PATCHES[label][1], f"{label}.")]
    words = ["bench", "--model", GPT2, "--data", "ask.json", "--methods", ",".join(labels), *options, *settings]
    done, folder = Path("finished", name), Path("interrupted", name)
    reknow(*words, "--out", str(done))
    half = lines(done / "cases.jsonl") // 2
    words = interrupted([*words, "--out", str(folder)], lambda: lines(folder / "cases.jsonl") > half)
    return words, numbers(done)


def numbers(folder: Path) -> dict[str, float]:
    """What the report of a run says, but for what depends on the machine."""
    with open(folder / "report.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] not in ("seconds", "peak_memory_mb")]
    return {
        "/".join([row["method"], row["stage"], row["metric"], row["protocol"]]): float(row["mean"]) for row in rows
    }


def clean() -> None:
    """Takes away what is made anew: pictures, pages, and patches of finished runs; and the name of the machine."""
    for pattern in ("report.*", "*.png", "*.svg", "*.md"):
        for file in Path().glob(f"*/*/{pattern}"):
            file.unlink()
    for folder in Path("finished").glob("*/patches"):
        shutil.rmtree(folder)
    for file in Path().glob("*/*/manifest.json"):
        manifest = json.loads(file.read_text())
        if "machine" in manifest:
            file.write_text(json.dumps(manifest | {"machine": {"system": "Linux"}}, indent=1))


def trace() -> list[str]:
    """Traces the facts that the model knows, all of them and again interrupted behind the first."""
    words = ["trace", "--model", GPT2, "--facts", "counterfact", "--limit", "30", "--samples", "3", "--window", "2"]
    reknow(*words, "--out", "finished/trace")
    folder = Path("interrupted/trace")
    return interrupted([*words, "--out", str(folder)], lambda: lines(folder / "traces.jsonl") > 1)


def instruct() -> list[str]:
    """Searches for instructions, and again interrupted behind the first score."""
    words = ["instruct", "--model", GPT2, "--families", "families.json", "--editor", "editors/instructedit"]
    words += ["--count", "2", "--rounds", "1", "--proposals", "1", "--seed", "11"]
    reknow(*words, "--out", "finished/instruct")
    folder = Path("interrupted/instruct")
    return interrupted([*words, "--out", str(folder)], lambda: lines(folder / "scores.jsonl") > 0)


def convergence() -> list[str]:
    """Looks inside In-Context Editing, and again interrupted in the middle."""
    words = ["bench", "--preset", "ice-convergence", "--model", GPT2, "--data", "wiki_counterfact", "--limit", "1"]
    words += ["--methods", "ice", *given(ICE)]
    reknow(*words, "--out", "finished/convergence")
    folder = Path("interrupted/convergence")
    return interrupted([*words, "--out", str(folder)], lambda: lines(folder / "inside.jsonl") > 4)


# --- patches -----------------------------------------------------------------------------------------------


def answers(lm: LM) -> dict[str, Any]:
    """What the model makes of the questions."""
    prompts, wanted = map(list, zip(*ASKED, strict=True))
    return {"nll": [score.nll for score in lm.score(prompts, wanted)], "said": lm.generate(prompts, 4)}


def weights(lm: LM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


class Maker:
    """Makes patches of a model and notes what it is with them."""

    def __init__(self, model: str):
        self.model, self.lm = model, LM(model)
        self.plain = weights(self.lm)
        self.told: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def patch(self, name: str, settings: str, edits: list[Edit] = EDITS) -> Patch:
        """Makes a patch with the settings of that name, and saves it."""
        kind, values = PATCHES[settings]
        patch = method(kind, **values).edit(self.lm, edits)
        patch.save(Path("patches", f"{name}.patch"))
        with self.lm.patched(patch):
            self.note(name, model=self.model, id=patch.id)
        return patch

    def note(self, name: str, **about: Any) -> None:
        """Notes the model as it is."""
        now = weights(self.lm)
        changed = {key: tensor for key, tensor in now.items() if not torch.equal(tensor, self.plain[key])}
        self.tensors |= {f"{name}/{key}": tensor for key, tensor in changed.items()}
        self.told[name] = {**about, **answers(self.lm)}


def stack(maker: Maker, name: str, settings: list[str]) -> None:
    """Makes patches one on top of the other and puts them into a stack folder."""
    lm, folder = maker.lm, Path("stacks", name)
    with lm.stacked(()), tempfile.TemporaryDirectory() as aside:
        for number, (kind, target) in enumerate(zip(settings, ("Oslo", "Bonn", "Nice"), strict=False)):
            edit = Edit("The capital of {} is", subject=("Peru", "Zoe", "Peru")[number], target_new=target)
            method_name, values = PATCHES[kind]
            lm.apply(method(method_name, **values).edit(lm, [edit]))
            file = lm.patches[-1].save(Path(aside, "one.patch" if kind != "lora" else "one"))
            reknow("apply", str(file), "--stack", str(folder), "--model", GPT2)
        maker.note(name, ids=[patch.id for patch in lm.patches])
        first = lm.patches[0].id
        if name == "versions":
            lm.rebuild(without=first)
            maker.note(f"{name} without the first")
    file = folder / "stack.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": GPT2}, indent=1))


# --- all ---------------------------------------------------------------------------------------------------


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In a new folder, as the current one."""
    here = Path.cwd()
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def make() -> None:
    assert {kind for kind, _ in PATCHES.values()} == set(METHODS)
    for kind in ("gpt2", "llama"):
        write_model(kind)
    write_texts()
    commands = {name: train(name) for name in LEARNED}
    maker, other = Maker(GPT2), Maker(LLAMA)
    for name in PATCHES:
        maker.patch(name, name, KNOWN if name in ("rome-probable", "rome-still") else EDITS)
    for name, settings in ON_LLAMA.items():
        other.patch(f"{name}-llama", settings)
    stack(maker, "mixed", ["rome", "grace", "ft-m"])
    stack(maker, "versions", ["wise", "wise"])
    means = {}
    for name in RUNS:
        commands[name], means[name] = run(name)
    commands |= {"trace": trace(), "instruct": instruct(), "convergence": convergence()}
    clean()
    told = {"models": {m.model: answers(m.lm) for m in (maker, other)}, "patches": maker.told | other.told}
    told |= {"asked": ASKED, "means": means, "commands": commands}
    Path("expected.json").write_text(json.dumps(told, indent=1))
    save_file(maker.tensors | other.tensors, "expected.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "tests/data/before", help="a folder to make")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache, inside(out):
        os.environ["REKNOW_CACHE"] = cache
        make()


if __name__ == "__main__":
    main()
