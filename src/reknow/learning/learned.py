"""What a method is that learns to edit one model before it can edit it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import Self

from reknow.checks.arguments import typed
from reknow.checks.bounds import Name
from reknow.contract import Method
from reknow.edits import Case
from reknow.learning.training import Draw, Learner, Training, readable, shuffled, split, train
from reknow.lm import LM


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
        training = training or self.training
        learning, held = split(readable(lm, cases), training)
        method = self.for_model(lm)
        with lm.unpatched():
            learner = method.learner(lm, learning, held, training)
        path = train(method, lm, learner, learning, held, out, training, method.draw(learning, training), progress)
        return replace(self, editor=path)
