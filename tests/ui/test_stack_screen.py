"""The second screen, in a browser: patches are switched, taken out, brought back, sent, merged and exported."""

from __future__ import annotations

import json
import pickle
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from conftest import make_lm, some_patch
from drive_page import keep, try_edit, wait_until_idle, write
from reknow import LM, Edit, method
from reknow.cli import app
from reknow.patching.deltas import Dense
from reknow.patching.patches import Patch
from reknow.patching.stack import read_existing, read_history, save_stack

pytestmark = [pytest.mark.browser, pytest.mark.slow]


TOLD = "document.querySelector('#status .warn')?.innerText"


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM.demo("gpt2")


@pytest.fixture(scope="module")
def patches(lm) -> list[Patch]:
    """Two changes of weights, the second made on the first, and a memory."""
    mother = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
    paris = Edit("Paris is the capital of", target_new="Peru")
    first = method("ft-m").edit(lm, [mother])
    with lm.patched(first):
        return [first, method("ft-m").edit(lm, [paris]), method("grace").edit(lm, [paris])]


@pytest.fixture
def open_stack(open_tab, page_folder, lm, patches, request):
    """Opens the screen on a stack of its own with the first so many patches, whose folder is given too."""

    def visit(count: int, name: str = ""):
        name = name or f"stack-{abs(hash(request.node.name)):x}"
        folder = page_folder / "stacks" / name / "demo-gpt2"
        if count and not folder.exists():
            folder.parent.mkdir(parents=True)
            save_stack(folder, "demo:gpt2", patches[:count], action="apply", why="as it began")
        tab = open_tab(f"/?stack={name}")
        tab.get_by_role("tab", name="Stack").click()
        tab.locator("#patches li, #patches .nothing").first.wait_for()
        return tab, folder

    return visit


def click(tab, do: str, number: int, where: str = "#patches") -> None:
    tab.locator(f"{where} [data-do={do}]").nth(number).click()


def send(tab, *files) -> None:
    with tab.expect_file_chooser() as choosing:
        tab.click("#upload")
    choosing.value.set_files([str(file) for file in files])


def on(folder) -> list[str]:
    return [patch.id for patch in read_existing(folder)[1]]


def test_a_patch_is_switched_off_and_on_and_the_model_answers_so(open_stack, patches):
    tab, folder = open_stack(2)
    first, second, _ = (patch.id for patch in patches)
    question = patches[0].edits[0].text
    with_it = LM(folder).generate(question, 3)
    write(tab, **{"stack-why": "<i>doubted</i>"})
    click(tab, "select", 0)
    tab.locator("#patches li.off").wait_for()
    wait_until_idle(tab)
    assert "1 patch on, 1 off" in tab.inner_text("#stack-line") and on(folder) == [second]
    without = LM(folder).generate(question, 3)
    assert "English" in with_it and "English" not in without
    assert tab.input_value("#stack-why input, #stack-why textarea") == ""
    tab.reload()
    tab.get_by_text("1 patch on, 1 off").wait_for()
    tab.get_by_role("tab", name="Stack").click()
    assert "“as it began”" in tab.inner_text("#patches li.off")
    tab.locator("#patches summary").nth(1).click()
    click(tab, "select", 0)
    tab.get_by_text("2 patches on").wait_for()
    wait_until_idle(tab)
    assert on(folder) == [first, second] and LM(folder).generate(question, 3) == with_it
    assert tab.locator("#patches details[open]").count() == 1, "an open drawer stays open"
    assert [(line.entry.action, line.entry.why) for line in read_history(folder)] == [
        ("apply", "as it began"),
        ("off", "<i>doubted</i>"),
        ("on", ""),
    ]


def test_what_is_taken_out_comes_back_from_the_history(open_stack, patches):
    tab, folder = open_stack(2)
    first, second, _ = (patch.id for patch in patches)
    click(tab, "select", 1)
    tab.get_by_text("1 patch on, 1 off").wait_for()
    wait_until_idle(tab)
    click(tab, "delete", 1)
    tab.locator("#patches li >> nth=1").wait_for(state="detached")
    wait_until_idle(tab)
    click(tab, "delete", 0)
    tab.locator("#patches .nothing").wait_for()
    wait_until_idle(tab)
    assert on(folder) == [] and len(list(folder.glob("*.patch"))) == 2
    tab.click("#history-of-stack button.label-wrap")
    click(tab, "undo", 2, "#history")  # the newest line has no button: off, then apply
    tab.get_by_text("2 patches on").wait_for()
    wait_until_idle(tab)
    assert on(folder) == [first, second]
    click(tab, "undo", 2, "#history")
    tab.get_by_text("1 patch on, 1 off").wait_for()
    assert tab.inner_text("#history tbody tr >> nth=0").count("revert to") == 1


def test_a_patch_goes_down_and_up_again_in_another_tab(open_stack, patches, lm):
    tab, _ = open_stack(2)
    with tab.expect_download() as coming:
        click(tab, "download", 0)
    file = Path(tempfile.mkdtemp()) / coming.value.suggested_filename
    coming.value.save_as(file)
    assert file.name == f"{patches[0].id}.patch" and Patch.load(file) == patches[0]
    other, folder = open_stack(0, "another-tab")
    adapter = method("lora", steps=1, rank=1).edit(lm, [patches[0].edits[0]])
    send(other, file, adapter.save(file.with_name("adapter.patch")) / "reknow.patch")
    other.get_by_text("expected a patch in reknow.patch; it changes nothing").wait_for()
    wait_until_idle(other)
    assert not folder.exists(), "all of them, or none"
    send(other, file)
    other.get_by_text("1 patch on").wait_for()
    wait_until_idle(other)
    assert on(folder) == [patches[0].id] and "1 patch on" in other.inner_text("#stack-line")
    assert "English" in LM(folder).generate(patches[0].edits[0].text, 3)
    send(other, file)
    other.get_by_text("expected a patch that is not applied yet").wait_for()


def hostile_files(folder: Path, patch: Patch) -> dict[str, bytes | Patch]:
    """File name → what is in it: nothing that is a patch of the model."""
    whole = patch.save(folder / "whole").read_bytes()
    huge = json.dumps(
        {"delta.x.dense": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    ).encode()
    wrong = {name: Dense(torch.ones(3, 3)) for name in patch.deltas}
    numbers = {name: Dense(torch.full(delta.shape, torch.nan)) for name, delta in patch.deltas.items()}
    stranger = make_lm("gpt2")
    return {
        "text.patch": b"<script>alert(1)</script>",
        "empty.patch": b"",
        "cut.patch": whole[: len(whole) // 2],
        "changed.patch": whole[:-1] + bytes([whole[-1] ^ 1]),
        "pickled.patch": pickle.dumps({"deltas": [1]}),
        "huge.patch": struct.pack("<Q", len(huge)) + huge,
        "long header.patch": struct.pack("<Q", 2**62) + b"{}",
        "header.patch": struct.pack("<Q", 2) + b"{}",
        "of another model.patch": some_patch(stranger),
        "of other sizes.patch": replace(patch, deltas=wrong),
        "of another matrix.patch": replace(patch, deltas={"transformer.nowhere": Dense(torch.ones(3, 3))}),
        "no numbers.patch": replace(patch, deltas=numbers),
    }


def uploads(name: str) -> set[Path]:
    """Files of this name where gradio puts what is sent to it."""
    return set(Path(tempfile.gettempdir(), "gradio").rglob(name))


def test_a_hostile_file_is_refused_in_a_sentence_and_leaves_nothing_behind(open_stack, tmp_path, patches):
    tab, folder = open_stack(0)
    tab.on("dialog", lambda dialog: pytest.fail("a script ran"))
    for name, content in hostile_files(tmp_path, patches[0]).items():
        file = tmp_path / name
        content.save(file) if isinstance(content, Patch) else file.write_bytes(content)
        before, there = tab.evaluate(TOLD), uploads(name)
        send(tab, file)
        tab.wait_for_function(f"before => {TOLD} && {TOLD} !== before", arg=before)
        wait_until_idle(tab)
        said = tab.inner_text("#status .warn")
        assert said.startswith("expected ") and "Traceback" not in said and str(tempfile.gettempdir()) not in said
        assert not folder.parent.exists() or not any(folder.parent.iterdir())
        assert uploads(name) == there, f"the file itself is gone too: {said}"
    send(tab, patches[0].save(tmp_path / "good.patch"))
    tab.get_by_text("1 patch on").wait_for()


def test_those_that_are_on_are_merged_and_memories_are_not(open_stack, patches):
    tab, folder = open_stack(3)
    tab.click("#merge")
    tab.get_by_text("expected changes of weights to merge").wait_for()
    wait_until_idle(tab)
    click(tab, "select", 2)
    tab.get_by_text("2 patches on, 1 off").wait_for()
    wait_until_idle(tab)
    tab.click("#merge")
    tab.get_by_text("Merged 2 patches into one, which says 2 of 2 edits").wait_for()
    wait_until_idle(tab)
    (merged,) = read_existing(folder)[1]
    assert merged.notes["merged"] == [patch.id for patch in patches[:2]]
    assert "1 patch on, 1 off" in tab.inner_text("#stack-line")
    tab.click("#merge")
    tab.get_by_text("expected two patches or more that are on; got 1").wait_for()


def test_an_adapter_is_exported_beside_the_stack_with_the_line_that_serves_it(open_stack, patches, lm):
    tab, folder = open_stack(2)
    tab.click("#exporting button.label-wrap")
    tab.click("#export")
    tab.locator("#exported .exported").wait_for()
    wait_until_idle(tab)
    out, said = folder.with_name("demo-gpt2-lora"), tab.inner_text("#exported")
    assert "2 of 2 edits" in said and f"vllm serve {lm.model.name_or_path} --enable-lora" in said and str(out) in said
    edited = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lm.model.name_or_path).float(), out)
    tokenizer = AutoTokenizer.from_pretrained(lm.model.name_or_path)
    asked = tokenizer(patches[0].edits[0].text, return_tensors="pt")
    assert tokenizer.decode(edited(**asked).logits[0, -1].argmax()).strip() in "English"
    click(tab, "select", 1)
    tab.get_by_text("The stack was changed since").wait_for()
    wait_until_idle(tab)
    tab.click("#export")
    tab.get_by_text("1 of 1 edits").wait_for()
    tab.get_by_text("gguf · the base's GGUF file").click()
    tab.locator("#gguf-base").wait_for()
    wait_until_idle(tab)
    tab.click("#export")
    tab.get_by_text("expected the GGUF file of the base model; got none").wait_for()


def test_tabs_and_commands_that_share_a_stack_lose_nothing_of_each_other(open_stack, patches, tmp_path):
    one, folder = open_stack(1)
    other = open_stack(1)[0]
    second = patches[1]
    CliRunner().invoke(app, ["apply", str(second.save(tmp_path / "second.patch")), "--stack", str(folder)])
    click(one, "select", 0)
    one.get_by_text("1 patch on, 1 off").wait_for()
    assert on(folder) == [second.id] and one.locator("#patches li").count() == 2
    assert other.locator("#patches li").count() == 1, "what another tab did is shown with its next action"
    other.get_by_role("tab", name="Edit").click()
    try_edit(other, prompt="The capital of Peru is", subject="Peru", target="Rome")
    keep(other, "meanwhile")
    assert "2 patches on, 1 off" in other.inner_text("#stack-line")
    one.reload()
    one.get_by_text("2 patches on, 1 off").wait_for()
    assert on(folder)[0] == second.id and len(on(folder)) == 2
