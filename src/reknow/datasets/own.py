"""A user's own edits: records whose fields are those of `Edit`, and questions of the user's own.

`OwnRecord` is their published form; `reknow data schema` prints it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter
from typing_extensions import TypeAliasType

from reknow.datasets.probes import ANSWERS, read_probes
from reknow.datasets.records import Record
from reknow.datasets.relations import MORE
from reknow.edits import Case, Edit, Kind, Probe
from reknow.errors import InputError, did_you_mean

Text = TypeAliasType("Text", str | int | float)
"""A number is the text that stands in the file."""
Texts = TypeAliasType("Texts", Text | list[Text])


class Question(BaseModel):
    """A question and its accepted answers, best first, under one of the names `ground_truth`, `answer`, `answers`,
    `target`."""

    model_config = ConfigDict(
        use_attribute_docstrings=True, json_schema_extra={"anyOf": [{"required": [name]} for name in ANSWERS]}
    )

    prompt: Texts
    """What is asked; of a list the first."""
    ground_truth: Texts | None = None
    answer: Texts | None = None
    answers: Texts | None = None
    target: Texts | None = None


Questions = TypeAliasType("Questions", list[Question] | dict[str, Question | list[Question]])
"""Questions, or lists of them by name."""


class OwnRecord(BaseModel):
    """One edit, and questions that examine it."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")

    prompt: Text
    """The beginning of a sentence, or a question. The subject stands in braces, `The capital of {France} is`, or in
    `subject` and in the prompt as `{}` or as it is. Braces that are meant are doubled."""
    target_new: Text
    """The wanted answer."""
    subject: Text | None = None
    """Who or what the fact is about."""
    target_true: Text | None = None
    """The answer that the unedited model is supposed to give."""
    id: Text | None = None
    """Name of the edit in results, another one for each."""
    context: Texts = []
    """Statements of the new knowledge, for In-Context Editing."""
    rephrasings: Texts = []
    """Other ways to ask, `{}` for the subject. In `edit` methods may learn from them, in `bench` they are asked."""
    task: Text | None = None
    """Task family, for editors trained on several tasks."""
    instruction: Text | None = None
    """What the edit is to do, in words, for InstructEdit."""
    separator: str | None = None
    """White space between prompt and answer, "" for none; without it a space where the script has some."""
    locality: Questions = []
    """Other facts, which must stay as they are."""
    portability: Questions = []
    """What follows from the edit."""
    negation: Questions = []
    """The request negated; the answer is what must not follow."""
    reversal: Questions = []
    """What asks for the subject by the new answer."""


def schema() -> dict[str, Any]:
    """The JSON schema of a JSON file of one's own edits: a list of `OwnRecord`, or one."""
    found = TypeAdapter(OwnRecord | list[OwnRecord]).json_schema()
    for described in (*found["$defs"].values(), *found["$defs"]["OwnRecord"]["properties"].values()):
        if "description" in described:
            described["description"] = " ".join(described["description"].split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Edits of one's own", **found}


_EDIT = tuple(field.name for field in fields(Edit) if field.init)
_LISTS = ("context", "rephrasings")
QUESTIONS: tuple[Kind, ...] = ("locality", "portability")
_FIELDS = tuple(OwnRecord.model_fields)


def read_edit(record: Record) -> Edit:
    """The edit of a record; what examines it is passed over.

    Raises:
        InputError: unknown or missing field, or what `Edit` refuses.
    """
    for name in record.fields:
        if name not in _FIELDS:
            raise InputError(f"{record.where}: {did_you_mean('field', str(name), _FIELDS)}")
    values: dict[str, Any] = {}
    for name in filter(record.has, [name for name in _EDIT if name != "separator"]):
        values[name] = record.texts(name) if name in _LISTS else record.text(name)
    if record.fields.get("separator") is not None:  # white space counts there
        values["separator"] = record.fields["separator"]
    prompt = record.text("prompt")
    record.text("target_new")
    del values["prompt"]
    try:
        if "{" in prompt and "subject" not in values:
            return Edit.parse(prompt, **values)
        return Edit(prompt, **values)
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None


def read_case(name: str, record: Record) -> Case:
    """The edit of a record with its questions, all of which may be missing.

    | field | becomes |
    |---|---|
    | `rephrasings` | generalization `rephrase`, and no training aid: a method does not see its test |
    | `locality`, `portability` (`[{"prompt": …, "answer": …}, …]`, or such lists by name) | probes of that kind |
    | `negation`, `reversal`, in the same form | the same; the answer of a negation is what must not follow |
    """
    edit = read_edit(record)
    texts = [edit.fill(text) for text in edit.rephrasings]
    probes = [Probe(text, (edit.target_new,), "generalization", "rephrase", edit.separator) for text in texts]
    for kind in (*QUESTIONS, *MORE):
        probes += read_probes(record, kind, kind, kind)
    return Case(replace(edit, rephrasings=(), id=edit.id or f"{name}/{record.index}"), tuple(probes))
