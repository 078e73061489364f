"""What a method is, and what methods do first and last: check the edits, make the patch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, cast

from typing_extensions import Self

from reknow import __version__
from reknow.checks.arguments import typed
from reknow.checks.bounds import check_settings
from reknow.edits import Edit, refuse_contradictions
from reknow.errors import EditFailed, InputError
from reknow.lm import LM
from reknow.model.exclusive import exclusively
from reknow.model.tokens import Text
from reknow.patching.deltas import Delta, delta_tensors
from reknow.patching.patches import Patch
from reknow.patching.record import Footprint, PatchKind
from reknow.patching.state_spec import StateSpec
from reknow.progress import named
from reknow.published import published
from reknow.registry import known_settings, make


class Method(ABC):
    """A frozen dataclass of settings that turns edits into a patch. Concrete methods are final."""

    edits_per_call: ClassVar[int] = 1
    """How many edits `edit_each` is best given at a time."""
    kind: ClassVar[PatchKind] = "weights"
    """What its patches are."""
    state_spec: ClassVar[StateSpec | None] = None
    """What its patches keep besides ΔW, which is checked when one is read; None: anything that is finite."""
    needs_knowledge: ClassVar[bool] = False
    """Whether it builds on what a model knows or understands, so that a random one need not follow its edits."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name in {"edit", "edit_each", "fit"} & set(vars(cls)):  # what works on the model has it for itself
            setattr(cls, name, exclusively(named(vars(cls)[name])))

    def __post_init__(self):
        check_settings(self)

    @classmethod
    def paper(cls, model: LM | str | None = None, *, source: str | None = None, **settings: Any) -> Self:
        """The method as published for a model, by its paper's authors or others (see `published`, also for the
        errors): `ROME.paper("gpt2-xl")`. `settings` go over it, and say which row is meant: `average_keys=True`."""
        row = cls(**known_settings(cls, settings, cls.__name__)).name
        return make(row, published(row, model, source).settings_with(settings))

    def resolve(self, lm: LM) -> Method:
        """The method with nothing left open that `lm` decides about; see `reknow.methods.as_published`."""
        return self

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in the table of methods."""

    @abstractmethod
    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        """The patch that makes the edits on `lm` as it is now; `lm` is left bit for bit as it was.

        Raises InputError: no edits, or settings that do not fit the model; EditRefused: an edit that this method
        cannot make; EditFailed: the computation broke down."""

    @exclusively
    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        """What `edit` gives for each edit by itself; methods that can compute many at a time do."""
        return [self.edit(lm, [edit]) for edit in lm.progress.each("edits", edits)]

    def check(self, edits: Sequence[Edit]) -> None:  # noqa: B027, most can make any
        """Raises EditRefused for an edit that it cannot make; warns where one patch cannot make all of them."""

    def seen(self, lm: LM, edits: Sequence[Edit]) -> list[Edit]:
        """Those of the edits that it was trained on. Raises InputError where it must be trained for `lm` first."""
        return []

    def at_work(self, lm: LM) -> Method:
        """The method that does the work of this resolved one, and so has its cost: itself, or what it wraps."""
        return self

    def footprint(self, lm: LM) -> Footprint | None:
        """None: where its fields or `suggest_layer` say. Raises InputError where it cannot edit this model."""
        return None


def field_values(method: Method) -> dict[str, Any]:
    """The method's fields by name; every concrete method is a dataclass."""
    return asdict(cast(Any, method))


@typed
def check_edits(method: Method, edits: Edit | Sequence[Edit], lm: LM | None = None) -> list[Edit]:
    """The edits as a list; raises InputError where there are none, EditRefused for one that contradicts another or
    cannot be made, TextRefused for one that is longer than what `lm` has positions for."""
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    if not edits:
        raise InputError(f"expected at least one edit for {method.name}; got none: give an Edit")
    refuse_contradictions(edits)
    method.check(edits)
    if lm is not None:
        lm.check_length(lm.encode([Text.asked(edit) for edit in edits]))
    return edits


def make_patch(method: Method, lm: LM, edits: Sequence[Edit], deltas: dict[str, Delta], **rest) -> Patch:
    """The patch of a computation on `lm`; `rest` are other fields of it. Raises EditFailed for NaN or infinity."""
    settings, made_on = field_values(method), tuple(patch.id for patch in lm.patches)
    patch = Patch(method.name, settings, tuple(edits), deltas, lm.fingerprint, made_on, version=__version__, **rest)
    for name, tensor in (delta_tensors(deltas) | patch.state).items():
        if not bool(tensor.isfinite().all()):
            raise EditFailed(f"expected finite numbers in {name}; got NaN or infinity: lower the learning rate")
    return patch
