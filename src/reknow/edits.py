"""Edit, Probe and Case: what to change, and how to ask whether it changed.

A method sees `Edit`s only. Probes are for the evaluation, so no method can learn from its own test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass
from functools import reduce
from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, FailFast

from reknow.errors import EditRefused, InputError
from reknow.texts.templates import fill, make_template, parse_marked
from reknow.texts.writing import full_stop, join_texts, normalize, prepend

Kind = Literal[
    "reliability",
    "instructed",
    "generalization",
    "locality",
    "portability",
    "negation",
    "reversal",
    "fluency",
    "sentiment",
]
"""What a probe asks about: the request itself, the same behind its instruction, a paraphrase, other facts,
consequences, the negated request, which the answer must not follow, the subject by the answer, free text, how a topic
is liked."""

_Texts = Annotated[tuple[str, ...], FailFast()]
"""Texts of which, read from a file, only the first wrong one is reported."""
FROM_FILES = ConfigDict(extra="forbid", strict=True)
"""How pydantic makes these classes from JSON."""


@dataclass(frozen=True)
class Edit:
    """One wanted change: `Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")`.

    The prompt holds `{}` where the subject stands. A prompt that contains the subject itself, once, is
    turned into that form; the subject is then spelled as there. `{{` and `}}` are braces that are meant, where all
    others are doubled too; else braces are taken as they are.

    Raises:
        InputError: empty prompt or target, subject not in the prompt, or more than once.
    """

    __pydantic_config__ = FROM_FILES

    prompt: str
    _: KW_ONLY
    subject: str | None = None
    """Entity the fact is about; methods that edit at the subject's last token need it."""
    target_new: str
    """The wanted answer, without a leading space."""
    target_true: str | None = None
    """The answer that the unedited model is supposed to give."""
    id: str | None = None
    """Name of the edit in results."""
    context: _Texts = ()
    """Statements of the new knowledge, for In-Context Editing."""
    rephrasings: _Texts = ()
    """Paraphrases of the prompt that a method may train on, `{}` for the subject; never probes."""
    task: str | None = None
    """Task family, for editors trained on several tasks."""
    instruction: str | None = None
    """What the edit is to do, in words, put in front of it by `instructed`, for InstructEdit."""
    separator: str | None = None
    """White space between prompt and answer, "" for none; None: a space, but none next to a script without spaces
    (Chinese, Japanese, Thai …) and none behind an opening mark."""

    def __post_init__(self):
        for name in ("prompt", "target_new", "subject", "target_true"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):  # 1945 is what the model shall say
                object.__setattr__(self, name, value := str(value))
            if value is None and name in ("subject", "target_true"):
                continue
            _check_text(name, value)
        for name in ("id", "task", "instruction"):
            if not isinstance(value := getattr(self, name), str | None):
                raise InputError(f"'{name}' of an edit is a text; got {value!r}: put it in quotes")
        for name in ("context", "rephrasings"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        _check_separator(self.separator)
        for name, value in vars(self).items():
            check_encodable(f"'{name}' of an edit", value)
        if self.subject is not None:
            prompt, subject = make_template(self.prompt, self.subject)
            object.__setattr__(self, "prompt", prompt)
            object.__setattr__(self, "subject", subject)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.fill(self.prompt)

    @property
    def statement(self) -> str:
        """The edit as a sentence: what to put in front of a question so that a model knows it."""
        stated = self.answered(self.text.strip(), self.target_new.strip().rstrip(".。"))
        return stated + full_stop(stated)

    def answered(self, prompt: str, answer: str) -> str:
        """The answer behind the prompt, with between them what the edit's separator says."""
        return join_texts(prompt, answer) if self.separator is None else prompt.rstrip(" ") + self.separator + answer

    def instructed(self, prompt: str) -> str:
        """The prompt behind task and instruction, as InstructEdit reads it; unchanged where there is none."""
        if self.instruction is None:
            return prompt
        task = "" if self.task is None else f"Task: {self.task}\n"
        return f"{task}Description: {self.instruction}\nInput: {prompt}"

    def fill(self, template: str) -> str:
        """`template` with the subject in place of `{}`, and single braces for doubled ones."""
        return fill(template, self.subject)

    @classmethod
    def parse(cls, marked: str, target_new: str, **fields) -> Edit:
        """An edit from a prompt with the subject in braces: `"The mother tongue of {Danielle Darrieux} is"`.

        Other braces are doubled: `"In Python, f'{{x}}' prints the value of"` has no subject.

        Raises:
            InputError: the braces do not enclose exactly one non-empty subject, or may be part of the text.
        """
        _check_text("prompt", marked)
        template, subject = parse_marked(marked)
        return cls(template, subject=subject, target_new=target_new, **fields)


def _check_text(name: str, value) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"an edit needs a non-empty text as '{name}'; got {value!r}: fill it in")


def _texts(name: str, value) -> tuple[str, ...]:
    """The value as a tuple; raises InputError where it is no list of texts, above all where it is one text."""
    texts = None if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise InputError(f"'{name}' must be a list of texts; got {value!r}: put texts in brackets")
    return texts


def refuse_contradictions(edits: Iterable[Edit]) -> None:
    """Raises EditRefused for the first edit that asks what an earlier one asks and wants another answer."""
    answers: dict[str, Edit] = {}
    for edit in edits:
        other = answers.setdefault(normalize(edit.text), edit)
        if normalize(other.target_new) != normalize(edit.target_new):
            raise EditRefused(
                f"expected edits that agree; {edit.text!r} shall be both {other.target_new!r} and "
                f"{edit.target_new!r}: keep one of them",
                edit,
            )


def check_encodable(what: str, texts: str | Iterable[str] | None) -> None:
    """Raises InputError where a text holds half of a surrogate pair, which no file and no tokenizer takes."""
    for text in (texts,) if isinstance(texts, str) else texts or ():
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"expected {what} as text that can be encoded; {text[:60]!r} has half of a pair at place "
                    f"{error.start}: correct that character"
                ) from None


def _check_separator(separator: str | None) -> None:
    if separator is not None and not (isinstance(separator, str) and not separator.strip()):
        raise InputError(
            f"expected white space or an empty text as 'separator'; got {separator!r}: write other characters at the "
            "end of the prompt"
        )


@dataclass(frozen=True)
class Probe:
    """A question whose answer tells whether an edit worked or did harm."""

    __pydantic_config__ = FROM_FILES

    prompt: str
    answers: _Texts
    """Accepted answers, best first; teacher-forced scores read the first, generated ones accept any."""
    kind: Kind
    name: str
    """Finer than the kind, as in the data set: `paraphrase`, `Subject_Aliasing`, `neighborhood` …"""
    separator: str | None = None
    """White space between prompt and answer; see `Edit.separator`."""

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise InputError(f"expected a probe kind among {', '.join(get_args(Kind))}; got {self.kind!r}")
        object.__setattr__(self, "answers", _texts("answers", self.answers))
        for name, value in (("prompt", self.prompt), ("name", self.name)):
            if not isinstance(value, str):
                raise InputError(f"expected a probe's {name} as text; got {value!r}: put it in quotes")
        check_encodable("a probe", (self.prompt, self.name, *self.answers))
        if self.kind != "fluency" and not any(answer.strip() for answer in self.answers):
            raise InputError(f"a {self.kind} probe needs an answer; got none for {self.prompt!r}")
        _check_separator(self.separator)


@dataclass(frozen=True)
class Case:
    """An edit and the probes that examine it."""

    __pydantic_config__ = FROM_FILES

    edit: Edit
    probes: tuple[Probe, ...] = ()
    also: tuple[Edit, ...] = ()
    """Edits that are made together with it, where only all of them have the consequences that are asked for."""

    def __post_init__(self):
        if not isinstance(self.edit, Edit):
            raise InputError(f"expected the edit of a case as Edit; got {self.edit!r}: make one")
        object.__setattr__(self, "probes", _each("probes", Probe, self.probes))
        object.__setattr__(self, "also", _each("also", Edit, self.also))

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All edits of the case."""
        return (self.edit, *self.also)

    @property
    def asked(self) -> tuple[tuple[Edit, Probe], ...]:
        """All questions, each with the edit whose answers it is about: every request's own prompt (reliability)
        first, behind its instruction too where it has one; then the probes."""
        own = [(edit, _own(edit, edit.text, "reliability")) for edit in self.edits]
        own += [(e, _own(e, e.instructed(e.text), "instructed")) for e in self.edits if e.instruction is not None]
        return (*own, *((self.edit, probe) for probe in self.probes))

    @property
    def questions(self) -> tuple[Probe, ...]:
        """The probes of `asked`."""
        return tuple(probe for _, probe in self.asked)

    @property
    def statement(self) -> str:
        """All edits as sentences."""
        return reduce(prepend, (edit.statement for edit in self.edits))


def _each(name: str, kind: type, values) -> tuple:
    """The values as a tuple; raises InputError where one is nothing of the kind."""
    checked = tuple(values) if isinstance(values, Iterable) else None
    if checked is None or not all(isinstance(value, kind) for value in checked):
        raise InputError(f"expected {name} of a case as a list of {kind.__name__}; got {values!r}: make them so")
    return checked


def _own(edit: Edit, prompt: str, kind: Kind) -> Probe:
    return Probe(prompt, (edit.target_new,), kind, "rewrite", edit.separator)


def to_json(stated: Edit | Case) -> dict:
    """The fields as JSON values; a separator and further edits that are not given are left out, as in files of
    before."""

    def given(fields: list[tuple]) -> dict:
        return {name: value for name, value in fields if name not in ("separator", "also") or value not in (None, ())}

    return asdict(stated, dict_factory=given)


def cases_digest(cases: Iterable[Case]) -> str:
    """A hash of everything in the cases, in order."""
    return hashlib.sha256(json.dumps([to_json(case) for case in cases]).encode()).hexdigest()[:16]
