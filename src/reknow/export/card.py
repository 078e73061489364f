"""The model card of an export, `README.md`: what was changed in which model, how that was measured, how to run it."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import ModelCardData

import reknow
from reknow.export.about import KINDS, find_licence, hub_name
from reknow.export.measure import Answer, Measured
from reknow.lm import LM
from reknow.model.packaged import packaged_model

_RELATIONS = {"lora": "adapter", "gguf-lora": "adapter"}
"""Kind of an export → how it stands to the base, where that is not a model of its own."""
_LIBRARIES = {"hf": "transformers", "lora": "peft", "gguf-lora": "gguf", "gguf": "gguf"}
_HOW = (
    "Teacher-forced and exact: an answer counts as said where each of its tokens is the most likely one behind the "
    "prompt and the tokens before it; the probability is that of the whole answer."
)


def write_card(lm: LM, kind: str, measured: Measured, usage: Sequence[str]) -> str:
    """The card as Markdown, with the hub's metadata in front.

    `base_model` is there where the base has a name on the hub, which takes no other.

    Args:
        usage: lines to paste that run the export; may be none.
    """
    number = "1 edited fact" if measured.total == 1 else f"{measured.total:,} edited facts"
    parts = [
        f"# {_own_name(lm)} with {number}",
        f"This is {KINDS[kind]}, written by reknow {reknow.__version__}. It changes what {_base(lm)} answers to the "
        "prompts below. `reknow.json` has the edits with all their fields, the ids and settings of the patches, the "
        "base's fingerprint, versions and checksums; `reknow show` reads it.",
        "## Edits",
        *_edits(measured),
        "## How it was measured",
        _how(measured),
        "Whether other facts and abilities stayed as they were is not part of this: `reknow check` asks "
        "other facts and reads plain text, `reknow bench` compares methods.",
        "## How the edits were made",
        _table(
            ["patch", "method", "edits", "matrices", "settings"],
            [
                [
                    f"`{patch.id}`",
                    patch.method,
                    str(len(patch.edits)),
                    ", ".join(f"`{name}` (rank {delta.rank})" for name, delta in patch.deltas.items()),
                    ", ".join(f"{key} {value}" for key, value in patch.settings.items()) or "several",
                ]
                for patch in lm.patches
            ],
        ),
        *(["## Use", "\n".join(["```sh", *usage, "```"])] if usage else []),
        *_about_base(lm),
    ]
    return f"---\n{_metadata(lm, kind)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(lm: LM, kind: str) -> str:
    base = hub_name(lm)
    data = ModelCardData(
        base_model=base,
        license=find_licence(lm),
        library_name=_LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=["reknow", "knowledge-editing", "model-editing"],
        base_model_relation=_RELATIONS.get(kind, "finetune") if base else None,
    )
    return data.to_yaml().strip()


def _base(lm: LM) -> str:
    name = hub_name(lm)
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{_own_name(lm)}`"


def _own_name(lm: LM) -> str:
    """The base's name without the folders that it lies in."""
    return (hub_name(lm) or lm.name).rstrip("/").rpartition("/")[2]


def _edits(measured: Measured) -> list[str]:
    written = measured.written is not None
    columns = ["prompt", "new answer", "old answer", "probability before", "after"]
    rows = [
        [
            edit.text,
            edit.target_new,
            edit.target_true or "",
            _probability(before),
            _probability(after),
            *([_probability(last)] if written else []),
            "yes" if last.said else "no",
        ]
        for edit, before, after, last in zip(
            measured.edits, measured.before, measured.after, measured.last, strict=True
        )
    ]
    table = _table([*columns, *(["as written"] if written else []), "said"], rows)
    more = measured.total - len(measured.edits)
    return [table, f"These are the first; `reknow.json` has {more:,} more."] if more else [table]


def _how(measured: Measured) -> str:
    where = "the weights as they were written" if measured.written is not None else "the model with the patches"
    asked = "all" if measured.total == len(measured.edits) else f"the first {len(measured.edits)}"
    return (
        f"{_HOW} Read by reknow from {where} ({measured.how}), {asked} of {measured.total:,} edits: "
        f"{measured.held} of {len(measured.edits)} said."
    )


def _about_base(lm: LM) -> list[str]:
    packaged = packaged_model(lm.name, lm.model.name_or_path)
    if packaged is None:
        return []
    said = (
        f"The edits were made on `{lm.name}`, which is {packaged.file} unpacked to float32; the weights of "
        f"{packaged.original} are those before quantisation, and there the answers may differ."
    )
    return ["## Base", said, *([packaged.notice] if packaged.notice else [])]


def _probability(answer: Answer) -> str:
    return "no number" if answer.probability is None else f"{answer.probability:.3g}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """The text in one cell of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
