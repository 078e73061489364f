"""Every kind of file, damaged in a few thousand ways: what is read can be used, or it is refused in a sentence.

`REKNOW_FUZZ=N` reads N times as many damaged files, others than by default; `-k` and the seed that a failure names
bring a single one back.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from conftest import bits, make_lm, same, some_patch
from learned import trained
from mutations import altered, bent, damaged, flipped, lines, one_json, table, unsealed
from reknow import FT, LM, METHODS, Case, Edit, Patch, Probe, load_cases, method
from reknow.cli.terminal import visible
from reknow.cli.tracing import read_traces
from reknow.contract import Method
from reknow.datasets import DATASETS, FACTS, load_edits, load_facts
from reknow.datasets.families import load_card, load_families, save_families
from reknow.datasets.text import sample_text, text_source
from reknow.editing.covariance import statistics
from reknow.editing.layer_choice import _read as read_layers
from reknow.errors import ReknowError
from reknow.evaluation import Plan, Results, bench
from reknow.files.tensors import write_tensors
from reknow.instructions.llm import read_contexts
from reknow.learning.editors import Editor
from reknow.patching.peft_folder import REST, WEIGHTS, describe_base
from reknow.patching.stack import STACK_FILE, read_stack, save_stack
from reknow.report import contents
from reknow.report.page import render_page
from reknow.tracing.causal import Tracing, trace_prompt

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("REKNOW_FUZZ", "0"))
MEMORY, SECONDS = 2**30, 60
"""Bytes that reading files may take beside what the process has, in virtual memory; time for a single one."""
GROWTH = 200 * 2**10
"""Kilobytes by which the process may grow, however many damaged files it reads."""

EDIT = Edit("The capital of {} is", subject="Peru", target_new="Paris")
PROMPTS = ["The capital of Peru is", "Who is Danielle ? She is", "The capital of France"]
QUICK: dict[str, dict] = {
    "grace": dict(layer=1, steps=2),
    "defer": dict(layer=1, steps=2),
    "melo": dict(layer=1, steps=2),
    "wise": dict(layer=1, steps=2, context_groups=((1, 2),), unrelated_facts=2),
    "wise-retrieve": dict(layer=1, steps=2, context_groups=((1, 2),), unrelated_facts=2, shard_size=1),
    "memoir": dict(layer=1, steps=2, context_groups=((1, 2),)),
    "calinet": dict(layer=1, steps=2),
    "ultraedit": dict(layers=(1, 2)),
    "stableedit": dict(layers=(1, 2), warm_up_edits=8),
    "simie": dict(base="ft-m", base_settings='{"layer": 1, "steps": 2}'),
}
"""Settings that take a fraction of a second."""
ALIKE = {"ike-easyedit", "alphaedit-blue", "betaedit", "evoedit", "sphere", "memit-fe", "memit-merge", "pmet"}
"""Rows whose patches are made as another row's."""
KEEPING = [name for name, row in METHODS.items() if row.method.state_spec is not None and name not in ALIKE]
"""Methods whose patches keep more than ΔW."""


def seeds(count: int) -> range:
    """Of the damaged files of one kind."""
    return range(count, count * (1 + TIMES)) if TIMES else range(count)


@cache
def model() -> LM:
    return make_lm()


@pytest.fixture(autouse=True, scope="module")
def bounded():
    """No reader takes much memory: neither at once, which the system refuses, nor bit by bit."""
    model(), trained("serac", "gpt2"), trained("mend", "gpt2")
    limits, used = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used * os.sysconf("SC_PAGE_SIZE") + MEMORY, limits[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH


@contextmanager
def refusable(what: str, taken: list[bool]) -> Iterator[None]:
    """Lets through what the library refuses in one line, and nothing else; notes whether it was read."""

    def late(*_):
        raise TimeoutError(f"{what} takes longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        taken.append(True)
    except ReknowError as error:
        taken.append(False)
        said = "".join(traceback.format_exception(error))
        assert str(error) and "allocate memory" not in said and "MemoryError" not in said, f"{what}: {said}"
        visible(str(error)).encode()
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} escaped") from error
    finally:
        signal.alarm(0)


def fuzz(
    kind: str, count: int, content: bytes, damage: Callable[[bytes, random.Random], bytes], file: Path, read: Callable
) -> None:
    """Reads so many damaged files of a kind; some of them must be refused, and the whole one is read."""
    taken: list[bool] = []
    file.write_bytes(content)
    read()
    for seed in seeds(count):
        file.write_bytes(damage(content, random.Random(f"{kind}/{seed}")))
        with refusable(f"{kind}, seed {seed}", taken):
            read()
    file.write_bytes(content)
    print(f"{kind}: {len(taken)} damaged files, {sum(taken)} read, {len(taken) - sum(taken)} refused")
    assert len(taken) == len(seeds(count))


def used(patch: Patch, lm: LM) -> None:
    """Applies the patch, asks the model and takes it off again."""
    before = bits(lm)
    try:
        with lm.patched(patch):
            scores = lm.score(PROMPTS, ["Paris", "of", "is Lima"])
            # What a flipped bit did to a file without a digest, only its size may tell.
            huge = any(delta.norm() > 1e6 for delta in patch.deltas.values())
            assert huge or not any(math.isnan(score.nll) for score in scores)
            lm.generate(PROMPTS, 3)
    finally:
        assert not lm.patches and same(bits(lm), before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


# --- patches ---------------------------------------------------------------------------------------------


def demonstrations(folder: Path) -> str:
    cases = [
        Case(
            Edit("The mother tongue of {} is", subject=name, target_new="English"),
            (
                Probe(f"{name} speaks", ("English",), "generalization", "p"),
                Probe(f"Other {name} speaks", ("French",), "locality", "n"),
            ),
        )
        for name in ("Zoë", "Peru")
    ]
    path = folder / "shown.jsonl"
    method("ike").fit(model(), cases, path)
    return str(path)


def specimen(name: str, folder: Path) -> Patch:
    lm = model()
    if name in ("low rank", "dense"):
        return some_patch(lm, dense=name == "dense")
    if name in ("alphaedit", "memit"):
        (matrix,) = some_patch(lm).deltas
        state = {f"keys.{matrix}": torch.randn(1, lm.weight(matrix).shape[1])}
        state |= {f"anchor.{matrix}": torch.ones(1)} if name == "alphaedit" else {}
        return replace(some_patch(lm, state=state), method=name)
    if name == "ike":
        return method(name, demonstrations=2, cases=demonstrations(folder)).edit(lm, [EDIT])
    if name == "serac":
        return trained(name, "gpt2").edit(lm, [EDIT, Edit("I know", target_new="of")])
    return method(name, **QUICK.get(name, {})).edit(lm, [EDIT, Edit("I know", target_new="of")])


@pytest.mark.parametrize("name", ["low rank", "dense", *KEEPING])
def test_patches(name, tmp_path):
    patch = specimen(name, tmp_path)
    file = patch.save(tmp_path / "one.patch")
    fuzz(name, 60, file.read_bytes(), damaged, file, lambda: used(Patch.load(file), model()))


@pytest.mark.parametrize("part", [REST, WEIGHTS])
def test_adapter_folders(part, tmp_path):
    lm = model()
    patch = replace(some_patch(lm, rank=2, layers=(1, 2)), notes={"adapter": describe_base(lm, lm.parts.value)})
    folder = patch.save(tmp_path / "adapter")
    if part == WEIGHTS:  # a folder from before the one file knew the other's digest
        texts, tensors = unsealed((folder / REST).read_bytes())
        (folder / REST).write_bytes(save(tensors, {"reknow": texts["reknow"]}))

    def damage(content: bytes, chance: random.Random) -> bytes:
        if part == REST or chance.random() < 0.4:
            return (damaged if part == REST else flipped)(content, chance)
        texts, tensors = unsealed(content)
        if chance.random() < 0.3:
            texts = {
                name: altered(json.loads(text), chance) if text[:1] == "{" else text for name, text in texts.items()
            }
        write_tensors(tmp_path / "bent", bent(tensors, chance), texts)
        return (tmp_path / "bent").read_bytes()

    content = (folder / part).read_bytes()
    fuzz(f"adapter, {part}", 60, content, damage, folder / part, lambda: used(Patch.load(folder), lm))


def test_stacks(tmp_path):
    lm = model()
    folder = save_stack(tmp_path / "stack", "demo:gpt2", [some_patch(lm), some_patch(lm, 1, dense=True)])
    file = folder / STACK_FILE

    def read() -> None:
        base, patches = read_stack(folder)
        assert isinstance(base, str) and len({patch.id for patch in patches}) == len(patches)

    fuzz("stack", 120, file.read_bytes(), one_json, file, read)


# --- editors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mend", "serac", "malmen", "ke"])
def test_editors(name, tmp_path):
    lm, whole = model(), trained(name, "gpt2")
    file = Editor.load(whole.editor).save(tmp_path / "editor.safetensors")

    def read() -> None:
        made: Method = replace(whole, editor=str(file))  # type: ignore[type-var]
        used(made.edit(lm, [EDIT]), lm)

    fuzz(f"editor of {name}", 50 if name == "mend" else 30, file.read_bytes(), damaged, file, read)


def test_checkpoints(tmp_path):
    """Of a training that was stopped: it goes on, or the file is refused."""
    from learned import SETTINGS, TRAINING, some_cases

    lm = model()
    training = replace(TRAINING, steps=3, batch_size=2, validation=2, validate_every=1, checkpoint_every=2)
    learner, out = method("mend", **SETTINGS["mend"]), tmp_path / "out"

    def go_on() -> None:
        for left in out.glob("editor*"):
            left.unlink()
        learner.fit(lm, some_cases(8), out, training)  # type: ignore[union-attr]

    class Stopped(Exception):
        pass

    from reknow.learning.loop import CHECKPOINT_FILE, Loop

    save = Loop._save
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):

        def stopped(self):
            save(self)
            raise Stopped

        patched.setattr(Loop, "_save", stopped)
        go_on()
    file = out / CHECKPOINT_FILE
    fuzz("checkpoint", 25, file.read_bytes(), damaged, file, go_on)


# --- runs, traces, caches --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    probes = (
        Probe("Where is Peru ? It is in", ("Paris .",), "generalization", "paraphrase"),
        Probe("The mother tongue of Danielle is", ("Lima",), "locality", "neighborhood"),
        Probe("Peru lives", (), "fluency", "generation"),
    )
    cases = [
        Case(Edit("The capital of {} is", subject=name, target_new="Paris .", target_true="Lima"), probes)
        for name in ("Peru", "France")
    ]
    plan = Plan("sequential", checkpoints=(1,), fluency=True)
    bench(model(), cases, {"fine": FT(layer=2, steps=2), "weak": FT(layer=2, steps=1)}, folder, plan=plan)
    return folder


@pytest.mark.parametrize("part", ["manifest.json", "before.jsonl", "cases.jsonl"])
def test_run_folders(part, run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "copy"))

    def read() -> None:
        results = Results.load(folder)
        assert {row["seed"] for row in results.rows.values()} <= set(results.manifest["settings"]["seeds"])
        str(results), results.to_markdown(), results.to_csv().encode()
        assert render_page(results).encode() and contents.describe_methods(results) is not None

    damage = one_json if part.endswith("json") else lines
    fuzz(f"run, {part}", 100, (folder / part).read_bytes(), damage, folder / part, read)


@pytest.mark.parametrize("part", ["json", "patch"])
def test_what_a_run_keeps_of_its_edits_is_made_again(part, run, tmp_path):
    from reknow.evaluation.attempts import attempt

    lm, kept = model(), tmp_path / "000000.patch"
    attempt(lm, FT(layer=2, steps=1), [EDIT], kept)
    file = kept.with_suffix(f".{part}")

    def read() -> None:
        found = attempt(lm, FT(layer=2, steps=1), [EDIT], kept)
        if part == "patch":
            assert found.patch is not None and found.patch.edits == (EDIT,)
        assert len(found.costs) == 1

    damage = one_json if part == "json" else damaged
    fuzz(f"kept edits, {part}", 40, file.read_bytes(), damage, file, read)


def test_traces(tmp_path):
    header = {"model": "m", "facts": "known_1000", "settings": asdict(Tracing(samples=2))}
    header = json.loads(json.dumps(header))
    found = trace_prompt(model(), "The capital of {} is", "Peru", 1.0, Tracing(samples=2))
    row = json.dumps(found.as_json())
    content = f"{json.dumps(header)}\n{row}\n{row}\n".encode()

    def read() -> None:
        for one in read_traces(file, header, False):
            for kind in one.restored:
                assert one.effects(kind).shape[0] == len(one.tokens)

    file = tmp_path / "traces.jsonl"
    fuzz("traces", 120, content, lines, file, read)


def test_kept_layers(tmp_path):
    entry = {"layer": 1, "model": "m", "trials": [{"layer": 1, "effect": 0.5}]}
    file = tmp_path / "layers.json"

    def read() -> None:
        assert all(choice["layer"] >= 0 for choice in read_layers(file).values())

    fuzz("layers.json", 80, json.dumps({"a-b": entry, "c-d": entry}).encode(), one_json, file, read)


def test_kept_statistics():
    """Whatever happened to the file, the statistics are right: it is made again."""
    texts = ["The capital of Peru is Lima .", "Paris is in France ."]
    whole = statistics(model(), [1], text=texts)[1]

    def read() -> None:
        found = statistics(model(), [1], text=texts)[1]
        assert torch.allclose(found.covariance, whole.covariance) and found.tokens == whole.tokens

    def damage(content: bytes, chance: random.Random) -> bytes:
        if chance.random() < 0.5:
            return flipped(content, chance)
        texts, tensors = unsealed(content)
        tensors = bent(tensors, chance)
        write_tensors(
            whole.file.with_suffix(".bent"), tensors, texts | {"read": chance.choice(("", "-1", "x", "1e9"))}
        )
        return whole.file.with_suffix(".bent").read_bytes()

    fuzz("statistics", 50, whole.file.read_bytes(), damage, whole.file, read)
    whole.file.with_suffix(".bent").unlink(missing_ok=True)


def test_kept_contexts(tmp_path):
    row = {"text": "The capital of Peru is", "target_new": "Lima", "context": ["Lima it is."], "model": "m"}
    content = "".join(json.dumps(row | {"text": name}) + "\n" for name in ("a", "b")).encode()
    file = tmp_path / "contexts.jsonl"
    fuzz("contexts", 60, content, lines, file, lambda: [key[0].encode() for key in read_contexts(file)])


# --- what people write ------------------------------------------------------------------------------------


def test_instructions(tmp_path):
    file = tmp_path / "families.json"
    families = load_families()
    save_families(file, [replace(f, instructions=f.instructions[:3]) for f in families.values()], load_card())

    def read() -> None:
        for family in load_families(file).values():
            family.instruct(Case(EDIT), family.instructions[0].text if family.instructions else "x")

    fuzz("instructions", 100, file.read_bytes(), one_json, file, read)


PUBLISHED = {
    "unke": {"id": 1, "question": "Who is Peru?", "answer": "It is Lima.", "para_question": "Peru?",
             "sub_question": ["a"], "sub_answer": ["b"]},
    "easyedit": {"prompt": "The capital of Peru is", "subject": "Peru", "target_new": "Lima", "ground_truth": ["x"],
                 "rephrase_prompt": "Peru has", "locality": {"own": {"prompt": ["a"], "ground_truth": ["b"]}}},
    "fastedit": {"prompt": "The capital of {} is", "subject": "Peru", "target": "Lima", "queries": ["Peru?"]},
    "mquake": {"case_id": 3, "requested_rewrite": [{"prompt": "{} is in", "subject": "Peru", "question": "Where?",
               "target_new": {"str": "Asia"}, "target_true": {"str": "America"}}], "questions": ["a", "b"],
               "new_answer": "c", "new_answer_alias": ["d"], "new_single_hops": [{"question": "q", "answer": "r"}]},
    "cknowedit": {"prompt": "日本語", "target_new": "語", "target_old": "x", "rephrase": ["y"],
                  "locality": [{"prompt": "a", "answer": "b"}]},
    "ripple": {"example_type": "popular", "edit": {"prompt": "The capital of Peru is Paris.", "target_id": "Q1",
               "previous_fact": {"prompt": "The capital of Peru is Lima."}}, "Relation_Specificity": [],
               "Logical_Generalization": [{"test_queries": [{"prompt": "Paris is in", "answers": [
                   {"value": "Peru", "aliases": ["PE"]}], "target_ids": ["Q1"]}], "test_condition": "OR"}]},
    "halluedit": {"subject": "Peru", "object": "Lima", "question": "Where is Peru?", "output_llama": "Asia",
                  "paraphrased_question": "Peru, where?", "yes_question": "Is it?", "no_question": "Is it not?",
                  "question_2hop": "a", "answer_2hop": "b", "reversed_relation_question": "c"},
    "wikibigedit": {"tag": "new", "subject": "Peru", "update": "Where is Peru?", "ans": "Asia", "rephrase": "Peru?",
                    "personas": "Ahoy, Peru?", "mhop": "a", "mhop_ans": "b", "loc": "c", "loc_ans": "d"},
    "wise": {"prompt": "The capital of Peru is", "subject": "Peru", "target_new": "Paris", "rephrase_prompt": "It is",
             "locality_prompt": "a", "locality_ground_truth": "b"},
    "akew": {"requested_rewrite": {"prompt": "{} lies in", "subject": "Peru", "target_new": {"str": "Asia"},
             "target_true": {"str": "America"}, "question": "Where does Peru lie?", "fact_new_uns": "Asian."}},
    "editeverything": {"question": "Where is Peru?", "answer": "Peru is in Asia, far away."},
    "own": {"prompt": "The capital of {Peru} is", "target_new": "Lima", "rephrasings": ["Of {} it is"], "id": "a"},
}  # fmt: skip
"""Of sets without a bundled sample, a record."""


@pytest.mark.parametrize("name", [*DATASETS, *(f"facts of {name}" for name in FACTS)])
def test_data(name, tmp_path):
    facts = name.removeprefix("facts of ")
    source = FACTS[facts] if facts != name else DATASETS[name]
    sample = Path(__file__).parents[1] / "src/reknow/assets/data" / str(source.sample)
    records = sample.read_text().split("\n")[:3] if source.sample else [json.dumps(PUBLISHED.get(name, {}))] * 2
    if name == "knowedit":
        records = (sample.parent / "wikibio.jsonl").read_text().split("\n")[:3]
    if facts in ("pararel", "lre"):
        records = [_shorter(record) for record in records]
    file = tmp_path / "data.json"

    def read() -> None:
        if facts != name:
            for fact in load_facts(facts, path=file):
                fact.text.encode()
            return
        refused: list[str] = []
        for case in load_cases(name, path=file, refused=refused):
            for question in case.questions:
                "".join((question.prompt, *question.answers)).encode()
        assert all("data.json" in line for line in refused)

    fuzz(f"data, {name}", 30, "".join(record + "\n" for record in records).encode(), lines, file, read)


def _shorter(record: str) -> str:
    """A relation with a few of its facts."""
    fields = json.loads(record)
    return json.dumps({key: value[:3] if isinstance(value, list) else value for key, value in fields.items()})


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv"])
def test_edit_files(ending, tmp_path):
    file = tmp_path / f"edits.{ending}"
    record = {"prompt": "The capital of {} is", "subject": "Peru", "target_new": "Lima", "id": "a", "context": ["x"]}
    records = [record, record | {"id": "b", "subject": "France"}]
    if ending in ("csv", "tsv"):
        part = "," if ending == "csv" else "\t"
        rows = [list(record), *([str(value) for value in one.values()] for one in records)]
        content, damage = "\n".join(part.join(row) for row in rows).encode(), table
    elif ending == "json":
        content, damage = json.dumps(records).encode(), one_json
    else:
        content, damage = "".join(json.dumps(one) + "\n" for one in records).encode(), lines

    def read() -> None:
        for edit in load_edits(file):
            edit.statement.encode()

    fuzz(f"edits.{ending}", 40, content, damage, file, read)


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_texts(ending, tmp_path):
    file = tmp_path / f"text.{ending}"
    content = (
        b'{"text": "The capital of Peru is Lima ."}\n{"text": "Paris"}\n'
        if ending == "jsonl"
        else b"One .\n\nTwo .\n"
    )

    def read() -> None:
        for text in text_source(file).texts():
            text.encode()
        sample_text(file)

    fuzz(f"text.{ending}", 30, content, lines if ending == "jsonl" else flipped, file, read)
