"""What the screens show, as HTML: the macros of the reports and of `parts.html`, escaping all that they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from markupsafe import Markup

from reknow.edits import Edit
from reknow.evaluation.matching import generated
from reknow.evaluation.tried import Tried
from reknow.report import trace_words
from reknow.report.page import environment, read_part
from reknow.ui.wording import on_page
from reknow.ui.work import State, Work, told

_HERE = Path(__file__).parent


@cache
def _parts(file: str):
    templates = environment(_HERE)
    templates.filters["on_page"] = on_page
    templates.globals |= {"begins": _begins, "percent": percent, "verdict": verdict, "made": _made, "says": _says}
    return templates.get_template(file).module


def draw(macro: str, *values, file: str = "parts.html") -> str:
    """What a macro of `parts.html`, or of another file of this room, makes of the values, in the reports' style."""
    return f'<div class="reknow">{getattr(_parts(file), macro)(*values)}</div>'


def style() -> str:
    """The page's style: the reports' colours for all of it, their rules inside what `draw` gives, and its own."""
    own = "".join((_HERE / f"{name}.css").read_text(encoding="utf-8") for name in ("page", "stack"))
    return f"{read_part('colours.css')}\n.reknow {{\n{read_part('page.css')}\n{read_part('heat_map.css')}\n}}\n{own}"


def draw_state(state: State) -> str:
    """How far a work is."""
    return draw("progress", state, told(state))


def draw_end(work: Work | None) -> str:
    """What is to be said when a work has ended: what went wrong, and what was warned of."""
    if work is None:
        return ""
    error = work.error or ""
    note = work.manner.stopped if work.cancelled else "" if error else work.manner.told
    return draw("message", error, list(dict.fromkeys(work.warnings)), note) if error or work.warnings or note else ""


def percent(share: float | None) -> str:
    """A probability for people."""
    if share is None or share != share:
        return "no number"
    return trace_words.percent(share).replace(" ", "\u00a0")


def verdict(edit: Edit, trial: Tried) -> Markup:
    """What an edit did, in a sentence or two."""
    before, after = trial.before.answers[0], trial.after.answers[0]
    kept, facts = sum(trial.kept), len(trial.facts)
    escape: Callable[[str], Markup] = Markup.escape
    said = "now says" if after.said else "does not say"
    moved = f"{percent(before.probability)} → {percent(after.probability)}"
    others = f"{kept} of {facts} other facts are continued word for word as before"
    text = f"The model {said} <b>{escape(edit.target_new)}</b> ({moved}). {others}"
    return Markup(f"{text}; perplexity of plain text {trial.before.perplexity:.2f} → {trial.after.perplexity:.2f}.")


def _made(trial: Tried) -> str:
    """How the patch was made, and that it went off again."""
    patch = trial.patch
    if patch.kind == "weights":
        names = [f"{name} (rank {delta.rank})" for name, delta in patch.deltas.items()]
        what = f"changes {', '.join(names[:2])}" + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    else:
        what = "changes no weight: a memory beside the model"
    return (
        f"patch {patch.id}, {trial.seconds:.1f} s, {patch.stored_bytes / 1000:,.0f} kB, {what}. Taken off again, all "
        f"{trial.tensors} tensors of the model have every bit as before."
    )


def _says(text: str, answer: str) -> bool:
    """Whether a continuation begins with the answer, as evaluations count it."""
    return bool(generated(text, [answer]))


def _begins(token: str, answer: str | None) -> bool:
    """Whether the token begins the answer."""
    return bool(answer and token.strip()) and str(answer).strip().startswith(token.strip())
