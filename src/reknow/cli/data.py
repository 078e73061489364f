"""`reknow data`: the sets that are known, the form of a file of one's own, and what is wrong with a file."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import Encoding, Json
from reknow.cli.terminal import say, say_json, say_table

if TYPE_CHECKING:
    from reknow.datasets.file_check import Again, Checked

_BAD = 1
"""The status of a file that was read and is not as it should be."""


def sets(ctx: typer.Context, as_json: Json = False) -> None:
    """List the data sets that are known, or examine a file of yours: check, schema."""
    if ctx.invoked_subcommand is not None:
        return
    from reknow.datasets import DATASETS, FACTS
    from reknow.datasets.reading import read_sample

    rows = [
        {
            "name": name,
            "kind": kind,
            "bundled": len(read_sample(source.sample)) if source.sample else 0,
            "licence": source.licence,
            "source": source.source,
        }
        for kind, table in (("cases", DATASETS), ("known facts", FACTS))
        for name, source in table.items()
    ]
    if as_json:
        return say_json(rows)
    for kind in ("cases", "known facts"):
        of_kind = [
            [row["name"], f"{row['bundled']:,}", row["licence"], row["source"]] for row in rows if row["kind"] == kind
        ]
        say_table(
            [kind, " bundled", "licence", "from"],
            [[name, "–" if n == "0" else n, *rest] for name, n, *rest in of_kind],
        )
    say(
        "–: give the file, NAME:FILE or FILE; bundled: how many records of it come with reknow",
        "reknow data check FILE says what is wrong with a file, reknow data schema prints the form of your own edits",
    )


def check(
    file: Annotated[
        str, typer.Argument(help="JSON, JSON lines or CSV, or hub:owner/name[:file].", show_default=False)
    ],
    form: Annotated[
        str | None, typer.Option("--as", help="Its form, a name that `reknow data` lists; else what its fields tell.")
    ] = None,
    encoding: Encoding = None,
    as_json: Json = False,
) -> None:
    """Name every bad record of a file, with line and reason: status 0 where all of it can be read, else 1.

    Edits that are asked for twice are listed; two answers to one question are an error in a file whose edits are made
    together.
    """
    from reknow.datasets.file_check import check_file

    found = check_file(file, form=form, encoding=encoding)
    if as_json:
        say_json({"sound": found.is_sound, **asdict(found)})
    else:
        _say(found)
    if not found.is_sound:
        raise typer.Exit(_BAD)


def _say(found: Checked) -> None:
    if found.bad:
        rows = [[_number(bad.line), _number(bad.record), bad.reason] for bad in found.bad]
        say_table([" line", " record", "what is wrong"], rows)
    for title, again in (("asked twice", found.twice), ("two answers to one question", found.contradictions)):
        if again:
            say_table(
                [" line", " record", title], [[_number(one.line), str(one.record), _told(one)] for one in again]
            )
    if found.unanswered:
        rows = [[_number(one.line), str(one.record), one.question] for one in found.unanswered]
        say_table([" line", " record", "question without an answer"], rows)
    form = f"form {found.form}" if found.form else "no form that is known"
    left_out = f", {found.left_out} left out as the form says" if found.left_out else ""
    say(f"{found.file}: {form}, {found.records} records, {found.fine} fine, {len(found.bad)} bad{left_out}")
    if found.contradictions:
        together = "refuses them" if found.contradictions_are_bad else "would refuse them"
        say(f"contradictions: {len(found.contradictions)}; one patch for all {together}")
    if found.without_subject:
        say(f"without a subject: {found.without_subject} edits, which rome and its relatives refuse")
    if found.unanswered:
        say(f"without an answer: {len(found.unanswered)} questions, which are left out")


def _told(one: Again) -> str:
    earlier = "an earlier record" if one.first is None else f"line {one.first}"
    return f"{one.prompt} → {' and '.join(map(repr, one.answers))}, as {earlier}"


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


def schema() -> None:
    """Print the JSON schema of a JSON file of your own edits."""
    from reknow.datasets import own

    say_json(own.schema())


def commands(kind: type) -> typer.Typer:
    """The group of commands; `kind` is the class of each."""
    group = typer.Typer(name="data", help=sets.__doc__, invoke_without_command=True, callback=sets)
    for command in (check, schema):
        group.command(cls=kind)(command)
    return group
