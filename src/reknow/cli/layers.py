"""`reknow layers`: which layer to edit, by trial edits; what they gave is kept, and handed on as a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import DEMO, Force, Json, Opening, check_model
from reknow.cli.terminal import say, say_json, say_table
from reknow.errors import InputError

if TYPE_CHECKING:
    from reknow.lm import LM


def layers(
    model: Annotated[str, typer.Argument(help="As for --model elsewhere.", callback=check_model)] = DEMO,
    out: Annotated[Path | None, typer.Option("--out", help="Also write what was found into this JSON file.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Take what such a file says of this model; no trial edits are made.")
    ] = None,
    *,
    opening: Opening,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Find the layer to edit: facts that the model knows are edited at several layers, and the best is kept.

    From then on it is the one that methods take where none is given. Trial edits take minutes; without them the layer
    is the one that papers edit in such a model, or a guess by depth.
    """
    from reknow.files.outputs import output_file

    if source is not None and out is not None:
        raise InputError("expected either --out or --from; got both: leave one out")
    out = None if out is None else output_file(out, force, (model,))
    say_layers(opening.open(model), out, source, as_json)


def say_layers(lm: LM, out: Path | None = None, source: Path | None = None, as_json: bool = False) -> None:
    """Makes the trial edits, or reads them from `source`; keeps them, shows them, and writes them to `out`."""
    from reknow.editing.layer_choice import best_score, keep_scores, read_scores, suggest_layer, write_scores
    from reknow.editing.layer_trials import measure_layers

    if source is not None:
        scores = read_scores(lm, source)
        keep_scores(lm, scores)
    else:
        scores = measure_layers(lm)
    layer = best_score(scores).layer if scores else suggest_layer(lm)
    if out is not None and scores:
        write_scores(lm, scores, out)
    if as_json:
        return say_json({"layer": layer, "trials": [asdict(score) for score in scores]})
    if scores:
        rows = [[str(s.layer)] + [f"{v:.2f}" for v in (*list(vars(s).values())[1:], s.score)] for s in scores]
        say_table(["layer", " AIE", " reliability", " generalization", " locality", " score"], rows)
        return say(f"layer {layer}: kept for {lm.name}" + (f", and written to {out}" if out else ""))
    say(f"layer {layer} as before: {lm.name} knows too few of the trial facts, and nothing is kept")
