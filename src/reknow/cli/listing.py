"""`reknow methods`: what there is, what a setting means, and what papers set."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from typing import Annotated, Any

import typer

from reknow.cli.terminal import say, say_table


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, to see its settings.")] = None,
    cite: Annotated[bool, typer.Option("--cite", help="Print the paper for a bibliography (BibTeX).")] = False,
) -> None:
    """List the methods with what they need, or explain one and its settings."""
    from reknow.checks.bounds import describe_type, field_types
    from reknow.cli.settings import build_method, field_docs
    from reknow.registry import METHODS

    if cite:
        return _say_papers([name] if name else list(METHODS))
    if name is None:
        return _say_all()
    if name not in METHODS:
        return _say_published(name)
    method = build_method(name)
    docs, known = field_docs(type(method)), field_types(type(method))
    say(f"{name}: {METHODS[name].paper}", (type(method).__doc__ or "").split("\n")[0], "")
    rows = [
        [field, str(getattr(method, field)), describe_type(known[field]), docs.get(field, "")]
        for field in _fields(type(method))
    ]
    say_table(["setting", "default", "type", "meaning"], rows)


def _say_papers(names: list[str]) -> None:
    """Each paper once, as BibTeX."""
    from reknow.cli.citing import cite

    say("\n\n".join(dict.fromkeys(cite(name) for name in names)))


def _say_all() -> None:
    """A line for each method, family by family."""
    from reknow.learning.learned import Learned
    from reknow.registry import FAMILIES, METHODS, NEED_A_SUBJECT

    family = {method: name for name, methods in FAMILIES.items() for method in methods}
    sentence = {method: text for methods in FAMILIES.values() for method, text in methods.items()}
    rows = [
        [
            name,
            family.get(name, "other"),
            sentence.get(name) or (row.method.__doc__ or "").split("\n")[0],
            "yes" if name in NEED_A_SUBJECT else "–",
            "yes" if issubclass(row.method, Learned) else "–",
            "yes" if row.method.kind == "weights" else "no",
        ]
        for name, row in sorted(METHODS.items(), key=lambda item: _place(item[0], list(sentence)))
    ]
    say_table(["method", "family", "what it does", "subject", "training", "export"], rows)
    say(
        "",
        "subject: needs one, in braces. training: needs an editor, trained once for a model.",
        "export: goes into other programs' files; what does not is asked by ask, chat and serve.",
        "reknow methods NAME explains the settings of one, NAME-paper those that papers set",
    )


def _place(name: str, known: list[str]) -> int:
    return known.index(name) if name in known else len(known)


def _say_published(name: str) -> None:
    """What is published for `NAME-paper`, or for one model as `NAME-paper:MODEL`: first what all share."""
    from reknow.methods.as_published import AsPublished
    from reknow.published import holds_for_any, published, published_models, published_sources
    from reknow.registry import find_row, make

    paper = make(name, {})
    assert isinstance(paper, AsPublished)
    row, models = paper.row, [paper.model]
    if paper.model is None:
        models = [*published_models(row), *([None] if holds_for_any(row) else [])] or models
    known = [published(row, model, by) for model in models for by in [None, *published_sources(row, model)]]
    every = [{**one.settings, **one.training} for one in known]
    shared = {key: value for key, value in every[0].items() if all(one.get(key, ...) == value for one in every)}
    say(f"{name}: {find_row(name).paper}", *([f"all: {_shown(shared)}"] if len(every) > 1 else []), "")
    own = every if len(every) == 1 else [{k: v for k, v in one.items() if k not in shared} for one in every]
    rows = [[one.model or "any", _shown(each), one.sources[0]] for one, each in zip(known, own, strict=True)]
    say_table(["model", "settings", "source"], rows)
    say("", *dict.fromkeys(note for one in known for note in one.notes))


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


def _fields(method: type) -> list[str]:
    """Names of a method's settings, its own before those that it shares with others."""
    names = {field.name for field in fields(method)}  # type: ignore[arg-type]
    declared = (name for cls in method.__mro__ for name in inspect.get_annotations(cls) if name in names)
    return list(dict.fromkeys(declared))
