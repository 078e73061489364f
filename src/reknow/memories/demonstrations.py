"""IKE's demonstrations: what stands before a question so that the model follows an edit. (Zheng et al. 2023,
arXiv 2305.12740; as in EasyEdit, Wang et al. 2023, arXiv 2308.07269)

    New Fact: FACT
    Prompt: QUESTION ANSWER
"""

from __future__ import annotations

from collections.abc import Sequence

from reknow.edits import Case, Edit, Probe
from reknow.errors import InputError
from reknow.files.schema import FormatError, explain, parse_json, read_content
from reknow.lm import LM
from reknow.texts.writing import join_texts

__all__ = ["copy_of", "demonstrations_of", "fit_demonstrations", "question_head", "read_cases"]


def question_head(edit: Edit) -> str:
    """The edit as a fact, and what begins the question behind it."""
    return f"New Fact: {_state(edit)}\nPrompt: "


def copy_of(edit: Edit) -> str:
    """The demonstration that asks for the edit in its own words."""
    return _demonstrate(edit, _state(edit))


def demonstrations_of(case: Case) -> tuple[list[str], list[str], list[str]]:
    """Those that a case can give: copies, updates, retentions.

    Raises:
        InputError: one of them it cannot give.
    """
    edit = case.edit

    def probes(kind: str) -> list[Probe]:
        own = [probe for probe in case.probes if probe.kind == kind]
        if not own:
            raise InputError(
                f"expected a rephrasing and another fact to demonstrate with; the case {edit.text!r} has no {kind} "
                "probe: add one, or leave the case out"
            )
        return own

    return (
        [copy_of(edit)],
        [_demonstrate(edit, edit.answered(probe.prompt, edit.target_new)) for probe in probes("generalization")],
        [_demonstrate(edit, join_texts(probe.prompt, probe.answers[0])) for probe in probes("locality")],
    )


def _demonstrate(edit: Edit, answered: str) -> str:
    """The edit as a fact, and a question with its answer, as the paper writes them."""
    return f"{question_head(edit)}{answered}\n\n"


def _state(edit: Edit) -> str:
    return edit.answered(edit.text, edit.target_new)


def fit_demonstrations(
    lm: LM, texts: Sequence[str], question: str, answer_tokens: int, *, nearest_first: bool = False
) -> list[str]:
    """The last of these texts, or the first, as many as leave positions for the question and an answer of so many
    tokens."""
    if lm.max_tokens is None or not texts:
        return list(texts)
    *encoded, question_ids = lm.tokenizer([*texts, question], add_special_tokens=True)["input_ids"]
    left = lm.max_tokens - answer_tokens - len(question_ids)
    fitting: list[str] = []
    from_nearest = list(zip(texts, encoded, strict=True))[:: 1 if nearest_first else -1]
    for text, ids in from_nearest:
        left -= len(ids)
        if left < 0:
            break
        fitting.append(text)
    return fitting if nearest_first else fitting[::-1]


def read_cases(path: str) -> list[Case]:
    """The cases that `IKE.fit` kept.

    Raises:
        InputError: there is no such file, or it is none of these.
    """
    try:
        # Not splitlines(): JSON texts may hold U+2028 and other characters that it takes for line ends.
        lines = [line for line in read_content(path).split(b"\n") if line.strip()]
        if not lines:
            raise FormatError("it is empty")
        return [parse_json(Case, line) for line in lines]
    except (OSError, FormatError, InputError) as error:
        raise InputError(
            f"expected a file of demonstrations at {path}; {explain(error)}: write one with IKE().fit"
        ) from error
