"""A causal trace in words: what a token is called, what the whole shows, what one cell says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from reknow.errors import InputError
from reknow.texts.writing import word_spans
from reknow.tracing.causal import PARTIAL_CHARACTER, Trace
from reknow.tracing.restoration import Restoration, RestorationKind, list_restorations

NAMES: dict[RestorationKind, str] = {
    "hidden": "hidden state",
    "mlp": "MLP",
    "attention": "attention",
    "mlp_severed": "hidden state, MLP severed",
    "attention_severed": "hidden state, attention severed",
}
"""What is restored, in titles."""

LEAST = 0.1
"""The share of the answer's probability that it has to lose for the subject to matter."""

_ALL, _MOST, _LITTLE = 0.995, 0.495, 0.1
"""Shares of what was lost: at least so much is all of it, or half as it is written; less than the last is little."""

_LONGEST = 24
"""Characters of a word that is shown whole behind each of its tokens."""


# --- tokens -----------------------------------------------------------------------------------------------


class Label(NamedTuple):
    """A token in its word: what stands before it there, the token, what stands behind it."""

    before: str
    token: str
    after: str
    in_subject: bool

    @property
    def text(self) -> str:
        return self.before + self.token + self.after


def label_tokens(trace: Trace) -> list[Label]:
    """How each token of the prompt is shown: in the word that it is a part of, as far as there are words.

    A character of several tokens is shown for each of them, with a number; special tokens as they are.
    """
    places, words = _token_places(trace), word_spans(trace.prompt)
    labels = []
    for number, (token, place) in enumerate(zip(trace.tokens, places, strict=True)):
        marked = trace.subject[0] <= number < trace.subject[1]
        if place is None:
            labels.append(Label("", shown(token), "", marked))
            continue
        start, end = place
        if PARTIAL_CHARACTER in token:
            alike = [other for other, its in enumerate(places) if its == place]
            labels.append(Label("", trace.prompt[start:end], f" {alike.index(number) + 1}/{len(alike)}", marked))
            continue
        first, behind = next((word for word in words if word[0] <= start and end <= word[1]), place)
        before, after = trace.prompt[first:start], trace.prompt[end:behind]
        if behind - first > _LONGEST:
            before, after = "…" if before else "", "…" if after else ""
        labels.append(Label(before, shown(trace.prompt[start:end]), after, marked))
    return labels


def shown(token: str) -> str:
    """A token without the spaces around it; what cannot be seen is written out."""
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token.strip(" "))
    return visible or "␣"


def _token_places(trace: Trace) -> list[tuple[int, int] | None]:
    """Where each token stands in the prompt; None where it is not seen there. Tokens that are parts of characters
    have the place of all such tokens around them."""
    places: list[tuple[int, int] | None] = []
    cursor, lost = 0, []  # behind the last token that was found; parts of characters since then
    for number, token in enumerate(trace.tokens):
        places.append(None)
        if PARTIAL_CHARACTER in token:
            lost.append(number)
            continue
        text = token.strip()
        start = len(trace.prompt) - len(trace.prompt[cursor:].lstrip())
        found = trace.prompt.find(text, start) if text else -1
        if found < 0 or (found > start and not lost):
            continue
        _place_parts(trace.prompt, places, lost, cursor, found)
        places[number] = (found, found + len(text))
        cursor, lost = found + len(text), []
    _place_parts(trace.prompt, places, lost, cursor, len(trace.prompt))
    return places


def _place_parts(prompt: str, places: list, parts: Sequence[int], start: int, end: int) -> None:
    """Gives parts of characters the stretch of the prompt that no other token has."""
    stretch = prompt[start:end]
    if stretch.strip():
        place = (end - len(stretch.lstrip()), start + len(stretch.rstrip()))
        places[:] = [place if number in parts else old for number, old in enumerate(places)]


def subject_text(trace: Trace) -> str:
    """The subject as the prompt has it."""
    first, behind = trace.subject
    found = [place for place in _token_places(trace)[first:behind] if place is not None]
    if len(found) < behind - first:
        return shown("".join(trace.tokens[first:behind]))
    return trace.prompt[found[0][0] : found[-1][1]]


def name_place(trace: Trace, token: int, *, quoted: bool = True) -> str:
    """A token by its place: "the subject's last token, “ux”". Not `quoted`: the place, where it is one token's."""
    (first, behind), end = trace.subject, len(trace.tokens) - 1
    unique = True
    if first == token == behind - 1:
        said = "the subject's only token"
    elif token == behind - 1:
        said = "the subject's last token"
    elif token == first:
        said = "the subject's first token"
    elif token == end:
        said = "the prompt's last token"
    else:
        unique, side = False, "of" if first < token < behind else "before" if token < first else "behind"
        said = f"a token {side} the subject"
    if token == end and token < behind:
        said += " and the prompt's"
    return said if unique and not quoted else f"{said}, “{label_tokens(trace)[token].token}”"


def _quoted(text: str) -> str:
    return f"“{shown(text)}”"


# --- the whole --------------------------------------------------------------------------------------------


def answer_matters(trace: Trace) -> bool:
    """Whether the answer loses so much with the subject corrupted that restoring can show something."""
    return trace.clean - trace.corrupted >= LEAST * trace.clean > 0


def sentence_of(trace: Trace) -> str:
    """One sentence that says what a trace shows: what the answer loses with the subject corrupted, and where most of
    that comes back."""
    answer, subject = _quoted(trace.answer), f"“{subject_text(trace)}”"
    clean, corrupted = percent(trace.clean), percent(trace.corrupted)
    if not answer_matters(trace):
        if trace.corrupted > trace.clean:
            return (
                f"The answer does not hang on the subject here: {answer} has {clean}, and {corrupted} with {subject} "
                "corrupted, so there is nothing to bring back."
            )
        return (
            f"The subject hardly matters here: {answer} has {clean}, and still {corrupted} with {subject} corrupted, "
            "so there is little to bring back."
        )
    fall = f"With {subject} corrupted, {answer} falls from {clean} to {corrupted}"
    return "; ".join([fall, *_hidden_parts(trace), *_module_parts(trace)]) + "."


def _hidden_parts(trace: Trace) -> list[str]:
    """Where the hidden state carries the answer: at a token before the last one, then at the last one."""
    shares = _shares(trace, "hidden")
    if shares is None:
        return []
    enough, last = shares >= _MOST, len(shares) - 1  # NaN is not enough
    wide = enough.sum(1) + shares.nan_to_num(0).amax(1).clamp(0, 0.99)  # the most layers, then the largest share
    earlier = int(wide[:last].argmax()) if last else last
    named = [token for token in dict.fromkeys((earlier, last)) if enough[token].any()]
    if not named:
        token, layer = _largest(shares)
        return [
            f"no hidden state brings most of that back, at best {_share(shares[token, layer])} in layer {layer} at "
            f"{name_place(trace, token)}"
        ]
    where = [f"at {name_place(trace, token)}, {_in_layers(enough[token].tolist())}" for token in named]
    only = "only " if named == [last] else ""
    return [f"restoring the hidden state brings most of that back {only}{', and '.join(where)}"]


def _module_parts(trace: Trace) -> list[str]:
    """Which MLPs or attention bring back most."""
    kinds: tuple[RestorationKind, ...] = ("mlp", "attention")
    tables: dict[RestorationKind, Tensor] = {
        kind: table for kind in kinds if (table := _shares(trace, kind)) is not None
    }
    if not tables:
        return []
    named = " and ".join({"mlp": "MLPs", "attention": "attention"}[kind] for kind in tables)
    best = max(tables, key=lambda kind: float(tables[kind].nan_to_num(-math.inf).max()))
    token, layer = _largest(tables[best])
    share = float(tables[best][token, layer])
    if share < _LITTLE:
        return [f"{named} by themselves bring back less than {_share(_LITTLE)}"]
    run = _restoration(trace, best, layer)
    verb = "bring" if best == "mlp" and run.last > run.first else "brings"
    most = "all" if share >= _ALL else f"most, {_share(share)}"
    return [f"of {named}, {_what(run)} at {name_place(trace, token, quoted=False)} {verb} back {most}"]


def _shares(trace: Trace, kind: RestorationKind) -> Tensor | None:
    """The share of the loss that each cell brings back. (tokens, layers); None where no cell is traced."""
    if kind not in trace.restored or bool(trace.restored[kind].isnan().all()):
        return None
    return trace.effects(kind) / (trace.clean - trace.corrupted)


def _largest(table: Tensor) -> tuple[int, int]:
    return divmod(int(table.nan_to_num(-math.inf).argmax()), table.shape[1])


def _in_layers(chosen: Sequence[bool]) -> str:
    """The chosen layers of a model in words: "from layer 3 on", "in layers 0–2 and 5"."""
    runs = []
    for is_chosen, run in groupby(range(len(chosen)), lambda layer: chosen[layer]):
        runs += [list(run)] if is_chosen else []
    if len(runs) == 1 and chosen[-1] and len(runs[0]) > 1:
        return "in every layer" if chosen[0] else f"from layer {runs[0][0]} on"
    said = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    *most, last = said
    return f"in layer{'s' if sum(chosen) > 1 else ''} " + " and ".join([*([", ".join(most)] if most else []), last])


def _share(share: float | Tensor) -> str:
    """A share of what was lost."""
    return "nothing" if share < 0.005 else "all" if share >= _ALL else f"{round(100 * float(share))} %"


def _restoration(trace: Trace, kind: RestorationKind, layer: int) -> Restoration:
    return list_restorations(kind, trace.restored[kind].shape[1], trace.window)[layer]


def _what(restoration: Restoration) -> str:
    """What a run restored, with its layers."""
    first, last = restoration.first, restoration.last
    where = f"layer {first}" if first == last else f"layers {first}–{last}"
    match restoration.kind:
        case "mlp":
            return f"the MLP{'s' if last > first else ''} of {where}"
        case "attention":
            return f"attention in {where}"
        case "hidden":
            return f"the hidden state of {where}"
        case severed:
            part = {"mlp_severed": "MLPs", "attention_severed": "attention"}[severed]
            return f"the hidden state of {where}, that token's {part} left corrupted,"


def percent(probability: float) -> str:
    """A probability as people read it."""
    return "< 0.1 %" if 0 < probability < 0.0005 else f"{100 * probability:.1f} %"


# --- one cell ---------------------------------------------------------------------------------------------


def cell_sentence(trace: Trace, kind: str, token: int, layer: int) -> str:
    """What one cell says: what was restored where, the answer's probability then, and how much of the loss is back.

    Raises:
        InputError: the trace has no such cell.
    """
    known: RestorationKind | None = next((each for each in trace.restored if str(each) == kind), None)
    table = None if known is None else trace.restored[known]
    if known is None or table is None or not (0 <= token < table.shape[0] and 0 <= layer < table.shape[1]):
        sizes = f"{len(trace.tokens)} tokens" + ("" if table is None else f" and {table.shape[1]} layers")
        raise InputError(
            f"expected a cell of {', '.join(trace.restored)} with {sizes}; got {kind} at token {token}, layer "
            f"{layer}: choose one of the picture"
        )
    what, where = _what(_restoration(trace, known, layer)), name_place(trace, token)
    value = float(table[token, layer])
    if math.isnan(value):
        return f"{what[0].upper()}{what[1:].rstrip(',')} at {where}: this was not traced."
    said = f"With {what} restored at {where}, {_quoted(trace.answer)} has {percent(value)}"
    clean, corrupted = percent(trace.clean), percent(trace.corrupted)
    if not answer_matters(trace):
        return f"{said}; it has {clean} as it is, and {corrupted} with the subject corrupted."
    share = (value - trace.corrupted) / (trace.clean - trace.corrupted)
    return f"{said}: {_share(share)} of what corrupting the subject takes away, from {clean} to {corrupted}, is back."
