"""`reknow stats`: the covariance of keys, ahead of the edits that need it; `reknow cache`: what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import DEMO, Json, Model, Opening
from reknow.cli.terminal import say, say_json, say_table
from reknow.errors import InputError

if TYPE_CHECKING:
    from reknow.lm import LM


def stats(
    model: Model = DEMO,
    layers: Annotated[
        str, typer.Option("--layers", help="Numbers with commas between, all, or auto: those that would be edited.")
    ] = "auto",
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="How many to read at most; else as many as edits take.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="A file, a folder (text, or ROME's .npz), or hub:owner/name[:configuration[:split]]; else WikiText.",
        ),
    ] = None,
    *,
    opening: Opening,
    as_json: Json = False,
) -> None:
    """Read general text for the statistics that ROME, MEMIT, PMET, EMMET and AlphaEdit need, and keep them.

    Edits find them if they ask for the same text and number of tokens (`--set covariance_text=…`,
    `--set covariance_tokens=…`). A killed run goes on where it was. `accelerate launch -m reknow stats …` shares
    the work among processes.
    """
    from accelerate import PartialState

    from reknow.editing.covariance import statistics
    from reknow.editing.triangle import LARGE

    state = PartialState(cpu=opening.device == "cpu")
    if state.num_processes > 1 and opening.device is None:
        opening = replace(opening, device=str(state.device))
    lm = opening.open(model)
    by_layer = statistics(lm, _layers(lm, layers), tokens=tokens, text=text, state=state)
    if not state.is_main_process:
        return
    rows = [
        {"layer": layer, "matrix": lm.parts.value[layer], "size": len(found), "tokens": each.tokens}
        | {"rank": _rank(found), "file": str(each.file), "sums": each.sums}
        for layer, each in by_layer.items()
        for found in (each.covariance,)
    ]
    if as_json:
        return say_json(rows)
    columns = ["layer", "matrix", " size", " tokens", " effective rank", "file"]
    say_table(columns, [[str(value) for name, value in row.items() if name != "sums"] for row in rows])
    if paired := [row for row in rows if row["sums"] != "float64"]:
        say(f"layers of more than {LARGE:,} inputs are summed in {paired[0]['sums']}")
    say("effective rank: trace² / sum of squares, the number of directions that carry most of the keys")


def _layers(lm: LM, wanted: str) -> list[int]:
    from reknow.editing.layers import resolve_layers

    if wanted in ("auto", "all"):
        return resolve_layers(lm, None) if wanted == "auto" else list(range(lm.layers))
    try:
        return resolve_layers(lm, [int(part) for part in wanted.split(",")])
    except ValueError:
        raise InputError(f"expected --layers as whole numbers with commas, all or auto; got {wanted!r}") from None


def _rank(covariance) -> float:
    """(Σ eigenvalues)² / Σ eigenvalues²."""
    return round(float((covariance.trace() / covariance.norm()) ** 2), 1)


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove them; they are made again when needed.")] = False,
    as_json: Json = False,
) -> None:
    """Show the statistics that are kept, those used longest ago first, and converted models, or remove both.

    Statistics stay together within $REKNOW_CACHE_GB (20): where new ones would not fit, those used longest ago go.
    """
    from reknow.files.cache import (
        CONVERTED,
        cache_folder,
        cache_limit,
        clear_cache,
        converted_models,
        statistics_files,
    )

    files = clear_cache() if clear else [*statistics_files(), *converted_models()]
    rows = [
        {"model": each.model, "matrix": each.matrix, "tokens": each.tokens, "bytes": each.size}
        | {"used": datetime.fromtimestamp(each.used).isoformat(" ", "minutes"), "file": str(each.file)}
        for each in files
    ]
    if as_json:
        return say_json(rows)
    columns = ["model", "matrix", " tokens", " bytes", "last used", "file"]
    say_table(columns, [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows])
    models = [each for each in files if each.matrix == CONVERTED]
    size, rest = (sum(each.size for each in some) / 1e9 for some in (files, models))
    what = f"{'removed' if clear else 'kept'}: {len(files) - len(models)} files, {size - rest:.3g} GB"
    limit = f"bound {cache_limit() / 1e9:g} GB (REKNOW_CACHE_GB)"
    say(f"{what} in {cache_folder()}; {limit}" + (f"; {len(models)} models, {rest:.3g} GB" if models else ""))
