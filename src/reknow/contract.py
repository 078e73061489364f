"""What a method is, and the two doors that every one goes through: edits in, patch out."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from reknow import __version__
from reknow.checks.arguments import typed
from reknow.checks.bounds import check_settings
from reknow.edits import Edit
from reknow.errors import EditFailed, EditRefused, InputError
from reknow.model.exclusive import exclusively
from reknow.patching.deltas import Delta, LowRank
from reknow.patching.patches import Patch
from reknow.patching.record import PatchKind
from reknow.patching.state_spec import StateSpec
from reknow.published import published
from reknow.registry import METHODS, known_settings, make
from reknow.texts.templates import split_template
from reknow.texts.writing import normalize

if TYPE_CHECKING:
    from reknow.lm import LM


class Method(ABC):
    """A frozen dataclass of settings that turns edits into a patch. Concrete methods are final."""

    together: ClassVar[int] = 1
    """How many edits `edit_each` is given at a time."""
    state_spec: ClassVar[StateSpec | None] = None
    """What its patches keep besides ΔW, which is checked when one is read; None: anything that is finite."""
    kind: ClassVar[PatchKind] = "weights"
    """Of its patches."""
    needs_subject: ClassVar[bool] = False
    """Whether it edits at the subject's last token, so that an edit must name one."""

    def __init_subclass__(cls, **options: Any):
        """What works on the model has it for itself; see `reknow.model.exclusive`."""
        super().__init_subclass__(**options)
        for name in {"edit", "edit_each", "fit"} & set(vars(cls)):
            setattr(cls, name, exclusively(vars(cls)[name]))

    def __post_init__(self):
        check_settings(self)

    @classmethod
    def paper(cls, model: LM | str | None = None, *, source: str | None = None, **settings: Any) -> Self:
        """The method with what its paper, or the authors' code, sets for this model: `ROME.paper("gpt2-xl")`.

        Of a class with several rows in the table of methods the settings say which is meant:
        `ROME.paper("gpt2-xl", average_keys=True)` is R-ROME. `reknow.published.published` says where the values are
        from and what cannot be said.

        Args:
            model: its name, or an LM, which is recognised by its sizes; None: where the same holds for all models.
            source: part of the name of another repository, as `easyedit`; None: the authors', or whose there is.
            settings: fields that shall be different.

        Raises:
            InputError: nothing is published for this method and model, or by this source; or a setting is none.
        """
        settings = known_settings(cls, settings, cls.__name__)
        row = cls(**settings).name
        return make(row, {**published(row, model, source).settings, **settings})

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in the table of methods."""

    @abstractmethod
    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        """The patch that makes the edits on `lm` as it is now; `lm` is left bit for bit as it was.

        Raises:
            InputError: no edits, or settings that do not fit the model.
            EditRefused: an edit that this method cannot make.
            EditFailed: the computation broke down.
        """

    @exclusively
    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        """A patch for every edit by itself, each on `lm` as it is now; what `edit` gives for them one by one.

        Methods that can compute many at a time do.
        """
        return [self.edit(lm, [edit]) for edit in edits]

    def one_answer_per_key(self) -> bool:
        """Whether of edits with the same text up to the subject's end only one can be made in a patch."""
        return self.needs_subject

    def seen(self, lm: LM, edits: Sequence[Edit]) -> list[Edit]:
        """Those of the edits from which it has learned to edit `lm`: their scores would mean nothing.

        Raises:
            InputError: it has not learned to edit this model.
        """
        return []

    def own_layers(self, lm: LM) -> list[int] | None:
        """The layers that it changes where it chooses by itself; None: it does as its fields say, or `suggest_layer`.

        Raises:
            InputError: it cannot edit this model.
        """
        return None

    def transform_weights(self, lm: LM, edits: int, tokens: int) -> int | None:
        """How often weights of its own are multiplied where it takes the edits' gradient once and transforms it, for
        an estimate of what that costs; None: it works otherwise."""
        return None


@typed
def checked(method: Method, edits: Edit | Sequence[Edit]) -> list[Edit]:
    """The edits as a list. Warns where the method cannot make all of them in one patch.

    Raises:
        InputError: there are none.
        EditRefused: one of them lacks the subject that the method needs, or contradicts an earlier one.
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    if not edits:
        raise InputError(f"expected at least one edit for {method.name}; got none: give an Edit")
    answers: dict[str, Edit] = {}
    for edit in edits:
        if method.needs_subject and edit.subject is None:
            raise EditRefused(
                f"{method.name} edits at the subject's last token and needs a subject; {edit.prompt!r} has none: put "
                "it into braces, as in 'The capital of {France} is' (in Python: Edit.parse), or take a method that "
                f"needs none: {', '.join(_without_subject())}",
                edit,
            )
        other = answers.setdefault(normalize(edit.text), edit)
        if normalize(other.target_new) != normalize(edit.target_new):
            raise EditRefused(
                f"expected edits that agree; {edit.text!r} shall be both {other.target_new!r} and "
                f"{edit.target_new!r}: keep one of them",
                edit,
            )
    if method.one_answer_per_key():
        _warn_of_shared_keys(method, edits)
    return edits


def _without_subject() -> list[str]:
    """The methods whose edits need no subject, by the table."""
    return [name for name, row in METHODS.items() if not row.method.needs_subject]


def _warn_of_shared_keys(method: Method, edits: list[Edit]) -> None:
    begins = {edit.text: split_template(edit.prompt)[0] + str(edit.subject) for edit in edits}
    keys = Counter(begins.values())
    shared = {key: count for key, count in keys.items() if count > 1}
    if shared:
        key, count = next(iter(shared.items()))
        more = f" (and {len(shared) - 1} more such texts)" if len(shared) > 1 else ""
        warnings.warn(
            f"{method.name} finds one key for all {count} edits that begin with {key!r}{more}, so at most one of "
            "them will be made: memit-merge makes them together",
            stacklevel=1,  # said once, whoever calls
        )


def weights_patch(method: Method, lm: LM, edits: Sequence[Edit], deltas: dict[str, Delta], **rest) -> Patch:
    """The patch of a finished computation; `rest` are `state` and `notes`.

    Raises:
        EditFailed: a change is not finite, so nothing is handed out.
    """
    for name, delta in deltas.items():
        for part in (delta.left, delta.right) if isinstance(delta, LowRank) else (delta.matrix,):
            check_finite(f"change of {name}", part)
    return make_patch(method, lm, edits, deltas=deltas, **rest)


def check_finite(what: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise EditFailed(f"expected a finite {what}; got NaN or infinity: lower the learning rate")


def make_patch(method: Method, lm: LM, edits: Sequence[Edit], **rest) -> Patch:
    assert is_dataclass(method) and not isinstance(method, type)
    return Patch(
        method=method.name,
        settings=asdict(method),
        edits=tuple(edits),
        base=lm.fingerprint,
        made_on=tuple(patch.id for patch in lm.patches),
        version=__version__,
        **rest,
    )
