"""`reknow trace`: where the model keeps facts, by causal tracing."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.layers import say_layers
from reknow.cli.options import DEMO, Force, Json, Model, Opening, refuse_beside
from reknow.cli.places import TRACES, trace_header, trace_place
from reknow.cli.spreading import Spreading
from reknow.cli.terminal import say, say_json, say_table
from reknow.errors import InputError
from reknow.files.strict_json import strict_json
from reknow.progress import progress

if TYPE_CHECKING:
    from reknow.edits import Edit
    from reknow.engine.jobs import Engine
    from reknow.engine.shards import Shard
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
    spreading: Spreading,
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
        spreading.refuse("one prompt")
    settings = Tracing(samples=samples, window=window, tokens="classes" if classes else "all")
    if severed:
        settings = replace(settings, kinds=(*settings.kinds, "mlp_severed", "attention_severed"))
    edit = None if prompt is None else Edit.parse(prompt, "?")
    if edit is not None and edit.subject is None:
        raise InputError(f"expected a subject in braces to trace; got {prompt!r}: mark it, as in '{{France}} is in'")
    out = trace_place(out, model, force)
    if edit is not None:
        return _trace_one(opening.open(model), edit, settings, out, as_json)
    spread_traces(spreading, opening, model, facts or _FACTS, limit or _LIMIT, settings, out, force, as_json)


def spread_traces(
    spreading: Spreading,
    opening: Opening,
    model: str,
    name: str,
    limit: int,
    settings: Tracing,
    out: Path,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """`trace_many` by whom the options say, with the lock of the folder, or of a part."""
    from reknow.engine.shards import share_lock

    shard = spreading.parse_shard()
    if shard is not None:
        refuse_beside("--shard", {"--force": force})
    with share_lock(out / TRACES, shard), spreading.engine(partial(opening.open, model), opening.device) as engine:
        trace_many(engine, name, limit, settings, out, force, as_json, shard)


def _trace_one(lm: LM, edit: Edit, settings: Tracing, out: Path, as_json: bool) -> None:
    from reknow.datasets.facts import load_facts
    from reknow.files.outputs import mark_folder
    from reknow.report.trace_plots import save_figure, trace_figure
    from reknow.report.trace_words import label_tokens, sentence_of
    from reknow.tracing.causal import embedding_std, trace_prompt

    assert edit.subject is not None
    traced = trace_prompt(lm, edit.prompt, edit.subject, embedding_std(lm, load_facts("known_1000")), settings)
    mark_folder(out, "trace")
    pictures = save_figure(trace_figure(traced), out / "trace")
    if as_json:
        return say_json(traced.as_json())
    say(sentence_of(traced))
    rows, labels = [], label_tokens(traced)
    for kind, table in traced.restored.items():
        token, layer = divmod(int(table.nan_to_num(-1).argmax()), table.shape[1])
        rows.append([kind, labels[token].token, str(layer), f"{float(table[token, layer]):.3f}"])
    say_table(["restored", "best token", " layer", " P(answer)"], rows)
    say(*map(str, pictures))


def trace_many(
    engine: Engine,
    name: str,
    limit: int,
    settings: Tracing,
    out: Path,
    force: bool,
    as_json: bool,
    shard: Shard | None = None,
) -> None:
    """Traces the known ones among the first facts of a set, goes on where it was, and shows their averages; a shard
    shows none, since it has not all traces."""
    from reknow.datasets.facts import load_facts
    from reknow.engine.shards import part_files
    from reknow.files.atomic import append_line
    from reknow.report.trace_plots import average_figure, effect_bars, save_figure
    from reknow.tracing.causal import StoredTrace, average
    from reknow.tracing.many import TraceJob, TraceTask, find_known

    facts = load_facts(name, limit=limit)
    known = engine.ask(partial(find_known, facts=facts, every=load_facts(name)))
    if not known.facts:
        raise InputError(
            f"expected facts that {known.model} knows; of {len(facts)} it knows none: read more with --limit"
        )
    header, whole = trace_header(known.digest, name, asdict(settings)), out / TRACES
    own = whole if shard is None else shard.file(whole)
    traces = {(trace.prompt,): trace for trace in read_traces(own, header, force)}
    for path in {whole, *part_files(whole).values()} - {own}:
        traces |= {(trace.prompt,): trace for trace in read_traces(path, header, False, growing=True)}
    tasks = [TraceTask(fact) for fact in known.facts]
    tasks = tasks if shard is None else shard.share(tasks)
    done = sum((task.fact.text,) in traces for task in tasks)
    with progress.stage("tracing", len(tasks), unit="facts", done=done) as advance:

        def keep(row: dict[str, Any]) -> None:
            line = strict_json(row)
            append_line(own, line)
            traces[row["prompt"],] = StoredTrace.model_validate_json(line).trace()
            advance()
            number = sum((fact.text,) in traces for fact in known.facts)
            if not as_json and (number % 10 == 0 or number == len(known.facts)):
                say(f"{number} of {len(known.facts)} known facts")

        engine.perform(TraceJob(known.std, settings), tasks, traces, keep, None)
    if shard is not None:
        return say(f"{shard} is whole: {len(tasks)} facts; when all are, the same command without --shard shows them")
    effects = average([traces[fact.text,] for fact in known.facts])
    pictures = [
        *save_figure(average_figure(effects), out / "average"),
        *save_figure(effect_bars(effects), out / "bars"),
    ]
    _say_average(effects, len(facts), pictures, as_json)


def read_traces(path: Path, header: dict, force: bool, *, growing: bool = False) -> list[Trace]:
    """The traces that an earlier run with the same header left; a line that was cut short by a kill is dropped,
    unless the file is another's, who may be `growing` it."""
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
    if not growing:
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
