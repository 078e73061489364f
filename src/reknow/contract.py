"""What a method is, and the two doors that every one goes through: edits in, patch out."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

import reknow
from reknow.checks.arguments import typed
from reknow.checks.bounds import Name, check
from reknow.editing.layers import depth_layer
from reknow.edits import Case, Edit
from reknow.errors import EditFailed, EditRefused, InputError
from reknow.model.exclusive import exclusively
from reknow.patching.kept import Kept
from reknow.patching.memory import versions
from reknow.patching.patches import Delta, Kind, LowRank, Patch
from reknow.texts.templates import sections
from reknow.texts.writing import plain

if TYPE_CHECKING:
    from typing_extensions import Self

    from reknow.learning.training import Draw, Learner, Training
    from reknow.lm import LM


class Method(ABC):
    """A frozen dataclass of settings that turns edits into a patch. Concrete methods are final."""

    together: ClassVar[int] = 1
    """How many edits `edit_each` is given at a time."""
    kept: ClassVar[Kept | None] = None
    """What its patches keep besides ΔW, which is checked when one is read; None: anything that is finite."""
    needs_subject: ClassVar[bool] = False
    """Whether it edits at the subject's last token, so that an edit must name one."""

    def __init_subclass__(cls, **options: Any):
        """What works on the model has it for itself; see `reknow.model.exclusive`."""
        super().__init_subclass__(**options)
        for name in {"edit", "edit_each", "fit"} & set(vars(cls)):
            setattr(cls, name, exclusively(vars(cls)[name]))

    def __post_init__(self):
        check(self)

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


class MemoryMethod(Method):
    """A method whose patches leave the weights alone; see `reknow.patching.memory`."""

    kind: ClassVar[Kind]

    @staticmethod
    @abstractmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> Any:
        """The running memory of these versions, oldest first: a Hook-, Prompt- or RouterMemory, as `kind` says.

        Called whenever the stack changes, so it moves tensors and runs no model.
        """


class BesideMatrix(MemoryMethod):
    """A memory beside the value matrix of a layer, or of a few, which its versions share."""

    kind: ClassVar[Kind] = "hook"
    depth: ClassVar[float]
    """Of its layer where none is given, as a share."""
    layer: int | None
    conflict: Literal["update", "refuse"]

    def own_layers(self, lm: LM) -> list[int]:
        return [depth_layer(lm, self.depth) if self.layer is None else lm.check_layer(self.layer)]


@dataclass(frozen=True, kw_only=True)
class Learned(Method):
    """A method that learns how to edit one model before it can edit it."""

    editor: Name | None = None
    """File or folder of the trained editor; None: the one that is bundled for the model."""

    @property
    @abstractmethod
    def training(self) -> Training:
        """How this method is trained where nothing else is asked for."""

    def for_model(self, lm: LM) -> Self:
        """The settings with which an editor for this model is trained and which it keeps."""
        return replace(self, editor=None)

    @abstractmethod
    def learner(self, lm: LM, learning: Sequence[Case], held: Sequence[Case], training: Training) -> Learner:
        """What is trained, of settings that `for_model` gave; `held` are the cases to validate on."""

    def draw(self, learning: Sequence[Case], training: Training) -> Draw:
        """Which cases make which micro-batch."""
        from reknow.learning.training import shuffled

        return shuffled(learning, training)

    @typed
    def fit(
        self,
        lm: LM,
        cases: Sequence[Case],
        out: str | Path,
        training: Training | None = None,
        *,
        progress: bool = False,
    ) -> Self:
        """Trains an editor in the folder `out`, and gives the method with its field `editor` set to the file.

        Called again on the same folder with the same arguments it goes on where it was. The cases' probes are
        training material here: rewordings that must follow, other facts that must stay. So they must be other cases
        than those of an evaluation, which refuses cases that the editor has seen. The base model is what is
        learned for, without the patches that are applied. Cases that it cannot read are left out, logged.

        Raises:
            InputError: too few cases, or a folder that was started with other arguments.
            EditFailed: the losses are no numbers.
        """
        from reknow.learning.training import readable, split, train  # which read cases, as evaluation does

        training = training or self.training
        learning, held = split(readable(lm, cases), training)
        method = self.for_model(lm)
        with lm.unpatched():
            learner = method.learner(lm, learning, held, training)
        path = train(method, lm, learner, learning, held, out, training, method.draw(learning, training), progress)
        return replace(self, editor=path)


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
        other = answers.setdefault(plain(edit.text), edit)
        if plain(other.target_new) != plain(edit.target_new):
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
    from reknow.methods import METHODS  # which imports the methods, and they this module

    return [name for name, entry in METHODS.items() if not entry.method.needs_subject]


def _warn_of_shared_keys(method: Method, edits: list[Edit]) -> None:
    begins = {edit.text: sections(edit.prompt)[0] + str(edit.subject) for edit in edits}
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
            _check_finite(f"change of {name}", part)
    return _patch(method, lm, edits, deltas=deltas, **rest)


def conflicts(method: MemoryMethod, lm: LM, edits: Sequence[Edit], wanted: str) -> list[dict[str, str]]:
    """The edits whose prompt the method's memory on `lm` answers in another way, for the notes of the patch.

    Raises:
        InputError, EditRefused: see `settled`.
    """
    edited = [edit for patch in versions(lm.patches, method.name) for edit in patch.edits]
    stored = {plain(edit.text): edit.target_new for edit in edited}
    found = [
        ({"prompt": edit.text, "old": stored[plain(edit.text)], "new": edit.target_new}, edit)
        for edit in edits
        if plain(stored.get(plain(edit.text), edit.target_new)) != plain(edit.target_new)
    ]
    return settled(method, found, wanted)


def settled(method: MemoryMethod, clashes: list[tuple[dict[str, str], Edit]], wanted: str) -> list[dict[str, str]]:
    """Stored edits (prompt, old) that get another answer (new), if that is wanted.

    Args:
        clashes: each with the new edit.
        wanted: "update" lets the new edit stand, "refuse" does not.

    Raises:
        InputError: `wanted` is neither.
        EditRefused: it is "refuse" and there are some.
    """
    if wanted not in ("update", "refuse"):
        raise InputError(f"expected conflict to be update or refuse; got {wanted!r}: choose one")
    if clashes and wanted == "refuse":
        told, edit = clashes[0]
        prompt, old, new = (told[key] for key in ("prompt", "old", "new"))
        raise EditRefused(
            f"expected edits that agree with the {method.name} memory; {prompt!r} is stored as {old!r}, got {new!r}: "
            "rebuild without the old edit, or set conflict to update",
            edit,
        )
    return [told for told, _ in clashes]


class Begun(NamedTuple):
    """What an edit of a memory beside a matrix starts from."""

    edits: list[Edit]
    layer: int
    modules: list[str]
    """The value matrices of that layer and of those above."""
    before: list[Patch]
    """The memory's versions so far."""
    notes: dict[str, Any]
    """For the patch: `layer` and `conflicts`."""


def begun(method: BesideMatrix, lm: LM, edits: Sequence[Edit], span: int = 1) -> Begun:
    """The edits checked, the place found, and what is stored there. The memory of the patch must name its `modules`.

    Args:
        span: how many layers take part.

    Raises:
        InputError: see `checked` and `conflicts`; or the memory stands elsewhere.
        EditRefused: see there too.
    """
    edits = checked(method, edits)
    clashes = conflicts(method, lm, edits, method.conflict)
    (layer,) = method.own_layers(lm)
    modules = list(lm.parts.value[layer : layer + span])
    before = versions(lm.patches, method.name)
    if before and (there := before[-1].memory["modules"]) != modules:
        raise InputError(
            f"expected edits of {', '.join(there)}, where the memory is; got {', '.join(modules)}: change layer"
        )
    return Begun(edits, layer, modules, before, {"layer": layer, "conflicts": clashes})


def memory_patch(method: MemoryMethod, lm: LM, edits: Sequence[Edit], state: dict[str, Tensor], **rest) -> Patch:
    """The next version of the method's memory on `lm`: what these edits add; `rest` are `memory` and `notes`.

    Raises:
        EditFailed: a tensor is not finite, so nothing is handed out.
    """
    for name, tensor in state.items():
        _check_finite(f"{name} in the memory", tensor)
    state = {name: tensor.cpu() for name, tensor in state.items()}
    before = versions(lm.patches, method.name)
    follows = before[-1].id if before else None
    return _patch(method, lm, edits, deltas={}, state=state, kind=method.kind, follows=follows, **rest)


def _check_finite(what: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise EditFailed(f"expected a finite {what}; got NaN or infinity: lower the learning rate")


def _patch(method: Method, lm: LM, edits: Sequence[Edit], **rest) -> Patch:
    assert is_dataclass(method) and not isinstance(method, type)
    return Patch(
        method=method.name,
        settings=asdict(method),
        edits=tuple(edits),
        base=lm.fingerprint,
        made_on=tuple(patch.id for patch in lm.patches),
        version=reknow.__version__,
        **rest,
    )
