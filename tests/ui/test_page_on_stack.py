"""`reknow ui STACK`, in a browser: the page works on a folder that is there, and exports a checkpoint of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from drive_page import keep, open_screen, try_edit, wait_until_idle
from reknow import LM, Edit, method
from reknow.patching.stack import read_existing, save_stack
from serving_process import Served, listening

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MOTHER = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")


@pytest.fixture(scope="module")
def stack(page_folder) -> Path:
    """A stack of one patch, whose name is no address."""
    lm = LM.demo("gpt2")
    return save_stack(page_folder / "My facts", "demo:gpt2", [method("rome").edit(lm, [MOTHER])], why="by hand")


@pytest.fixture(scope="module")
def page_process(page_folder, stack) -> Iterator[Served]:
    with listening("ui", stack, folder=page_folder) as served:
        yield served


def test_the_page_begins_with_the_stack_and_what_is_kept_goes_into_its_folder(open_tab, stack):
    tab = open_tab()
    assert tab.url.endswith("?stack=my-facts")
    assert tab.inner_text("#stack-line") == "Stack my-facts on demo:gpt2\n1 patch on"
    try_edit(tab, prompt="Paris is the capital of", subject="Paris", target="Peru")
    keep(tab, "on the page")
    base, patches = read_existing(stack)
    assert (base, [patch.method for patch in patches]) == ("demo:gpt2", ["rome", "ft-m"])
    open_screen(tab, "Stack")
    assert "“by hand”" in tab.inner_text("#patches li >> nth=0")
    assert f"--stack '{stack}'" in tab.inner_text("#place")
    tab.fill("#model input", "demo:llama")
    tab.press("#model input", "Enter")
    tab.get_by_text("expected demo:gpt2, on which").wait_for()
    wait_until_idle(tab)
    assert tab.input_value("#model input") == "demo:gpt2"
    other = open_tab("/?stack=another")
    assert "no patch yet" in other.inner_text("#stack-line"), "a tab with a name of its own has a stack of its own"


def test_a_checkpoint_is_exported_that_transformers_opens(open_tab, stack):
    tab = open_tab()
    open_screen(tab, "Stack")
    tab.click("#exporting button.label-wrap")
    tab.get_by_text("hf · a whole checkpoint").click()
    tab.click("#export")
    tab.locator("#exported .exported").wait_for()
    wait_until_idle(tab)
    out, count = stack.with_name("My facts-hf"), len(read_existing(stack)[1])
    assert f"{count} of {count} edits" in tab.inner_text("#exported") and str(out) in tab.inner_text("#exported")
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    logits = model(**tokenizer(MOTHER.text, return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()).strip() in "English"
