"""The training loop: resumed to the bit, stopped in time, shared by processes; and the command that runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import bits, make_lm, same, saved
from reknow import KE, MEND, Case, Edit, Patch, Probe
from reknow.cli import app
from reknow.errors import EditFailed, InputError, MissingExtra
from reknow.evaluation.cost import estimate
from reknow.learning.editors import Editor, case_keys
from reknow.learning.learned import Learned
from reknow.learning.training import Training, shuffle, split_cases
from reknow.methods.ke import KENetwork

WORDS = ("English", "French", "Apple", "Lima", "Paris", "German")
METHOD = MEND(rank=8, layers=(1, 2), learning_rate=3e-3, step_size_learning_rate=1e-3)
READER = KE(layers=(2,), width=16, mlp_width=8, lstm_width=8)
"""Has no running statistics, which would be those of the first process."""
QUICK = Training(steps=12, batch_size=3, validation=6, validate_every=4, checkpoint_every=4, warmup=2, decay=True)


def cases(count: int = 24) -> list[Case]:
    made = []
    for i in range(count):
        name, new = f"Land {i}", WORDS[i % len(WORDS)]
        edit = Edit("The capital of {} is", subject=name, target_new=new, target_true="Lima", id=f"t/{i}")
        probes = (
            Probe(f"Where is {name} ? It is in", (new,), "generalization", "paraphrase"),
            Probe(f"The mother tongue of {name} is", ("German",), "locality", "neighborhood"),
        )
        made.append(Case(edit, probes))
    return made


def run(out: Path, training: Training = QUICK, *, method: Learned = METHOD, **changes) -> Learned:
    return replace(method, **changes).fit(make_lm(), cases(), out, training)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Learned:
    """A training that nothing disturbed."""
    return run(tmp_path_factory.mktemp("train") / "whole")


def test_training_leaves_the_model_and_learns(tmp_path):
    lm = make_lm()
    before = bits(lm)
    method = METHOD.fit(lm, cases(), tmp_path, replace(QUICK, steps=40))
    assert same(bits(lm), before) and not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    editor = Editor.load(method.editor)
    log = editor.notes["log"]
    assert log[-1]["step"] == 40 and {"L_edit", "L_loc", "validation loss"} <= set(log[-1])
    assert log[-1]["L_edit"] < log[0]["L_edit"], log
    assert editor.notes["validation"]["loss"] == min(row["validation loss"] for row in log)
    assert not (tmp_path / "checkpoint.safetensors").exists()


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from test_training import run
import reknow.learning.loop as loop
if len(sys.argv) > 2:  # stop for good when this many checkpoints are written
    import time
    save, left = loop.Loop._save, [int(sys.argv[2])]
    def saved(self):
        save(self)
        left[0] -= 1
        if not left[0]:
            Path(sys.argv[1], "ready").touch()
            time.sleep(600)
    loop.Loop._save = saved
run(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(whole, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "2"], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "ready").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "checkpoint.safetensors").exists() and not (tmp_path / "editor.safetensors").exists()
    resumed = run(tmp_path)
    first, second = load_file(whole.editor), load_file(resumed.editor)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert Editor.load(whole.editor).notes == Editor.load(resumed.editor).notes


def test_a_finished_training_is_not_done_again(whole):
    path = Path(whole.editor)
    before = path.stat().st_mtime_ns
    again = run(path.parent)
    assert again == whole and path.stat().st_mtime_ns == before


def test_the_same_folder_asks_for_the_same_arguments(whole):
    with pytest.raises(InputError, match=r"learning_rate is 0\.5"):
        run(Path(whole.editor).parent, learning_rate=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate.commands.launch", "torch.distributed.run"])
def test_processes_share_the_micro_batches(launcher, tmp_path):
    """Two processes with one micro-batch each learn by the command what one process learns from two.

    (`accelerate launch --cpu` starts a single one whatever `--num_processes` says, unless MPI does; `--multi_gpu`
    starts them without GPUs too.)
    """
    if launcher.startswith("accelerate"):
        options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        options += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    else:
        options = ["--standalone", "--nproc_per_node", "2"]
    line = ["train", "ke", "--model", saved(tmp_path / "model"), "--data", "zsre", "--limit", "20"]
    for setting in ("layers=[2]", "width=16", "mlp_width=8", "lstm_width=8", "steps=2", "batch_size=3"):
        line += ["--set", setting]
    for setting in ("micro_batches=2", "validation=6", "validate_every=1", "warmup=2", "decay=true"):
        line += ["--set", setting]
    alone = CliRunner().invoke(app, [*line, "--out", str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    launch = [sys.executable, "-m", launcher, *options, "-m", "reknow", *line, "--out", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "destroy_process_group" not in done.stderr and "Traceback" not in done.stderr
    first, second = Editor.load(tmp_path / "alone"), Editor.load(tmp_path / "two")
    logs = first.notes["log"], second.notes["log"]
    assert logs[0][0]["L_edit"] != logs[1][0]["L_edit"], "each read its own half"
    for name in (name for name in logs[0][0] if name.startswith("validation")):
        losses = [[row[name] for row in log] for log in logs]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], tensor, rtol=1e-3, atol=1e-5)


def test_early_stopping_keeps_the_best(tmp_path):
    training = replace(QUICK, steps=60, validate_every=2, patience=2, warmup=0, decay=False)
    method = run(tmp_path, training=training, learning_rate=0.1)
    notes = Editor.load(method.editor).notes
    losses = [row["validation loss"] for row in notes["log"]]
    assert notes["steps"] < 60 and notes["steps"] - notes["best_step"] == 4
    assert losses.index(min(losses)) == len(losses) - 3


def test_half_precision(whole, tmp_path):
    notes = Editor.load(run(tmp_path, training=replace(QUICK, precision="bf16")).editor).notes
    exact = Editor.load(whole.editor).notes
    assert 0 < abs(notes["log"][0]["L_edit"] - exact["log"][0]["L_edit"]) < 0.5
    with pytest.raises(InputError, match="a precision that the CPU has"):
        run(tmp_path / "other", training=replace(QUICK, precision="fp16"))


def test_tensorboard(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, training=replace(QUICK, tensorboard=True))
    found = events.EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent))
    found.Reload()
    assert [event.step for event in found.Scalars("L_edit")] == [4, 8, 12]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'reknow\[train\]'"):
        run(tmp_path / "other", training=replace(QUICK, tensorboard=True))


def test_losses_that_are_no_numbers_end_it(tmp_path):
    lm = make_lm()
    lm.fingerprint  # noqa: B018, taken while the model was whole
    lm.weight(lm.parts.value[2])[0, 0] = torch.nan
    with pytest.raises(EditFailed, match="finite"):
        METHOD.fit(lm, cases(), tmp_path, QUICK)
    assert not (tmp_path / "editor.safetensors").exists()


def test_a_broken_checkpoint_is_refused(whole, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="delete it to start anew"):
        run(tmp_path)


def test_split_and_order():
    train, validation = split_cases([*cases(), *cases(3)], QUICK)
    assert len(validation) == 6 and len(train) == 18
    assert not set(case_keys(validation).tolist()) & set(case_keys(train).tolist())
    draw = shuffle(train, QUICK)
    once = [case.edit.id for number in range(6) for case in draw(number)]
    assert sorted(once) == sorted(case.edit.id for case in train), "a pass has every case once"
    assert once != [case.edit.id for number in range(6, 12) for case in draw(number)]
    assert [case.edit.id for case in draw(3)] == once[9:12]
    with pytest.raises(InputError, match="at least 9 different cases"):
        split_cases(cases(8), QUICK)
    with pytest.raises(InputError, match="steps of at least 1"):
        Training(steps=0)


def test_the_cost_of_an_edit_is_a_gradient_and_its_transform(whole, tmp_path):
    reader = run(tmp_path, replace(QUICK, steps=1), method=READER)
    for method in (whole, reader):
        (one, two) = (estimate(make_lm(), method, [cases(1)[0].edit for _ in range(count)]).steps for count in (1, 2))
        assert [step.what for step in one] == ["gradient of the edits", "its transform"]
        assert [step.flops for step in two] == pytest.approx([2 * step.flops for step in one])


def test_ke_reads_embeddings_that_are_narrower_than_states(edit):
    lm = make_lm("opt", word_embed_proj_dim=16)
    network = KENetwork(KE(lstm_width=4, width=8, mlp_width=4).for_model(lm), lm)
    assert network.reader.input_size == 16  # torch does not always notice
    assert network.read(lm, [edit, edit]).shape == (2, 8)


@pytest.mark.slow
def test_the_command(tmp_path):
    lm = make_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")

    def reknow(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    options = ["--model", tmp_path / "model", "--data", "zsre", "--limit", 20, "--out", tmp_path / "out"]
    for setting in ("rank=8", "layers=[1,2]", "steps=4", "batch_size=4", "validation=4", "validate_every=2"):
        options += ["--set", setting]
    done = reknow("train", "mend", *options)
    assert done.exit_code == 0, done.output
    assert "validation at step" in done.stdout and f"--set editor={tmp_path / 'out'}" in done.stdout
    editor = Editor.load(tmp_path / "out")
    assert editor.settings["rank"] == 8 and editor.notes["steps"] == 4 and len(editor.seen) == 20
    assert reknow("train", "mend", *options).exit_code == 0, "a finished training stays"
    edited = reknow(
        *("edit", "The capital of {Peru} is", "Lima", "--model", tmp_path / "model", "--method", "mend"),
        *("--set", f"editor={tmp_path / 'out'}", "--out", tmp_path / "lima.patch"),
    )
    assert edited.exit_code == 0 and Patch.load(tmp_path / "lima.patch").method == "mend", edited.output

    left_out = reknow("train", "mend", *options, "--without", "zsre")
    assert left_out.exit_code == 2 and "expected at least 8 different cases" in left_out.output
    no_method = reknow("train", "rome", *options)
    assert no_method.exit_code == 2 and "method that learns to edit" in no_method.output
    no_field = reknow("train", "mend", *options, "--set", "no_such_field=1")
    assert no_field.exit_code == 2 and "unknown setting of mend" in no_field.output
