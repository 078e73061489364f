"""`reknow edit`: make edits, show what they changed and what they did not, write a patch."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.options import DEMO, ChatOpening, Encoding, Force, Json, Model, NoStats
from reknow.cli.stacks import applying, say_replaced
from reknow.cli.terminal import say, say_json, say_table, warn
from reknow.errors import InputError, did_you_mean
from reknow.files.locks import write_lock

if TYPE_CHECKING:
    from reknow.contract import Method
    from reknow.edits import Edit
    from reknow.evaluation.cost import Estimate
    from reknow.evaluation.tried import Tried
    from reknow.lm import LM
    from reknow.patching.patches import Patch

_SEPARATORS = {"none": "", "space": " ", "line": "\n"}
"""What `--separator` names."""
_SHOWN = 5
"""How many edits are shown one by one."""


def edit(
    prompt: Annotated[str | None, typer.Argument(help="The prompt, its subject in braces; {{ }} for others.")] = None,
    target: Annotated[str | None, typer.Argument(help="The new answer.")] = None,
    model: Model = DEMO,
    method: Annotated[str, typer.Option("--method", help="See `reknow methods`.")] = "rome",
    subject: Annotated[str | None, typer.Option("--subject", help="Instead of braces in the prompt.")] = None,
    true: Annotated[str | None, typer.Option("--true", help="The present answer, to follow its probability.")] = None,
    separator: Annotated[
        str | None,
        typer.Option("--separator", help="Before the answer: none, space or line."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="JSON, JSON lines or CSV file; see docs/data.md.")
    ] = None,
    encoding: Encoding = None,
    layer: Annotated[str | None, typer.Option("--layer", help="A layer, or auto.")] = None,
    settings: Annotated[list[str], typer.Option("--set", help="FIELD=VALUE of the method; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", help="The patch file; else named after the subject.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done and what it costs.")] = False,
    *,
    opening: ChatOpening,
    no_stats: NoStats = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Change facts, show what changed and what did not, and write a patch.

    reknow edit "The mother tongue of {Danielle Darrieux} is" English
    """
    edits = read_edits(prompt, target, subject, true, file, encoding, separator)
    out = out or Path(_slug(edits) + ".patch")
    from reknow.cli.settings import build_method, check_each_once
    from reknow.contract import check_edits
    from reknow.evaluation.cost import estimate

    chosen = build_method(method, check_each_once(settings), layer=layer)
    check_edits(chosen, edits)
    out = out if plan else _output_place(chosen, out, force, (model, file))
    with nullcontext() if plan else write_lock(out):
        if not plan:
            _output_place(chosen, out, force, (model, file))  # another process may have been here meanwhile
        lm = opening.open(model)
        lm.computes_statistics = not no_stats
        chosen = chosen.resolve(lm)
        if plan:
            cost = estimate(lm, chosen, edits)
            return say_json(asdict(cost)) if as_json else _say_cost(cost, lm, chosen, edits)
        _edit(lm, chosen, edits, out, applying(out, model, lm, opening.tokenizer), as_json)


def read_edits(
    prompt: str | None,
    target: str | None,
    subject: str | None,
    true: str | None,
    file: Path | None,
    encoding: str | None,
    separator: str | None = None,
) -> list[Edit]:
    """The edits of the command line; raises InputError where it names none, or both one and a file."""
    from reknow.datasets.edits_file import load_edits
    from reknow.edits import Edit

    if file is not None:
        if any(value is not None for value in (prompt, target, subject, true, separator)):
            raise InputError(f"expected either --file or one edit; got both {file} and an edit: leave one out")
        return load_edits(file, encoding=encoding)
    if prompt is None or target is None:
        raise InputError(
            "expected a prompt and a new answer, or --file; got less: "
            'for example reknow edit "The mother tongue of {Danielle Darrieux} is" English'
        )
    if separator is not None and separator not in _SEPARATORS:
        raise did_you_mean("separator", separator, _SEPARATORS)
    between = None if separator is None else _SEPARATORS[separator]
    if "{" in prompt and subject is None:
        return [Edit.parse(prompt, target, target_true=true, separator=between)]
    return [Edit(prompt, subject=subject, target_new=target, target_true=true, separator=between)]


def _output_place(method: Method, out: Path, force: bool, sources: tuple[str | Path | None, ...]) -> Path:
    """Where the patch goes, a file or for the LoRA family a folder; refused here, before any work."""
    from reknow.files.outputs import output_file, output_folder
    from reknow.methods.lora import LoRA
    from reknow.patching.peft_folder import own_files

    if isinstance(method, LoRA):
        return output_folder(out, force, own_files, sources)
    return output_file(out, force, sources)


def _slug(edits: list[Edit]) -> str:
    name = re.sub(r"\W+", "-", (edits[0].subject or edits[0].prompt).lower()).strip("-")[:60] or "edit"
    return name if len(edits) == 1 else f"{name}-and-{len(edits) - 1}-more"


def _edit(lm: LM, method: Method, edits: list[Edit], out: Path, apply: str, as_json: bool) -> None:
    """Makes the edits, shows what they changed, and writes the patch; `apply` is the line that applies it."""
    from reknow.evaluation.cost import estimate
    from reknow.evaluation.tried import try_edits

    if estimate(lm, method, edits).guessed:
        warn(f"no layer given: it is a guess by depth; reknow layers {lm.name} measures, once for this model")
    tried = try_edits(lm, method, edits)
    patch = tried.patch
    _warn_of_harm(tried, out)
    patch.save(out)
    if as_json:
        return say_json(_as_json(tried, out))
    say(f"{method.name} on {lm.name}: {_count_edits(edits)} in {tried.seconds:.1f} s\n")
    _say_answers(edits, tried)
    _say_controls(tried)
    _say_weights(lm, patch)
    say_replaced(patch.notes)
    numbers = sum(p.numel() for p in lm.model.parameters())
    say(f"base model after taking the patch off: {tried.tensors} tensors, {numbers:,} numbers, every bit as before")
    say(f"wrote {out} (id {patch.id}); apply it with: {apply}")


def _warn_of_harm(tried: Tried, out: Path) -> None:
    """Says before the patch is written what of the model the edit broke."""
    if tried.harms:
        advice = "look for a better --layer or --method, or make fewer edits at once, before you apply it"
        warn(f"this edit harms the model: {' and '.join(tried.harms)}; {out} is written all the same: {advice}")


def _as_json(tried: Tried, out: Path) -> dict[str, Any]:
    from reknow.patching.telling import describe

    return {
        "file": str(out),
        "seconds": tried.seconds,
        "patch": describe(tried.patch),
        "controls": [asdict(fact) for fact in tried.facts],
        "before": asdict(tried.before),
        "after": asdict(tried.after),
        "base_restored": True,
        "warnings": tried.harms,
    }


def _say_answers(edits: list[Edit], tried: Tried) -> None:
    """What changed: completions, probability and rank of the new answer."""
    rows = []
    for edit, old, new in list(zip(edits, tried.before.answers, tried.after.answers, strict=True))[:_SHOWN]:
        rows.append([f"{edit.text} …", old.completion, new.completion])
        rows.append([f"  probability of “{edit.target_new}”", f"{old.probability:.4f}", f"{new.probability:.4f}"])
        rows.append(["  rank of its worst token", f"{old.rank:,}", f"{new.rank:,}"])
        if old.probability_true is not None and new.probability_true is not None:
            name = f"  probability of “{edit.target_true}”"
            rows.append([name, f"{old.probability_true:.4f}", f"{new.probability_true:.4f}"])
    say_table(["what changed", "before", "after"], rows)
    say(f"the new answer comes first in {tried.said} of {len(edits)} prompts\n")


def _say_controls(tried: Tried) -> None:
    """What did not change, or should not have: other facts, plain text."""
    before, after = tried.before, tried.after
    rows = [
        [f"{fact.text} …", old, "as before" if kept else new]
        for fact, old, new, kept in zip(tried.facts, before.controls, after.controls, tried.kept, strict=True)
    ]
    say_table(["what should not change", "before", "after"], rows)
    say(f"{sum(tried.kept)} of {len(tried.facts)} other facts are continued word for word as before")
    say(f"perplexity of plain text: {before.perplexity:.2f} before, {after.perplexity:.2f} after\n")


def _say_weights(lm: LM, patch: Patch) -> None:
    from reknow.model.exact import exact

    if patch.kind != "weights":
        numbers = sum(tensor.numel() for tensor in patch.state.values())
        return say(f"no weight changes: the edit is a {patch.kind} memory of {numbers:,} numbers beside the model")
    rows = []
    for name, delta in patch.deltas.items():
        share = delta.norm() / float(exact(lm.base_weight(name)).norm())
        rows.append([name, " × ".join(map(str, delta.shape)), str(delta.rank), f"{delta.norm():.4g}", f"{share:.2%}"])
    say_table(["matrix", " out × in", " rank", " norm of the change", " of the matrix's"], rows)


def _say_cost(cost: Estimate, lm: LM, method: Method, edits: list[Edit]) -> None:
    say(f"{method.name} on {lm.name}, {_count_edits(edits)}: nothing is done yet")
    for layer, (name, shape) in zip(cost.layers, cost.matrices.items(), strict=True):
        say(f"layer {layer} of {lm.layers}: {name} ({' × '.join(map(str, shape))})")
    if cost.guessed:
        say(f"this layer is a guess by depth; trial edits may find a better one: reknow layers {lm.name}")
    rows = [[s.what, f"{s.passes:,}", f"{s.tokens:,}", f"{s.flops:.2g}"] for s in cost.steps]
    say_table(["work", " forward passes", " tokens", " FLOPs"], [*rows, ["together", "", "", f"{cost.flops:.2g}"]])
    say(f"the model has {cost.parameters:,} parameters; memory at the peak about {cost.memory / 2**20:,.0f} MiB")
    if cost.statistics:
        disk, solver = cost.statistics / 2**20, cost.solver / 2**20
        say(f"of it {solver:,.0f} MiB to solve with a layer's statistics, which take {disk:,.0f} MiB on disk in all")


def _count_edits(edits: list[Edit]) -> str:
    return "1 edit" if len(edits) == 1 else f"{len(edits)} edits"
