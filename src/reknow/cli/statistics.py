"""`reknow stats`: the covariance of keys, ahead of the edits that need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.terminal import DEMO, Device, Dtype, Json, Model, open_lm, say, say_json, say_table
from reknow.errors import InputError

if TYPE_CHECKING:
    from reknow.lm import LM


def stats(
    model: Model = DEMO,
    layers: Annotated[
        str, typer.Option("--layers", help="Numbers with commas between, all, or auto: those that would be edited.")
    ] = "auto",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many to read at most.")] = 100_000,
    text: Annotated[
        str | None,
        typer.Option("--text", help="A file, a folder, or hub:owner/name[:configuration[:split]]; else WikiText."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Read general text for the statistics that ROME, MEMIT and their kin need, and keep them.

    Edits find them if they ask for the same text and number of tokens (`--set covariance_text=…`,
    `--set covariance_tokens=…`). A killed run goes on where it was. `accelerate launch -m reknow stats …` shares
    the work among processes.
    """
    from accelerate import PartialState

    from reknow.stats import statistics

    state = PartialState(cpu=device == "cpu")
    if state.num_processes > 1 and device is None:
        device = str(state.device)
    lm = open_lm(model, dtype, device)
    found = statistics(lm, _layers(lm, layers), tokens=tokens, text=text, state=state)
    if not state.is_main_process:
        return
    rows = [
        {"layer": layer, "matrix": lm.parts.value[layer], "size": len(each.covariance), "tokens": each.tokens}
        | {"rank": _rank(each.covariance), "file": str(each.file)}
        for layer, each in found.items()
    ]
    if as_json:
        return say_json(rows)
    columns = ["layer", "matrix", " size", " tokens", " effective rank", "file"]
    say_table(columns, [[str(value) for value in row.values()] for row in rows])
    say("effective rank: trace² / sum of squares, the number of directions that carry most of the keys")


def _layers(lm: LM, wanted: str) -> list[int]:
    from reknow.layers import resolve_layers

    if wanted in ("auto", "all"):
        return resolve_layers(lm, None) if wanted == "auto" else list(range(lm.layers))
    try:
        return resolve_layers(lm, [int(part) for part in wanted.split(",")])
    except ValueError:
        raise InputError(f"expected --layers as whole numbers with commas, all or auto; got {wanted!r}") from None


def _rank(covariance) -> float:
    """(Σ eigenvalues)² / Σ eigenvalues²."""
    return round(float(covariance.trace() ** 2 / covariance.square().sum()), 1)
