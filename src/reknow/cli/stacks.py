"""Commands on patch files and stack folders that change neither: merge, diff; how a patch is told."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.options import Force, Json
from reknow.cli.terminal import say, say_json, say_table
from reknow.files.locks import write_lock
from reknow.texts.writing import counted

if TYPE_CHECKING:
    from reknow.edits import Edit
    from reknow.lm import LM
    from reknow.patching.patches import Patch

_Patches = Annotated[list[Path], typer.Argument(help="Patches: files, or hub:owner/name.", show_default=False)]


def merge(
    patches: _Patches,
    out: Annotated[Path, typer.Option("--out", help="The new patch file.")],
    force: Force = False,
) -> None:
    """Make one patch that changes the weights as all of them together."""
    from reknow.files.outputs import output_file
    from reknow.patching.patches import Patch
    from reknow.patching.patches import merge as merged

    out = output_file(out, force, patches)
    with write_lock(out):
        output_file(out, force, patches)  # another process may have been here meanwhile
        patch = merged([Patch.load(path) for path in patches])
        patch.save(out)
    say(f"wrote {out}: {patch.label}")


def say_patch(patch: dict[str, Any]) -> None:
    say(f"patch {patch['id']}, made by {patch['method']} (reknow {patch['version']})")
    settings = ", ".join(f"{key} {value}" for key, value in patch["settings"].items())
    say(f"settings: {settings or 'several'}")
    base = patch["base"]
    say(f"base: structure {base['structure']}, tokenizer {base['tokenizer']}, {base['dtype']}")
    if patch["made_on"]:
        say(f"made on top of: {', '.join(patch['made_on'])}")
    if patch["kind"] == "weights":
        say_table(
            ["matrix", " out × in", " rank", " norm"],
            [
                [name, " × ".join(map(str, one["shape"])), str(one["rank"]), f"{one['norm']:.4g}"]
                for name, one in patch["matrices"].items()
            ],
        )
    else:
        say(f"a {patch['kind']} memory" + (f", continues {patch['follows']}" if patch["follows"] else ""))
        tensors = patch["memory"]["tensors"].items()
        say_table(["tensor", " size"], [[name, " × ".join(map(str, size)) or "1"] for name, size in tensors])
    say_replaced(patch["notes"])
    say(
        *(
            f"edit: {edit['prompt'].replace('{}', edit.get('subject', '{}'))} → {edit['target_new']}"
            for edit in patch["edits"]
        )
    )


def applying(file: Path, model: str, lm: LM, tokenizer: str | None = None) -> str:
    """The line that puts a patch onto what it was made on: `model`, opened as `lm`, or its stack."""
    from reknow.files.hub import is_address

    words = ["reknow", "apply", str(file), "--stack"]
    if lm.patches and not is_address(model):
        words.append(model)
    else:
        words += ["FOLDER", "--model", model if lm.patches else lm.name]
    return shlex.join(words + (["--tokenizer", tokenizer] if tokenizer else []))


def say_replaced(notes: dict[str, Any]) -> None:
    """The stored edits whose place the new ones take."""
    for clash in notes.get("conflicts", ()):
        say(f"takes the place of a stored edit: {clash['prompt']} → {clash['old']}")


def diff(
    a: Annotated[Path, typer.Argument(help="A patch or a stack: a path, or hub:owner/name.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two patches, or two stacks, each taken as the sum of its patches."""
    from reknow.patching.patches import diff as compare

    difference = compare(_merge_whole(a), _merge_whole(b))
    if as_json:
        lists = {key: [asdict(edit) for edit in difference[key]] for key in difference if key.startswith("edits_")}
        return say_json(difference | lists)
    say("same base model" if difference["same_base"] else "different base models")
    for key, name in (("edits_both", "in both"), ("edits_only_a", f"only in {a}"), ("edits_only_b", f"only in {b}")):
        say(*(f"{name}: {sentence(edit)}" for edit in difference[key]))
    rows = [
        [
            name,
            f"{row['norm_a']:.4g}",
            f"{row['norm_b']:.4g}",
            "" if row["cosine"] is None else f"{row['cosine']:.3f}",
        ]
        for name, row in difference["matrices"].items()
    ]
    say_table(["matrix", f" norm in {a.name}", f" norm in {b.name}", " cosine"], rows)


def _merge_whole(source: Path) -> Patch:
    from reknow.files.hub import local
    from reknow.patching.patches import Patch
    from reknow.patching.patches import merge as merged
    from reknow.patching.peft_folder import is_adapter
    from reknow.patching.stack import read_existing

    source = local(source)
    stack = source.is_dir() and not is_adapter(source)
    return merged(read_existing(source)[1]) if stack else Patch.load(source)


def sentence(edit: Edit) -> str:
    return f"{edit.text} → {edit.target_new}"


def number_of_patches(number: int) -> str:
    return counted(number, "patch", "patches")
