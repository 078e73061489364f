"""Benchmarks name functions of the library to time them: these must be there."""

from __future__ import annotations

import importlib
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reknow import LM, MEMIT, ROME, InstructEdit, load_cases
from reknow.editing.value_batch import encode_facts, split_contexts
from reknow.errors import InputError
from reknow.instructions import load_families, save_families
from reknow.learning.training import Training

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


def test_the_functions_that_are_timed_are_there(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_work

    found = speed_work.by_phase(lambda: None, time.process_time)
    assert set(found) == {"all", *speed_work.PHASES, "other"}


def test_calibration_counts_both_sides(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scope

    table = scope.calibration([0.9, 0.6, 0.2], [0.1, 0.5])
    assert table[9] == {"threshold": 0.5, "in_scope": pytest.approx(2 / 3), "out_of_scope": 1.0}
    assert [row["threshold"] for row in table] == sorted(row["threshold"] for row in table) and len(table) == 19


def test_ways_of_choosing_a_layer_are_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import layers

    results = layers.Results(tmp_path / "rows.jsonl")
    edit = {"kind": "edit", "data": "counterfact", "tokens": 20_000, "fact": 21, "seconds": 2.0, "locality": 1.0}
    for layer, rate in ((0, 0.5), (2, 1.0)):
        results.add(**edit, layer=layer, reliability=rate, generalization=rate)
        one = {"kind": "trial", "layer": layer, "steps": 20, "tokens": 20_000, "seconds": 1.0, "locality": 1.0}
        for fact in range(8):  # trials that see it the other way round, all but the first
            right = rate if fact == 0 else 1.5 - rate
            results.add(**one, fact=fact, reliability=right, generalization=right)
    results.add(kind="asked", known=9, trials=8, seconds=5.0)
    results.add(kind="trace", effects=[0.3, 0.0, 0.1], seconds=3.0)
    capsys.readouterr()
    layers.report(3, layers.Results(results.file), "counterfact")
    said = capsys.readouterr().out
    assert "| 20,000 | 0 | 1 | 50.0 | 50.0 | 100.0 | 60.0 | – | – | – | – | 2.0 |" in said
    assert "| the best of these layers | 2 | 100.0 | 0 |" in said
    assert "| where facts trace best | 0 | 60.0 | 8 |" in said
    assert "| 8 trial facts, 20 passes, C of 20,000 | 0 | 60.0 | 21 |" in said
    assert "| 2 trial facts, 20 passes, C of 20,000 | 0 (100%)" in said


@pytest.mark.slow
def test_rows_of_real_models_are_made_once(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import real_models

    out, common = str(tmp_path / "out"), ["--sets", "counterfact", "--layer", "0"]
    asked = ["real_models.py", "demo:gpt2", "--out", out, *common, "--facts", "1-2", "--methods"]
    monkeypatch.setattr("sys.argv", [*asked, "rome,ft-m-paper:gpt2-xl"])
    real_models.main()
    made = (tmp_path / "out/rows.jsonl").read_text()
    rows = [json.loads(line) for line in made.splitlines()]
    unedited = ["unedited", "unedited, the true answer"] * 2
    assert [row["method"] for row in rows] == unedited + ["rome"] * 2 + ["ft-m-paper:gpt2-xl"] * 2
    assert [row["metrics"]["reliability@teacher_forced_exact"] for row in rows[:6]] == [0, 1, 0, 1, 1, 1]
    assert all(row["metrics"]["norm"] > 0 for row in rows[4:])
    monkeypatch.setattr(real_models, "attempt_each", None)  # nothing is left to be edited, whatever it is called
    monkeypatch.setattr("sys.argv", [*asked, "again=rome"])
    real_models.main()
    assert (tmp_path / "out/rows.jsonl").read_text() == made
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["real_models.py", "--out", out, "--facts", "1-1"])
    real_models.main()
    assert [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[4:]] == [
        ["| unedited", "1"],
        ["| unedited, the true answer", "1"],
        ["| rome", "1"],
        ["| ft-m-paper:gpt2-xl", "1"],
    ]


@pytest.fixture
def gpu(monkeypatch):
    """The modules of `gpu.py`, by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("gpu", "gpu_graphs", "gpu_parts", "gpu_plan", "gpu_report", "speed_work")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def small(gpu, tmp_path):
    return gpu.gpu_parts.Setting(device="cpu", shape="tiny", out=tmp_path, seconds=60)


@pytest.mark.slow
def test_memits_operations_and_groups_are_those_that_were_derived(gpu, small, monkeypatch):
    monkeypatch.setattr("reknow.editing.value_batch.TOKENS_PER_BATCH", 1500)
    lm, edits = gpu.gpu_parts.random_model(small), gpu.gpu_parts.many_facts(12)
    lm.parts = replace(lm.parts, packable=False)  # a GPU runs padding
    every = {"stop_probability": 1.0, "min_delta": 0.0, "covariance_tokens": 300}
    method = MEMIT(layers=(1, 2), steps=3, **every)
    method.edit(lm, edits[:1])
    derived = gpu.gpu_plan.memit_work(lm, edits, method, (1, 2))
    with gpu.speed_work.counter() as counter:
        counted = gpu.speed_work.by_phase(lambda: method.edit(lm, edits), counter.get_total_flops)
    assert derived["groups"] > 1 and derived["passes"] == 3 * derived["groups"] == derived["chains"]
    assert {phase: counted[phase] for phase in derived["flops"]} == derived["flops"]


def test_what_a_pass_keeps_for_its_way_back_is_what_was_derived(gpu, small, monkeypatch):
    monkeypatch.setattr("reknow.editing.value_batch.token_budget", lambda lm: (10_000, 2048))  # as on a GPU
    lm, edits = gpu.gpu_parts.random_model(small), gpu.gpu_parts.many_facts(8)
    lm.parts = replace(lm.parts, packable=False)  # a GPU runs padding
    facts = encode_facts(lm, edits, ["", "I saw. ", "The city of dreams and of the sea. "])
    (batch,) = split_contexts(lm, facts, torch.full((3,), 1 / 3), 1, 1)
    replay, kept = batch._replays[0], {}
    ours = [*lm.model.parameters(), *(part for layer in replay._cache.layers for part in (layer.keys, layer.values))]
    known = {tensor.untyped_storage().data_ptr() for tensor in ours}

    def keep(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept[place] = tensor
        return tensor

    delta = torch.zeros(1, 8, lm.parts.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        batch.score(delta)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    rows, width = replay.batch.ids.shape
    whole = gpu.gpu_plan.Rectangle(rows, replay._start, width - replay._start)
    scored = len(batch._targets) + len(facts)
    derived = gpu.gpu_plan.search_bytes(gpu.gpu_plan.Sizes(lm), [whole], [rows], scored, lm.layers - 2)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in replay._cache.layers) * width / replay._start
    assert measured == pytest.approx(derived - cache, rel=0.15)


class NeverWaits(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for, or handed from Python: neither can be in a recording."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        masks = name.startswith(("index", "_index")) and any(t.dtype == torch.bool for t in args[1] if t is not None)
        assert name not in self.WAITS and not masks, f"{func} waits"
        return func(*args, **(kwargs or {}))


def test_a_pass_can_be_recorded_and_repeated(gpu, small):
    lm, edits = gpu.gpu_parts.random_model(small), gpu.gpu_parts.many_facts(2)
    lm.parts = replace(lm.parts, packable=False)  # a GPU runs padding
    method = ROME(layer=1, steps=6, covariance_tokens=0, context_batches=2, stop_probability=1.0, min_delta=0.0)
    plain = method.edit_each(lm, edits)
    recorded = []

    def capture(run, examples, num_warmup_iters):
        """As `torch.cuda.make_graphed_callables`: run once to warm up, then once more to be recorded."""
        assert num_warmup_iters == 1
        for _ in range(2):
            logits = run(*examples)
            with NeverWaits() if recorded else nullcontext():  # the first one may look things up
                torch.autograd.grad(logits, examples, torch.zeros_like(logits))

        def repeat(added):
            with NeverWaits():
                return run(added)

        recorded.append(repeat)
        return repeat

    with gpu.gpu_graphs.captured_passes(capture) as took:
        again = method.edit_each(lm, edits)
    assert len(took) == len(recorded) == 2, "one recording for each batch of contexts"
    assert [patch.id for patch in again] == [patch.id for patch in plain]
    assert method.edit_each(lm, edits[:1])[0].edits == (edits[0],) and len(recorded) == 2, (
        "it is over when it is closed"
    )


def test_facts_of_a_mass_edit_are_different_requests(gpu):
    edits = gpu.gpu_parts.many_facts(2500)
    assert len({edit.text for edit in edits}) == 2500
    assert edits[:900] == [case.edit for case in load_cases("counterfact")][:900], "those of the data come first"


def test_a_call_goes_on_where_the_last_one_was(gpu, tmp_path, monkeypatch, capsys):
    """Failed parts come behind those that were never run, and none is begun that does not fit."""
    ran = []

    def run_part(options, name, left, passes, predicted):
        ran.append((name, passes))
        failed = name == "rome" and not (options.out / "rome.json").exists()
        spent = {"all": 30.0, "search of δ": 20.0}  # a fact takes 10 ms once and 2 ms in every of 10 passes
        found = {"TFLOP/s": {"bfloat16": 395.0}, "facts": 1000, "passes": 10, "seconds": spent}
        found = {"error": "no"} if failed else {"found": found}
        gpu.gpu.keep(options.out / f"{name}.json", found)

    monkeypatch.setattr(gpu.gpu, "run_part", run_part)
    monkeypatch.setattr(gpu.gpu, "refuse_missing_device", lambda parser, device: None)
    monkeypatch.setattr(gpu.gpu, "report", lambda folder, names: "")

    def call(*arguments):
        ran.clear()
        monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path / "out"), *arguments])
        gpu.gpu.main()
        return [name for name, _ in ran]

    assert call("--minutes", "2.2") == ["machine", "memit-1000", "rome", "contract", "real"]
    said = capsys.readouterr().out
    assert "memit-10000: skipped, as about" in said and "run it again" in said
    assert call("--minutes", "60") == ["memit-10000", "rome"] and ran[0][1] == 25
    assert call("--minutes", "60") == []
    (tmp_path / "out/memit-10000.json").unlink()
    assert call("--minutes", "9.1") == ["memit-10000"]
    assert ran == [("memit-10000", 18)], "of 0.9 · 9.1 minutes, less 25 s and 100 s, at 20 s each"


@pytest.mark.slow
def test_every_part_runs_in_small(gpu, tmp_path, monkeypatch, capsys):
    """Two in processes of their own, as all are, of which one fails; and the others in this one, which is quicker."""
    out, own = tmp_path / "out", gpu.gpu.run_part

    def run_part(options, name, left, passes, predicted):
        if name in ("machine", "rome"):
            return own(options, name, left, passes, predicted)
        gpu.gpu.run_child(SimpleNamespace(**vars(options) | {"child": name, "seconds": left, "passes": passes}))
        kept = json.loads((options.out / f"{name}.json").read_text())
        gpu.gpu.keep(options.out / f"{name}.json", kept | {"predicted": 1.0, "seconds": 2.0, "command": "…"})

    def call(*arguments):
        small = ["--shape", "tiny", "--device", "cpu", "--facts", "4", "6", "--passes", "3", "--minutes", "9"]
        monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(out), *small, *arguments])
        gpu.gpu.main()
        return capsys.readouterr().out

    monkeypatch.setattr(gpu.gpu, "run_part", run_part)
    monkeypatch.setattr(gpu.gpu_parts, "TABLE", ("ft-m",))
    (tmp_path / "empty/easyeditor").mkdir(parents=True)
    empty = ["--easyedit", str(tmp_path / "empty")]
    said = call(*empty, "--model", str(tmp_path / "nowhere"), "--tests", "test_counts_below_one and memit")
    assert "EasyEdit failed: SystemExit: expected a checkout of EasyEdit at" in said
    assert "ROME at layer 1, 5 facts" in said and "Failed: ModelError: expected" in said
    assert "4 facts in one call, 3 passes each" in said and "6 facts in one call, 3 passes each" in said
    assert " 0 failed" in said and "extrapolated" in said and "bfloat16" in said
    assert "done" not in call("--model", "demo:gpt2", "--layer", "0", "--known", "2", "--report")
    said = call("--model", "demo:gpt2", "--layer", "0", "--known", "2")
    assert said.count(": about") == 1 and "real: about" in said and "| ft-m | 2 |" in said


@pytest.mark.slow
def test_contexts_are_asked_once(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import contexts

    monkeypatch.setattr(contexts, "SETS", {"counterfact": 500})
    monkeypatch.setattr("sys.argv", ["contexts.py", "--cases", "3", "--out", str(tmp_path)])
    contexts.main()
    made = (tmp_path / "contexts.jsonl").read_text()
    rows = {row["form"]: row for row in map(json.loads, made.splitlines())}
    assert list(rows) == list(contexts.FORMS) and rows["nothing"]["generalization"][2] == 6
    assert rows["nothing"]["reliability"][0] < rows["Fact, line"]["reliability"][0], "the model follows a context"
    monkeypatch.setattr(contexts, "measure", None)  # nothing is left to be asked
    capsys.readouterr()
    contexts.main()
    assert (tmp_path / "contexts.jsonl").read_text() == made
    assert "| before the question | counterfact |" in capsys.readouterr().out


@pytest.mark.slow
def test_instructions_of_a_search_are_tried_again_and_once(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import instructions

    lm, short = LM("demo:gpt2"), Training(steps=2, batch_size=2, validation=0, validate_every=9, checkpoint_every=9)
    editor = InstructEdit(rank=2).fit(lm, load_cases("zsre", offset=150, limit=20), tmp_path / "editor", short).editor
    scores = {"Begin with it.": (0, 0.5), "Do it well.": (1, 0.7), "Do it at last.": (2, 0.9), "Do not.": (1, 0.1)}
    rows = [
        {"family": "zsre", "text": text, "round": round, "scores": {"reliability": value}}
        for text, (round, value) in scores.items()
    ]
    (tmp_path / "search").mkdir()
    save_families(tmp_path / "search" / "instructions.json", [load_families()["zsre"]], {})  # as a search ends
    (tmp_path / "search" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(instructions, "CASES", 3)
    monkeypatch.setattr(instructions, "BEST", 2)
    arguments = [str(tmp_path / "search"), "--editor", str(editor), "--out", str(tmp_path / "again")]
    monkeypatch.setattr("sys.argv", ["instructions.py", *arguments])
    instructions.main()
    said, made = capsys.readouterr().out, (tmp_path / "again" / "tried.jsonl").read_text()
    table = [line.split(" | ")[0].strip("| ") for line in said.splitlines() if line.startswith("| ")]
    assert table == ["zsre, 3 cases", "Begin with it.", "Do it at last.", "Do it well."]
    assert "| Begin with it. | the first |" in said and len(made.splitlines()) == 3
    instructions.main()
    assert capsys.readouterr().out == said and (tmp_path / "again" / "tried.jsonl").read_text() == made


def test_the_first_edit_is_the_sum_of_its_parts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_report

    found = {
        "about": {"command": "first --model demo:gpt2", "date": "2026-11-28", "threads": 1},
        **{"layer": 0, "tokens": 1000, "texts": 20, "their sample": 100},
        "seconds": {
            "reknow": {"statistics": 2.0, "contexts": 1.0, "edit": 1.0},
            "EasyEdit": {"statistics": 3.6, "contexts": 1.0, "edit": 15.4},
        },
        "said": {"reknow": True, "EasyEdit": False},
    }
    (tmp_path / "gpt2-first.json").write_text(json.dumps(found))
    lines = speed_report.report(tmp_path).splitlines()
    assert "| reknow | 2.0 | 1.0 | 1.0 | 4.0 | 5.0 | yes |" in lines
    assert "| EasyEdit | 3.6 | 1.0 | 15.4 | 20.0 | 1.0 | no |" in lines
    assert "would take it 0.005 hours" in "\n".join(lines)


@pytest.mark.slow
def test_a_model_is_asked_what_it_knows_and_random_weights_are_not(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed
    import speed_first

    demo = LM.demo("gpt2")
    known = speed.asked_cases(demo, "model", 3)
    first = load_cases("counterfact", limit=3)
    assert len(known) == 3 and speed.asked_cases(demo, "124M", 3) == first
    texts, tokens = speed_first.texts_of(demo, 500)
    assert 500 <= tokens < 500 + 400 and len(texts) > 1


def test_onednns_operations_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_work
    from reknow.model.fast_modules import product

    states, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(5, 8)
    _, flops = speed_work.total_flops(lambda: product(states, weight).sum().backward())
    assert flops == 2 * (2 * 3 * 8 * 5) * 2, "there and back"


@pytest.mark.slow
def test_a_long_sequence_goes_on_where_it_was_and_with_no_other_settings(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sequence

    asked = ["sequence.py", "demo:gpt2", "--out", str(tmp_path / "out"), "--edits", "6", "--turn", "2", "--at", "2,4"]
    asked += [
        "--read",
        "2",
        "--ability",
        "",
        "--methods",
        "ultraedit",
        "--whole",
        "ft=locft-bf",
        "--set",
        "ft.steps=2",
    ]
    monkeypatch.setattr("sys.argv", asked)
    sequence.main()
    rows = [json.loads(line) for line in (tmp_path / "out/points.jsonl").read_text().splitlines()]
    points = [(row["method"], row["edits"], row["read"]) for row in rows]
    assert points == [("unedited", 0, 4), *(("ultraedit", at, 2) for at in (2, 4, 6)), ("ft", 6, 2)]
    assert rows[0]["locality"][0] == 1 and rows[1]["reliability"][0] > 0 and rows[3]["seconds"] > rows[1]["seconds"]
    lost = [line for line in (tmp_path / "out/points.jsonl").read_text().splitlines() if '"edits": 6' not in line]
    (tmp_path / "out/points.jsonl").write_text("".join(f"{line}\n" for line in lost))
    monkeypatch.setattr("reknow.methods.ultraedit.UltraEdit.edit", None)  # its patches are there
    sequence.main()
    again = [json.loads(line) for line in (tmp_path / "out/points.jsonl").read_text().splitlines()]
    assert sorted(again, key=str) == sorted(rows, key=str)
    assert "| `ft` | one patch | 6 | 2 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*asked, "--turn", "3"])
    with pytest.raises(InputError, match=r"expected to go on with the sequence of .*turn 2, not 3.*or another --out"):
        sequence.main()
