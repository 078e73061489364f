"""What a file holds is checked once, when it is read: form, digest, sizes; and nothing stays a view on a file."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from conftest import make_lm, some_patch
from learned import trained
from mutations import unsealed
from reknow import FT, LM, METHODS, Case, Edit, Patch, Probe, method
from reknow.cli import app
from reknow.cli.terminal import say_json
from reknow.datasets import load_cases, load_edits
from reknow.editing.covariance import statistics
from reknow.errors import InputError, PatchError, ReknowError
from reknow.evaluation import Plan, Results, bench
from reknow.files.schema import FormatError
from reknow.files.tensors import read_tensors, write_tensors
from reknow.instructions.llm import read_contexts
from reknow.learning.editors import Editor
from reknow.model.fingerprint import Fingerprint
from reknow.patching.peft_folder import WEIGHTS, describe_base
from reknow.patching.stack import STACK_FILE, read_stack, save_stack

FILES = Path(__file__).parent.parent / "golden" / "files"
EDIT = Edit("The capital of {} is", subject="Peru", target_new="Paris")
OTHER = Edit("I know", target_new="of")


def rewritten(file: Path, header=lambda found: None, tensors=lambda found: None) -> Path:
    """The file with changes of its header and tensors, without a digest."""
    texts, found = unsealed(file.read_bytes())
    about = json.loads(texts["reknow"])
    header(about)
    tensors(found)
    file.write_bytes(save(found, texts | {"reknow": json.dumps(about)}))
    return file


def flip(file: Path, at: int) -> Path:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    return file


# --- the digest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [-1, -5000, 2000])
def test_a_flipped_bit_of_a_patch_is_seen(at, tmp_path):
    file = some_patch(make_lm("gpt2"), rank=8).save(tmp_path / "one.patch")
    with pytest.raises(PatchError, match=r"one\.patch; it is none \((its content is not what|Invalid|field)"):
        Patch.load(flip(file, at))


def test_a_flipped_bit_of_an_editor_or_an_adapter_is_seen(tmp_path):
    file = Editor.load(trained("mend", "gpt2").editor).save(tmp_path / "editor")
    with pytest.raises(InputError, match="changed or damaged"):
        Editor.load(flip(file, -1))
    lm = make_lm("gpt2")
    one, two = (replace(some_patch(lm, i), notes={"adapter": describe_base(lm, lm.parts.value)}) for i in range(2))
    folder = one.save(tmp_path / "adapter")
    assert Patch.load(folder).id == one.id
    with pytest.raises(PatchError, match="that of another patch, or damaged"):
        flip(folder / WEIGHTS, -1)
        Patch.load(folder)
    shutil.copy(two.save(tmp_path / "two") / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(PatchError, match="that of another patch, or damaged"):
        Patch.load(folder)


def test_a_flipped_bit_of_statistics_has_them_made_again(caplog):
    lm, texts = make_lm("gpt2"), ["The capital of Peru is Lima ."]
    whole = statistics(lm, [1], text=texts)[1]
    flip(whole.file, -1)
    assert torch.equal(statistics(lm, [1], text=texts)[1].covariance, whole.covariance)
    assert "is broken and is made again" in caplog.text
    caplog.clear()
    assert statistics(lm, [1], text=texts)[1].tokens == whole.tokens and not caplog.text


def test_files_from_before_there_were_digests_are_read():
    """Written by the version before."""
    lm = make_lm("gpt2")
    weights, memory = (Patch.load(FILES / f"{name}.patch") for name in ("weights", "grace"))
    assert (weights.id, memory.id) == ("1a1703a47f73", "ee6e033934db")
    assert torch.equal(weights.deltas["transformer.h.1.mlp.c_proj"].left, some_patch(lm).deltas[
        "transformer.h.1.mlp.c_proj"].left)  # fmt: skip
    with lm.patched(weights, memory):
        assert all(score.nll > 0 for score in lm.score(["The capital of Peru is"], ["Paris"]))


# --- copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["patch", "editor", "statistics", "adapter"])
def test_what_was_read_does_not_change_with_its_file(what, tmp_path):
    lm = make_lm("gpt2")
    if what == "patch":
        file = some_patch(lm, dense=True).save(tmp_path / "file")
        tensors = [Patch.load(file).deltas["transformer.h.1.mlp.c_proj"].matrix]
    elif what == "editor":
        file = Editor.load(trained("mend", "gpt2").editor).save(tmp_path / "file")
        tensors = list(Editor.load(file).tensors.values())
    elif what == "statistics":
        statistics(lm, [2], text=["Peru is Lima ."])
        kept = statistics(lm, [2], text=["Peru is Lima ."])[2]
        file, tensors = kept.file, [kept.covariance]
    else:
        folder = replace(some_patch(lm), notes={"adapter": describe_base(lm, lm.parts.value)}).save(
            tmp_path / "adapter"
        )
        file, tensors = folder / WEIGHTS, [Patch.load(folder).deltas["transformer.h.1.mlp.c_proj"].left]
    before = [tensor.clone() for tensor in tensors]
    with open(file, "r+b") as stream:  # as `cp` does
        stream.write(bytes(file.stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    os.truncate(file, 10)  # a view would end the process here
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# --- sizes -------------------------------------------------------------------------------------------------


def grace(tmp_path: Path) -> Path:
    return method("grace", layer=1, steps=2).edit(make_lm("gpt2"), [EDIT, OTHER]).save(tmp_path / "grace.patch")


@pytest.mark.parametrize("slots", [[0, 2**31], [0, 5], [1, 2], [0, 0], [-1, 0]])
def test_a_small_codebook_asks_for_no_room_that_it_does_not_fill(slots, tmp_path):
    file = rewritten(grace(tmp_path), tensors=lambda found: found.update({"state.slots": torch.tensor(slots)}))
    with pytest.raises(PatchError, match="keys numbered one by one"):
        make_lm("gpt2").apply(Patch.load(file))


@pytest.mark.slow
def test_other_memories_and_editors_ask_for_no_room_either(tmp_path):
    lm = make_lm("gpt2")
    quick = dict(layer=1, steps=2)
    wise = (
        method("wise", **quick, context_groups=((1, 2),), unrelated_facts=2).edit(lm, [OTHER]).save(tmp_path / "wise")
    )
    many = {f"state.mask.{i}": torch.zeros(1, dtype=torch.uint8) for i in range(1, 20_000)}  # 8 KB each in memory
    with pytest.raises(PatchError, match="expected masks of"):
        lm.apply(Patch.load(rewritten(wise, tensors=lambda found: found.update(many))))
    melo = method("melo", **quick).edit(lm, [OTHER]).save(tmp_path / "melo")
    with pytest.raises(PatchError, match="blocks of"):
        lm.apply(Patch.load(rewritten(melo, lambda found: found["memory"].update(blocks=[2**30]))))
    serac = trained("serac", "gpt2").edit(lm, [EDIT]).save(tmp_path / "serac")
    with pytest.raises(PatchError, match=r"settings\.rank: expected 8"):
        Patch.load(rewritten(serac, lambda found: found["settings"].update(rank=10**9)))
    for name, settings in (("mend", {"rank": 10**9}), ("ke", {"width": 10**12}), ("malmen", {"blocks": 10**7})):
        whole = trained(name, "gpt2")
        file = rewritten(
            Editor.load(whole.editor).save(tmp_path / name), lambda found, new=settings: found["settings"].update(new)
        )
        with pytest.raises(InputError, match="expected an editor"):
            replace(whole, editor=str(file)).edit(lm, [EDIT])


def test_a_template_is_three_places_and_no_program():
    for odd in (
        "{edit:>1000000000} {answer} {input}",
        "{edit.__class__} {answer} {input} {edit}",
        "{edit}{answer}{input}{0}",
    ):
        with pytest.raises(InputError, match="no other braces"):
            method("serac", template=odd)


def test_a_header_is_no_larger_than_its_file_and_no_deeper_than_a_parser(tmp_path):
    file = tmp_path / "odd"
    for content in (b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"{}" + b"x", b"\x05"):
        file.write_bytes(content)
        with pytest.raises(FormatError):
            read_tensors(file)
    place = {"dtype": "F32", "shape": [2**39, 2**20], "data_offsets": [0, 2**61]}
    for header in ({"a": place}, {"a": place | {"shape": [-1]}}, {"a": place | {"dtype": "F33"}}, {"a": [[]]}):
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(FormatError):
            read_tensors(file)
    write_tensors(file, {"a": torch.ones(2)}, {"reknow": "[" * 100_000})
    with pytest.raises(PatchError, match="recursion limit"):
        Patch.load(file)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PatchError, match="no regular file"):
        Patch.load(tmp_path / "pipe")
    with pytest.raises(FormatError, match="no regular file"):
        read_contexts(Path("/dev/zero"))
    (tmp_path / "stack").mkdir()
    os.mkfifo(tmp_path / "stack" / STACK_FILE)
    assert read_stack(tmp_path / "stack") == (tmp_path / "stack", [])


# --- patches and stacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.update(base="gpt2"), "field base: "),
        (lambda found: found["base"].update(dtype="float31"), r"base\.dtype: expected the name of a dtype"),
        (lambda found: found["base"].update(dtype=32), r"field base\.dtype"),
        (lambda found: found["edits"][0].update(prompt="\ud800"), "hex escape"),
        (lambda found: found["edits"][0].update(more=5), r"edits\.0\.more: Unexpected"),
        (lambda found: found["edits"][0].update(id=5), r"field edits\.0\.id: .* got 5"),
        (lambda found: found.update(settings={"rate": float("nan")}), "finite"),
        (lambda found: found.update(method="unheard", kind="hook"), "no method that this version has"),
        (lambda found: found.update(kind="prompt"), "said to be a prompt of grace"),
        (lambda found: found["memory"].update(labels=[[1]]), r"memory\.labels: expected 2 \(keys\), got 1"),
        (lambda found: found["memory"].update(replacement="all"), r"memory: field replacement"),
        (lambda found: found["settings"].update(steps="many"), r"settings\.steps"),
        (lambda found: found.update(extra=1), r"there is no field 'extra' here"),
        (lambda found: found["notes"].update(conflicts=["x"]), r"field notes"),
    ],
)
def test_a_header_is_refused_with_file_and_place(change, said, tmp_path):
    with pytest.raises(PatchError, match=said) as refusal:
        Patch.load(rewritten(grace(tmp_path), change))
    assert "grace.patch" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.update({"state.keys": found["state.keys"][:1]}), r"tensor \w+: expected \d \(keys\)"),
        (lambda found: found.update({"state.keys": found["state.keys"].half()}), "of the kind float32"),
        (lambda found: found.update({"state.radii": found["state.radii"][None]}), "expected 1 dimensions, got 2"),
        (lambda found: found.update({"state.values": found["state.values"] * torch.nan}), "NaN or infinity"),
        (lambda found: found.update({"state.more": torch.ones(1)}), "keeps none of this name"),
        (lambda found: found.pop("state.radii"), "radii is missing"),
        (lambda found: found.update({"delta.x.left": torch.ones(2, 1)}), "right is missing"),
        (lambda found: found.pop("base.samples"), r"base\.samples is missing"),
    ],
)
def test_tensors_are_those_of_the_method(change, said, tmp_path):
    with pytest.raises(PatchError, match=said):
        Patch.load(rewritten(grace(tmp_path), tensors=change))


def test_a_memory_of_other_sizes_is_refused_when_it_is_put_in_use(tmp_path):
    patch = Patch.load(grace(tmp_path))
    lm = make_lm("gpt2")
    for change in (
        replace(patch, state={**patch.state, "keys": patch.state["keys"][:, :5]}),
        replace(patch, memory={**patch.memory, "modules": ["transformer.wte"]}),
    ):
        with pytest.raises(PatchError, match="expected a memory"):
            lm.apply(change)
    assert not lm.patches


@pytest.mark.parametrize("change", [{"replaces": [0, 1]}, {"replaces": [7]}])
def test_a_memory_replaces_only_what_was_stored_before(change, tmp_path):
    patch = trained("serac", "gpt2").edit(make_lm("gpt2"), [EDIT, OTHER])
    with pytest.raises(PatchError, match="is of another"):
        make_lm("gpt2").apply(replace(patch, memory={**patch.memory, **change}))
    with pytest.raises(PatchError, match="is of another"):
        make_lm("gpt2").apply(replace(patch, state={**patch.state, "owners": torch.tensor([0, 0])}))


def test_every_memory_says_what_it_keeps():
    from reknow.memories.base import MemoryMethod

    assert all(entry.method.state_spec for entry in METHODS.values() if issubclass(entry.method, MemoryMethod))


def test_an_invented_dtype_does_not_widen_what_fits():
    mine = make_lm("gpt2").fingerprint
    samples = mine.samples * (1 + 2**-9)
    for dtype in ("int8", "float8_e5m2", "float31"):
        near = Fingerprint(mine.structure, mine.tokenizer, dtype, samples)
        assert near.difference(mine) == mine.difference(near) == "other weights"
        assert replace(near, samples=mine.samples).difference(mine) is None
    assert Fingerprint(mine.structure, mine.tokenizer, "bfloat16", samples).difference(mine) is None
    nothing = Fingerprint(mine.structure, mine.tokenizer, mine.dtype, mine.samples[:0])
    assert nothing.difference(mine) == "other layers or sizes"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 1, "base": "demo:gpt2", "patches": ["ID", "ID"]}', "is there twice"),
        ('{"format": 1, "base": "demo:gpt2", "patches": ["../ID"]}', r"field patches\.0"),
        ('{"format": 1, "base": "demo:gpt2", "patches": ["/tmp/ID"]}', r"field patches\.0"),
        ('{"format": 1, "base": 5, "patches": []}', "field base: .* got 5"),
        ('{"format": 1, "base": "a", "base": "demo:gpt2", "patches": []}', "the field 'base' is there twice"),
        ('{"format": true, "base": "a", "patches": []}', "field format"),
        ("[" * 100_000, "recursion limit"),
    ],
)
def test_a_stack_names_each_of_its_own_patches_once(text, said, tmp_path):
    patch = some_patch(make_lm("gpt2"))
    save_stack(tmp_path / "stack", "demo:gpt2", [patch])
    shutil.copy(tmp_path / "stack" / f"{patch.id}.patch", tmp_path)
    (tmp_path / "stack" / STACK_FILE).write_text(text.replace("ID", f"{patch.id}.patch"))
    with pytest.raises(PatchError, match=said) as refusal:
        LM(tmp_path / "stack")
    assert str(tmp_path / "stack") in str(refusal.value) and STACK_FILE in str(refusal.value)


# --- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "run"
    probes = (Probe("Where is Peru ? It is in", ("Paris .",), "generalization", "paraphrase"),)
    cases = [Case(Edit("The capital of {} is", subject=s, target_new="Paris ."), probes) for s in ("Peru", "France")]
    plan = Plan("sequential", checkpoints=(1,), fluency=False)
    bench(make_lm("gpt2"), cases, {"fine": FT(layer=2, steps=2)}, folder, plan=plan)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 7}, "1 of another seed"),
        ({"stage": "at:9"}, "1 of another stage"),
        ({"method": "wise"}, "1 of another method"),
        ({"case": "9"}, "1 of another case"),
        ({"mode": "batch"}, "1 of another mode"),
        ({"seed": 8, "run": "0123456789ab"}, "1 rows of another run"),
        ({"seed": 0, "stage": "at:1", "case": "1", "readings": []}, "1 of another list of questions"),
    ],
)
def test_rows_that_the_manifest_does_not_name_are_never_averaged_in(change, said, run, tmp_path):
    whole = Results.load(run)
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    row = json.loads((folder / "cases.jsonl").read_text().split("\n")[-2]) | change
    with open(folder / "cases.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.warns(UserWarning, match=said):
        found = Results.load(folder)
    assert found.cells == whole.cells and found.rows == whole.rows


def test_answers_of_more_cases_than_the_run_has_are_refused(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    row = json.loads((folder / "before.jsonl").read_text().split("\n")[0]) | {"case": "7"}
    with open(folder / "before.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="expected 2 cases"):
        Results.load(folder)


@pytest.mark.parametrize(
    ("part", "text", "said"),
    [
        ("cases.jsonl", '{"case": "1"}', r"line 1 of .*cases\.jsonl"),
        ("cases.jsonl", "[" * 100_000, "recursion limit"),
        (
            "before.jsonl",
            '{"case": "0", "edit": {"prompt": 5}, "held_out_perplexity": null, "readings": []}',
            "edit.prompt",
        ),
        ("manifest.json", '{"settings": {"methods": []}}', r"manifest\.json"),
        ("manifest.json", '{"settings": {}, "settings": {}}', "there twice"),
    ],
)
def test_a_run_folder_is_refused_with_file_and_place(part, text, said, run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / part).write_text(text + "\n")
    with pytest.raises(InputError, match=said):
        Results.load(folder)


def test_kept_edits_that_are_damaged_or_of_others_are_made_again(tmp_path):
    from reknow.evaluation.attempts import attempt

    lm, fast, file = make_lm("gpt2"), FT(layer=2, steps=1), tmp_path / "000000.patch"
    whole = attempt(lm, fast, [EDIT], file).patch
    assert attempt(lm, fast, [EDIT], file).patch.id == whole.id
    for damage in (
        lambda: flip(file, -1),
        lambda: file.with_suffix(".json").write_text("{"),
        lambda: attempt(lm, fast, [OTHER], tmp_path / "other.patch").patch.save(file),
    ):
        damage()
        with pytest.warns(UserWarning, match="made again"):
            assert attempt(lm, fast, [EDIT], file).patch.id == whole.id
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Patch.load(file).id == whole.id


# --- texts -------------------------------------------------------------------------------------------------


def test_half_a_character_is_refused_at_every_door(tmp_path):
    odd = "Per\ud800"
    file = tmp_path / "edits.json"
    file.write_text(json.dumps([{"prompt": "The capital of {} is", "subject": odd, "target_new": "x"}]))
    readers = (
        lambda: Edit("I know", target_new=odd),
        lambda: Edit("I know", target_new="x", context=[odd]),
        lambda: Probe(odd, ("x",), "locality", "n"),
        lambda: Probe("x", ("x", odd), "locality", "n"),
        lambda: make_lm("gpt2").score([odd], ["x"]),
        lambda: make_lm("gpt2").generate(odd, 2),
        lambda: load_edits(file),
    )
    for read in readers:
        with pytest.raises(InputError, match="half of a pair"):
            read()


def test_a_record_without_end_or_sense_is_named(tmp_path):
    file = tmp_path / "data.jsonl"
    good = {
        "src": "Who is Peru ?",
        "subject": "Peru",
        "alt": "Lima",
        "answers": ["x"],
        "rephrase": "a",
        "loc": "b",
        "loc_ans": "c",
    }
    for odd in ({"answers": json.loads("[" * 150 + "]" * 150)}, {"answers": ["\udfff"]}, {"loc": None}):
        file.write_text(json.dumps(good) + "\n" + json.dumps(good | odd) + "\n")
        refused: list[str] = []
        assert len(load_cases("zsre", path=file, refused=refused)) == 1 and "data.jsonl, line 2" in refused[0]
        with pytest.raises(InputError, match=r"data\.jsonl, line 2"):
            load_cases("zsre", path=file)


def test_foreign_texts_do_not_steer_the_terminal(tmp_path, capsys):
    red, back = "\x1b[31mParis\x1b]0;title\x07", "\u202egnirts"
    lm = LM.demo("gpt2")
    patch = replace(
        some_patch(lm), edits=(Edit("The capital of {} is", subject="Peru\x9b2J", target_new=red + back),)
    )
    hostile = replace(patch, version="1\x1b[2J", settings={"a\x1b[1m": "b\x07"})
    file, other = hostile.save(tmp_path / "a.patch"), replace(patch, settings={}).save(tmp_path / "b.patch")
    commands = (
        ["show", file], ["show", file, "--json"], ["diff", file, other],
        ["merge", file, other, "--out", tmp_path / "m"],
        ["apply", file, "--stack", tmp_path / "stack", "--model", "demo:gpt2"], ["show", tmp_path / "stack"],
    )  # fmt: skip
    for command in commands:
        done = CliRunner().invoke(app, [str(part) for part in command])
        assert done.exit_code == 0, done.output
        assert not set("\x1b\x07\x9b\u202e") & set(done.output), command
    say_json({"a": red, "b": "x\x9b2J"})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"a": red, "b": "x\x9b2J"} and "\x9b" not in shown


def test_a_refusal_is_the_library_s_own():
    with pytest.raises(ReknowError):
        Patch.load("/dev/null")
