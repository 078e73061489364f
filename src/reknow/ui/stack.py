"""The screen of the stack: its patches with a switch each, files in and out, merging, exports, the history."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from reknow.errors import InputError, PatchError, ReknowError
from reknow.export.measure import all_edits, ask
from reknow.export.written import write_export
from reknow.files.outputs import STACK_FILE
from reknow.files.schema import FormatError
from reknow.files.tensors import check_finite
from reknow.lm import LM
from reknow.patching.patch_files import write_patch
from reknow.patching.patches import Patch, merge
from reknow.patching.stack import read_history
from reknow.patching.telling import describe, describe_change, utc
from reknow.ui.desks import Desk, put_on
from reknow.ui.drawing import draw
from reknow.ui.frame import Frame
from reknow.ui.kept import Kept
from reknow.ui.work import applied

_EMPTY = "No patch yet: keep one on the first screen, or add a file."
_FOLDER = "The stack is a folder; ask it or serve it with:"
_CLICKS = """
const open = new Set();
let last = null;
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-do]");
  if (!button) return;
  last = button.dataset;
  trigger(last.do, { id: last.id, on: last.on === "on" });
});
element.addEventListener("toggle", ({ target }) => {
  if (target.dataset.id) target.open ? open.add(target.dataset.id) : open.delete(target.dataset.id);
}, true);
watch("value", () => {
  for (const drawer of element.querySelectorAll("details[data-id]")) drawer.open = open.has(drawer.dataset.id);
  if (!last || document.activeElement !== document.body) return;
  for (const button of element.querySelectorAll("button[data-do]"))
    if (button.dataset.do === last.do && button.dataset.id === last.id) button.focus();
});
"""
"""A button says what it does and to what; drawers stay open, and the focus where it was, when all is drawn again."""
_SAVE = """
(file) => {
  if (!file || !file.url) return;
  const link = Object.assign(document.createElement("a"), { href: file.url, download: file.orig_name });
  document.body.append(link);
  link.click();
  link.remove();
}
"""
_FORMATS = [
    ("lora · a PEFT adapter: transformers, vLLM, SGLang", "lora"),
    ("gguf-lora · an adapter for llama.cpp and Ollama", "gguf-lora"),
    ("hf · a whole checkpoint: transformers, vLLM", "hf"),
    ("gguf · the base's GGUF file with the edits in it", "gguf"),
]


class StackScreen:
    """The patches, what can be done with them, and their history."""

    def __init__(self, frame: Frame):
        self._frame = frame
        self.patches = gr.HTML(elem_id="patches", apply_default_css=False, js_on_load=_CLICKS)
        with gr.Row(elem_id="changing"):
            self.why = gr.Textbox("", label="Why (for the history)", max_lines=1, elem_id="stack-why")
            self.upload = gr.UploadButton("Add patch files", file_count="multiple", elem_id="upload")
            self.merge = gr.Button("Merge those that are on", elem_id="merge")
        self.got = gr.File(visible="hidden", elem_id="got")
        with gr.Accordion("Export for other programs", open=False, elem_id="exporting", visible=frame.access.machine):
            self._build_export()
        self.place = gr.HTML(elem_id="place", apply_default_css=False, visible=frame.access.machine)
        with gr.Accordion("History", open=False, elem_id="history-of-stack"):
            self.history = gr.HTML(elem_id="history", apply_default_css=False, js_on_load=_CLICKS)
        self.outputs = [self.patches, self.exported, self.place, self.history, self.why]
        self.fields = []
        self._connect()

    def _build_export(self) -> None:
        self.format = gr.Radio(_FORMATS, value=_FORMATS[0][1], label="Format", elem_id="format")
        self.base = gr.Textbox(
            "", label="GGUF file of the base model", info="Needed for gguf; an adapter is checked against it.",
            max_lines=1, visible=False, elem_id="gguf-base",
        )  # fmt: skip
        self.truncate = gr.Checkbox(
            False, label="Cut changes of a rank above 512, which no adapter can have", elem_id="truncate"
        )
        self.export = gr.Button("Export", elem_id="export")
        self.exported = gr.HTML(elem_id="exported", apply_default_css=False)

    def _connect(self) -> None:
        frame = self._frame
        change = partial(frame.run, inputs=[self.why], emptied=self.why)
        change(self.patches.select, "switching a patch", self._switch, with_data=True)
        change(self.patches.delete, "taking a patch out", self._take_out, done="Taken out.", with_data=True)
        then = "The stack is as it was then."
        change(self.history.undo, "going back", self._go_back, done=then, with_data=True)
        files = [self.upload, self.why]
        change(self.upload.upload, "checking the files", self._add, inputs=files, done="On the stack now.")
        change(self.merge.click, "merging", self._merge, done=lambda desk: desk.shown["merged"])
        got = frame.at_once(self.patches.download, self._download, [frame.name], [self.got, frame.status])
        got.then(None, [self.got], None, js=_SAVE)
        if frame.access.machine:
            inputs = [self.format, self.base, self.truncate]
            frame.run(self.export.click, "exporting", self._export, inputs, "Exported.")
            frame.at_once(self.format.change, self._show_options, [self.format], [self.base, self.truncate])

    # --- what happens ---------------------------------------------------------------------------------------

    def _switch(self, desk: Desk, chosen: dict[str, Any], why: str) -> None:
        with self._frame.models.using(desk.model) as lm:
            desk.switch(lm, str(chosen["id"]), bool(chosen["on"]), why.strip())

    def _take_out(self, desk: Desk, chosen: dict[str, Any], why: str) -> None:
        with self._frame.models.using(desk.model) as lm:
            desk.take_out(lm, str(chosen["id"]), why.strip())

    def _go_back(self, desk: Desk, chosen: dict[str, Any], why: str) -> None:
        with self._frame.models.using(desk.model) as lm:
            desk.go_back(lm, str(chosen["id"]), why.strip())

    def _add(self, desk: Desk, files: list[str] | None, why: str) -> None:
        """Puts the patches of files on the stack, all of them or none; nothing of the files stays besides."""
        try:
            # What a later patch was made on includes what it continues.
            patches = sorted(map(read_upload, files or []), key=lambda patch: len(patch.made_on))
            with self._frame.models.using(desk.model) as lm:
                desk.change(lm, "apply", lambda stack: put_on(patches, lm, stack), why.strip())
        finally:
            for file in map(Path, files or []):
                with suppress(OSError):
                    file.unlink()
                    file.parent.rmdir()

    def _merge(self, desk: Desk, why: str) -> None:
        def merged(stack: tuple[Patch, ...]) -> list[Patch]:
            one = merge_all(stack)
            before, after = (_held(lm, patches) for patches in (stack, one))
            desk.shown["merged"] = (
                f"Merged {len(stack)} patches into one, which says {after} of {len(one[0].edits)} edits "
                f"(teacher-forced, exact); the {len(stack)} said {before}. The history brings them back."
            )
            return one

        with self._frame.models.using(desk.model) as lm:
            desk.change(lm, "merge", merged, why.strip())

    def _export(self, desk: Desk, chosen: str, base: str, truncate: bool) -> None:
        if chosen == "gguf" and not base.strip():
            raise InputError("expected the GGUF file of the base model; got none: write its path below the formats")
        file = Path(base.strip()).expanduser() if base.strip() and chosen.startswith("gguf") else None
        out = export_place(desk.folder.resolve(), chosen)
        desk.shown.pop("exported", None)
        stack = desk.patches()
        with self._frame.models.using(desk.model) as lm, applied(lm, stack):
            options = {"truncate": truncate} if chosen.endswith("lora") else {}
            if out.is_file():
                from reknow.export.gguf_record import read_gguf_record  # what it needs may not be installed

                read_gguf_record(out)  # else it is not ours to replace
            written = write_export(lm, chosen, out, base=file, overwrite=True, **options)
        desk.shown["exported"] = written, [patch.id for patch in stack]

    def _download(self, sent: gr.EventData, name: str) -> list[Any]:
        """The patch as one file, whatever it is in the folder, and what is wrong with it."""
        desk = self._frame.desks.open(name)
        try:
            kept = next((one for one in desk.kept() if one.patch.id == sent._data["id"]), None)
            if kept is None:
                raise PatchError("expected a patch of this stack; it was taken out meanwhile: load the page again")
            folder = Path(tempfile.mkdtemp(prefix="reknow-"))
            try:
                file = write_patch(kept.patch, folder / f"{kept.patch.id}.patch")
                return [self.got.move_resource_to_block_cache(file), ""]
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        except ReknowError as error:
            return [None, draw("message", str(error), [], "")]

    def _show_options(self, chosen: str) -> list[Any]:
        return [gr.update(visible=chosen.startswith("gguf")), gr.update(visible=chosen.endswith("lora"))]

    # --- what is shown --------------------------------------------------------------------------------------

    def show(self, desk: Desk) -> list[Any]:
        try:
            rows = [_row(kept) for kept in desk.kept()]
            history = _history(desk.folder)
        except ReknowError as error:
            return [draw("message", str(error), [], ""), "", "", "", gr.skip()]
        commands = _commands(desk, rows) if rows and self._frame.access.machine else []
        on = [row["patch"]["id"] for row in rows if row["on"]]
        exported = desk.shown.get("exported") and (desk.shown["exported"][0], desk.shown["exported"][1] != on)
        return [
            draw("patches", rows, file="stack.html") if rows else draw("nothing", _EMPTY),
            draw("exported", *exported, file="stack.html") if exported else "",
            draw("lines", _FOLDER, commands, file="stack.html") if commands else "",
            draw("history", history, file="stack.html") if history else draw("nothing", "Nothing was changed yet."),
            gr.skip(),
        ]

    def fill(self, desk: Desk) -> list[Any]:
        return []


def read_upload(path: str) -> Patch:
    """The patch in a file that somebody sent.

    Raises:
        PatchError: it is none, changes nothing, or holds no finite numbers; the file is named as it was sent.
    """
    name = Path(path).name
    try:
        patch = Patch.load(path)
        check_finite(patch.tensors())
        if patch.kind == "weights" and not patch.deltas:
            raise PatchError(
                f"expected a patch in {name}; it changes nothing, as one file of an adapter's folder: "
                "give the file that the page of its stack downloads"
            )
        return patch
    except FormatError as error:
        raise PatchError(f"expected a patch of numbers in {name}; {error}: make the edit again") from error
    except ReknowError as error:
        raise PatchError(str(error).replace(path, name)) from error


def merge_all(stack: tuple[Patch, ...]) -> list[Patch]:
    """The patches as one.

    Raises:
        InputError: there are fewer than two.
        PatchError: one is a memory.
    """
    if len(stack) < 2:
        raise InputError(f"expected two patches or more that are on; got {len(stack)}: switch others on first")
    return [merge(stack)]


def _held(lm: LM, patches: Sequence[Patch]) -> int:
    """How many of their edits the model with these patches says."""
    with applied(lm, patches):
        return sum(answer.said for answer in ask(lm, all_edits(lm)))


def export_place(folder: Path, chosen: str) -> Path:
    """Where an export of this stack goes: beside it."""
    return folder.with_name(f"{folder.name}-edited.gguf" if chosen == "gguf" else f"{folder.name}-{chosen}")


def _commands(desk: Desk, rows: list[dict[str, Any]]) -> list[str]:
    """The lines that ask the stack and serve it."""
    edits = [edit for row in rows if row["on"] for edit in row["patch"]["edits"]]
    asked = edits[-1]["prompt"].replace("{}", edits[-1].get("subject", "{}")) if edits else "Paris is"
    folder = str(desk.folder.resolve())
    return [shlex.join(["reknow", "ask", asked, "--stack", folder]), shlex.join(["reknow", "serve", folder])]


def _row(kept: Kept) -> dict[str, Any]:
    """A patch as the list shows it."""
    size = kept.patch.stored_bytes
    return {
        "patch": describe(kept.patch),
        "on": kept.on,
        "by": kept.by,
        "when": utc(kept.at) if kept.at else "",
        "why": kept.why,
        "size": f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB",
    }


def _history(folder: Path) -> list[dict[str, Any]]:
    """The lines of the history, the newest first."""
    lines = read_history(folder) if (folder / STACK_FILE).exists() else []
    found = []
    for before, line in zip([None, *lines], lines, strict=False):
        action, done = describe_change(before, line)
        entry = line.entry
        found.append(
            {
                "id": line.id,
                "when": utc(entry.at) if entry else "?",
                "by": entry.by if entry else "?",
                "action": action,
                "done": done,
                "why": entry.why if entry else "",
                "problem": line.problem,
            }
        )
    return found[::-1]
