"""`reknow trace`: where the model keeps facts, by causal tracing."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.layers import say_layers
from reknow.cli.options import DEMO, Force, Json, Model, Opening, refuse_beside
from reknow.cli.places import TRACES, trace_header, trace_place
from reknow.cli.terminal import say, say_json, say_table
from reknow.errors import InputError
from reknow.files.locks import write_lock
from reknow.files.strict_json import strict_json

if TYPE_CHECKING:
    from reknow.edits import Edit
    from reknow.lm import LM
    from reknow.tracing.causal import AverageEffects, Trace, Tracing

_FACTS, _LIMIT = "known_1000", 100


def trace(
    prompt: Annotated[str | None, typer.Argument(help="One prompt, its subject in braces; else many facts.")] = None,
    model: Model = DEMO,
    facts: Annotated[
        str | None, typer.Option("--facts", help="known_1000, counterfact, pararel or lre. [known_1000]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="How many facts to read; unknown ones are skipped. [100]")
    ] = None,
    severed: Annotated[bool, typer.Option("--severed", help="Also with MLP or attention severed.")] = False,
    window: Annotated[int | None, typer.Option("--window", help="Layers restored together; the paper: 10.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Noise samples per prompt.")] = 10,
    classes: Annotated[
        bool, typer.Option("--classes", help="Of many facts, only at one token of each class that is averaged.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="The same as `reknow layers`.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for traces and figures.")] = Path("trace"),
    *,
    opening: Opening,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show where facts sit: which states bring the answer back after the subject was corrupted with noise.

    reknow trace "{Beats Music} is owned by"
    """
    from reknow.edits import Edit
    from reknow.tracing.causal import Tracing

    many = {"--facts": facts, "--limit": limit, "--classes": classes}
    if layers:
        refuse_beside("--layers", {"a prompt": prompt, **many, "--severed": severed, "--window": window})
        return say_layers(opening.open(model), as_json=as_json)
    if prompt is not None:
        refuse_beside("one prompt", many)
    settings = Tracing(samples=samples, window=window, tokens="classes" if classes else "all")
    if severed:
        settings = replace(settings, kinds=(*settings.kinds, "mlp_severed", "attention_severed"))
    edit = None if prompt is None else Edit.parse(prompt, "?")
    if edit is not None and edit.subject is None:
        raise InputError(f"expected a subject in braces to trace; got {prompt!r}: mark it, as in '{{France}} is in'")
    out = trace_place(out, model, force)
    lm = opening.open(model)
    if edit is not None:
        return _trace_one(lm, edit, settings, out, as_json)
    with write_lock(out):
        trace_many(lm, facts or _FACTS, limit or _LIMIT, settings, out, force, as_json)


def _trace_one(lm: LM, edit: Edit, settings: Tracing, out: Path, as_json: bool) -> None:
    from reknow.datasets.facts import load_facts
    from reknow.files.outputs import mark_folder
    from reknow.report.trace_plots import save_figure, trace_figure
    from reknow.tracing.causal import embedding_std, trace_prompt

    assert edit.subject is not None
    traced = trace_prompt(lm, edit.prompt, edit.subject, embedding_std(lm, load_facts("known_1000")), settings)
    mark_folder(out, "trace")
    pictures = save_figure(trace_figure(traced), out / "trace")
    if as_json:
        return say_json(traced.as_json())
    say(f"{traced.prompt}{traced.answer}: clean {traced.clean:.3f}, corrupted {traced.corrupted:.3f}")
    rows = []
    for kind, table in traced.restored.items():
        token, layer = divmod(int(table.nan_to_num(-1).argmax()), table.shape[1])
        rows.append([kind, traced.tokens[token].strip(), str(layer), f"{float(table[token, layer]):.3f}"])
    say_table(["restored", "best token", " layer", " P(answer)"], rows)
    say(*map(str, pictures))


def trace_many(lm: LM, name: str, limit: int, settings: Tracing, out: Path, force: bool, as_json: bool) -> None:
    """Traces the known ones among the first facts of a set, goes on where it was, and shows their averages."""
    from reknow.datasets.facts import load_facts
    from reknow.files.atomic import append_line
    from reknow.report.trace_plots import average_figure, effect_bars, save_figure
    from reknow.tracing.causal import average, embedding_std, known_facts, trace_prompt

    facts = load_facts(name, limit=limit)
    header = trace_header(lm.fingerprint.digest, name, asdict(settings))
    traces = read_traces(out / TRACES, header, force)
    done = {each.prompt for each in traces}
    std = embedding_std(lm, load_facts(name))
    known = known_facts(lm, facts)
    if not known:
        raise InputError(
            f"expected facts that {lm.name} knows; of {len(facts)} it knows none: read more with --limit"
        )
    for number, fact in lm.progress.each("tracing", [*enumerate(known, 1)], unit="facts"):
        if fact.text in done:
            continue
        done.add(fact.text)
        traces.append(trace_prompt(lm, fact.prompt, fact.subject, std, settings))
        append_line(out / TRACES, strict_json(traces[-1].as_json()))
        if not as_json and (number % 10 == 0 or number == len(known)):
            say(f"{number} of {len(known)} known facts")
    wanted = {fact.text for fact in known}
    effects = average([each for each in traces if each.prompt in wanted])
    pictures = [
        *save_figure(average_figure(effects), out / "average"),
        *save_figure(effect_bars(effects), out / "bars"),
    ]
    _say_average(effects, len(facts), pictures, as_json)


def read_traces(path: Path, header: dict, force: bool) -> list[Trace]:
    """The traces that an earlier run with the same header left; a line that was cut short by a kill is dropped."""
    from reknow.files.atomic import write_text
    from reknow.files.schema import FormatError, explain, parse_json, read_content
    from reknow.tracing.causal import StoredTrace

    def refusal(number: int, error: Exception) -> InputError:
        return InputError(
            f"expected one trace per line in {path}; line {number}: {explain(error)}: delete that line, and the "
            "trace is made again"
        )

    traces: list[Trace] = []
    first = strict_json(header) + "\n"
    try:
        text = read_content(path).decode() if path.exists() and not force else ""
    except (OSError, UnicodeDecodeError, FormatError) as error:
        raise refusal(1, error) from error
    whole = text[: text.rfind("\n") + 1] or first
    if not whole.startswith(first):
        raise InputError(
            f"expected traces of this model, these facts and settings; {path} has others: change --out or --force"
        )
    for number, line in enumerate(whole.split("\n")[1:-1], 2):
        try:
            traces.append(parse_json(StoredTrace, line, once=True).trace())
        except FormatError as error:
            raise refusal(number, error) from error
    write_text(path, whole)
    return traces


def _say_average(effects: AverageEffects, asked: int, pictures: list[Path], as_json: bool) -> None:
    from reknow.tracing.causal import TOKEN_CLASSES

    if as_json:
        tables = {kind: table.tolist() for kind, table in effects.effects.items()}
        return say_json({"facts": effects.facts, "total_effect": effects.total, "average_indirect_effects": tables})
    say(f"{effects.facts} known facts of {asked}; average total effect {100 * effects.total:.1f} points")
    rows = []
    for kind, table in effects.effects.items():
        for place, token_class in enumerate(TOKEN_CLASSES):
            layer = int(table[place].nan_to_num(-1).argmax())
            mean, error = (100 * float(values[place, layer]) for values in (table, effects.errors[kind]))
            rows.append([kind, token_class, str(layer), f"{mean:.1f} ± {error:.1f}"])
    say_table(["restored", "token", " best layer", " AIE, points"], rows)
    say(*map(str, pictures))
