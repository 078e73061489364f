"""The page on a GGUF file, in a browser: an edit is made, and what is exported answers so in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from drive_page import REQUEST, keep, open_screen, pass_over_what_is_told, try_edit, wait_until_told, write
from reknow import LM
from serving_process import Served, listening

pytestmark = [pytest.mark.browser, pytest.mark.engines, pytest.mark.slow]


@pytest.fixture(scope="module")
def base(page_folder) -> Path:
    """The bundled model as a GGUF file."""
    pytest.importorskip("gguf")
    from gguf_models import write_gguf

    return write_gguf(LM.demo("llama"), page_folder / "base.gguf", "F16")


@pytest.fixture(scope="module")
def page_process(page_folder, base) -> Iterator[Served]:
    with listening("ui", "--model", base, folder=page_folder) as served:
        yield served


def export(tab, label: str, file: Path) -> str:
    """Exports in the format of that label; what is said of it."""
    tab.get_by_text(label).click()
    tab.locator("#gguf-base").wait_for()
    write(tab, **{"gguf-base": str(file)})
    pass_over_what_is_told(tab)
    tab.click("#export")
    wait_until_told(tab)
    return tab.inner_text("#exported" if tab.locator("#exported .exported").count() else "#status .warn")


def test_an_edit_on_a_file_is_exported_as_an_adapter_and_into_the_file(open_tab, base, page_folder):
    pytest.importorskip("xllamacpp")
    from gguf_models import llama_cpp

    tab = open_tab()
    assert str(base) in tab.inner_text("#stack-line")
    try_edit(tab, "rome")
    assert "now says English" in tab.inner_text("#tried .lead")
    keep(tab)
    open_screen(tab, "Stack")
    tab.click("#exporting button.label-wrap")
    said = export(tab, "gguf · the base's GGUF file", page_folder / "nowhere.gguf")
    assert said.startswith("expected the GGUF file of the base model;") and "--base" not in said
    assert "1 of 1 edits" in export(tab, "gguf · the base's GGUF file", base)
    assert "1 of 1 edits" in export(tab, "gguf-lora · an adapter", base)
    (written,) = (page_folder / "stacks").rglob("*-edited.gguf")
    (adapter,) = (page_folder / "stacks").glob("*/*-gguf-lora/*.gguf")
    for answers in (llama_cpp(written), llama_cpp(base, adapter)):
        assert answers([REQUEST["prompt"]])[0].strip().startswith("English")
    assert not llama_cpp(base)([REQUEST["prompt"]])[0].strip().startswith("English")
