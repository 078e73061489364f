"""Prompts as templates: `{}` where the subject stands, `{{` and `}}` for braces that are meant, as in `str.format`.

A template whose braces besides the `{}` are not all doubled is taken as it is, so that LaTeX and code need no escape
where nothing can be mistaken; in a prompt whose subject is marked by braces, every other brace has to be doubled.
"""

from __future__ import annotations

import re

from reknow.errors import InputError
from reknow.texts.writing import explain_difference, find_all

_DOUBLED = re.compile(r"(\{\{|\}\}|\{\})")
_MARKED = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_CODE_BEFORE = re.compile(r"([A-Za-z0-9_\\$%#@=^&|<~]|[A-Za-z][\"`])$")
_CODE_AFTER = re.compile(r"[A-Za-z0-9_{(\[]")
_CODE_INSIDE = re.compile(r"\d$|.*[\\^=]|.*[\"']\s*:|.*(:[.\d]|![rsa]$)")
_ESCAPE = "write {{ and }} for braces that are meant"


def split_template(template: str) -> list[str]:
    """The texts between the places of the subject, with single braces."""
    parts = _DOUBLED.split(template)
    if set("{}") & set("".join(parts[::2])):
        return template.split("{}")
    single = "".join("\0" if part == "{}" else part[0] if part in ("{{", "}}") else part for part in parts)
    return single.split("\0")


def fill(template: str, subject: str | None) -> str:
    """The template with the subject in its places; None leaves them as they are."""
    return ("{}" if subject is None else subject).join(split_template(template))


def escape_braces(text: str) -> str:
    """The template of a text whose braces are meant as they stand, but for the `{}`."""
    parts = text.split("{}")
    doubled = "{}".join(part.replace("{", "{{").replace("}", "}}") for part in parts)
    return text if split_template(text) == parts else doubled


def make_template(prompt: str, subject: str) -> tuple[str, str]:
    """The prompt with exactly one `{}`, and the subject as the prompt spells it.

    The subject may stand in the prompt, also in braces, in any Unicode form.

    Raises:
        InputError: the place is missing or ambiguous.
    """
    marks = [mark for mark in _MARKED.finditer(prompt) if mark[1] == subject]
    for mark in marks:
        _refuse_code(prompt, mark)
    for mark in reversed(marks):
        prompt = f"{prompt[: mark.start()]}{{}}{prompt[mark.end() :]}"
    parts = split_template(prompt)
    if len(parts) == 2:
        return prompt, subject
    if len(parts) > 2:
        raise InputError(
            f"expected one {{}} in the prompt; got {len(parts) - 1} in {prompt!r}: keep the one to edit at, and "
            f"{_ESCAPE}"
        )
    (text,) = parts
    mark = find_all(text, subject)
    if len(mark) != 1:
        what = f"contains it {len(mark)} times" if mark else f"does not contain it{explain_difference(text, subject)}"
        raise InputError(
            f"expected the subject {subject!r} once in the prompt; {prompt!r} {what}: spell it alike, and put the "
            "one to edit at into braces, as in 'The capital of {France} is'"
        )
    ((start, end),) = mark
    head, tail = text[:start], text[end:]
    if prompt != text or "{}" in head + tail:
        head, tail = (part.replace("{", "{{").replace("}", "}}") for part in (head, tail))
    return f"{head}{{}}{tail}", text[start:end]


def parse_marked(text: str) -> tuple[str, str | None]:
    """Template and subject of a prompt whose subject stands in braces; None where all braces are doubled ones.

    Raises:
        InputError: the braces do not enclose exactly one subject, or they may be part of the text.
    """
    marks = [mark for mark in _MARKED.finditer(text) if mark[1] is not None]
    stray = set("{}") & set(_MARKED.sub("", text))
    if stray or len(marks) > 1 or not _MARKED.search(text) or not all(mark[1].strip() for mark in marks):
        raise InputError(
            f"expected one subject in braces, as in 'The capital of {{France}} is'; got {text!r}: mark the subject, "
            f"or give it by itself, and {_ESCAPE}"
        )
    if not marks:
        return text, None
    _refuse_code(text, marks[0])
    return f"{text[: marks[0].start()]}{{}}{text[marks[0].end() :]}", marks[0][1]


def _refuse_code(text: str, mark: re.Match) -> None:
    """Raises InputError where braces around a subject look like those of a formula or a program."""
    before, after = text[: mark.start()], text[mark.end() :]
    quoted = before[-1:] == after[:1] == "'" and before[-2:-1].isalpha()  # f'{x}', but l'{Italie}
    if quoted or _CODE_BEFORE.search(before) or _CODE_AFTER.match(after) or _CODE_INSIDE.match(mark[1]):
        raise InputError(
            f"expected a subject in braces, apart from other signs; {mark[0]!r} in {text!r} may be part of the "
            f"text: {_ESCAPE}, or give the subject by itself, and {{}} where it stands"
        )
