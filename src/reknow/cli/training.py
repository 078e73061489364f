"""`reknow train`: train a method that learns how to edit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.options import DEMO, ChatOpening, Encoding, Model
from reknow.cli.places import run_folder, training_place
from reknow.cli.terminal import say, say_table, warn_of_records
from reknow.errors import InputError

if TYPE_CHECKING:
    from reknow.contract import Method
    from reknow.edits import Case
    from reknow.learning.learned import Learned
    from reknow.learning.training import Training
    from reknow.lm import LM


def train(
    method: Annotated[str, typer.Argument(help="A method that learns to edit.", show_default=False)],
    model: Model = DEMO,
    data: Annotated[
        list[str], typer.Option("--data", help="NAME, NAME:FILE or FILE in a published form; repeatable.")
    ] = [],  # noqa: B006, typer copies it
    without: Annotated[
        list[str], typer.Option("--without", help="NAME, NAME:FILE or FILE whose facts are left out; repeatable.")
    ] = [],  # noqa: B006
    encoding: Encoding = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="How many cases of each set.")] = None,
    offset: Annotated[int, typer.Option("--offset", min=0, help="How many cases of each set to pass over.")] = 0,
    settings: Annotated[
        list[str], typer.Option("--set", help="FIELD=VALUE of the method or of the training; repeatable.")
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", help="The folder; else under runs/.")] = None,
    *,
    opening: ChatOpening,
) -> None:
    """Train an editor for a model, in a folder. The same command takes up a training that was killed.

    reknow train mend --data counterfact --data zsre --out runs/mend
    """
    chosen, values = choose_method(method, settings)
    out = training_place(out or run_folder(f"train-{method}", model), model)
    cases = _cases(data or ["counterfact"], limit, offset, without, encoding)
    lm = replace(opening, device=opening.device or _own_gpu()).open(model)
    learned, training = _for_model(chosen, values, lm)
    trained = learned.fit(lm, cases, out, training)
    _say_result(trained, out)


def choose_method(name: str, pairs: list[str]) -> tuple[Method, dict[str, Any]]:
    """The method, with the settings that name one of its fields, and those of its training.

    Raises:
        InputError: a method that does not learn, or a setting of neither.
    """
    from reknow.checks.bounds import field_types
    from reknow.checks.reading import read_value
    from reknow.cli.settings import build_method, check_each_once
    from reknow.learning.learned import Learned
    from reknow.learning.training import Training
    from reknow.methods import METHODS
    from reknow.registry import find_row

    kind = find_row(name).method
    if not issubclass(kind, Learned):
        learned = sorted(key for key, entry in METHODS.items() if issubclass(entry.method, Learned))
        raise InputError(
            f"expected a method that learns to edit, which are {', '.join(learned)}; {name} needs no training: "
            "use it as it is"
        )
    settings, own = field_types(Training), field_types(kind)
    for_training = [pair for pair in check_each_once(pairs) if pair.partition("=")[0] in settings.keys() - own.keys()]
    method = build_method(name, [pair for pair in pairs if pair not in for_training])
    given = (pair.partition("=") for pair in for_training)
    return method, {key: read_value(key, text, settings[key]) for key, _, text in given}


def _for_model(chosen: Method, values: dict[str, Any], lm: LM) -> tuple[Learned, Training]:
    """The method as it is for this model, and its training; `values` are settings of the latter."""
    from reknow.learning.learned import Learned
    from reknow.methods.as_published import AsPublished

    method = chosen.resolve(lm)
    assert isinstance(method, Learned)
    paper = chosen.published(lm).training if isinstance(chosen, AsPublished) else {}
    return method, replace(method.training, **{**paper, **values})


def _cases(data: list[str], limit: int | None, offset: int, without: list[str], encoding: str | None) -> list[Case]:
    """The cases to learn from; records that cannot be read are named and left out."""
    from reknow.datasets.cases import load_cases, parse_address
    from reknow.learning.editors import case_keys

    def load(address: str, **part) -> list[Case]:
        _, name, path = parse_address(address)
        bad: list[str] = []
        cases = load_cases(name, path=path, encoding=encoding, refused=bad, **part)
        warn_of_records(bad)
        return cases

    left_out = {key for address in without for key in case_keys(load(address)).tolist()}
    cases = [case for address in data for case in load(address, limit=limit, offset=offset)]
    return [case for case, key in zip(cases, case_keys(cases).tolist(), strict=True) if key not in left_out]


def _own_gpu() -> str | None:
    """The GPU of this process where `accelerate launch` started several."""
    import torch
    from accelerate import PartialState

    return str(PartialState().device) if torch.cuda.is_available() and PartialState().num_processes > 1 else None


def _say_result(method: Learned, out: Path) -> None:
    from reknow.learning.editors import Editor

    assert method.editor is not None
    notes = Editor.load(method.editor).notes
    rows = [[name, f"{value:.4f}"] for name, value in notes["validation"].items()]
    say_table([f"validation at step {notes['best_step']:,} of {notes['steps']:,}", " value"], rows)
    size = Path(method.editor).stat().st_size / 2**20
    say(f"wrote {method.editor} ({size:.1f} MB); use it with: --method {method.name} --set editor={out}")
