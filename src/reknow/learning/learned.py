"""What a method is that learns to edit one model before it can edit it."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from typing_extensions import Self

import reknow
from reknow.checks.arguments import typed
from reknow.checks.bounds import Name
from reknow.contract import Method, field_values
from reknow.edits import Case, Edit, cases_digest
from reknow.errors import EditFailed
from reknow.files.locks import write_lock
from reknow.files.manifest import open_manifest
from reknow.learning.editors import EDITOR_FILE, Editor, case_keys, edit_key, open_editor
from reknow.learning.loop import CHECKPOINT_FILE, Loop
from reknow.learning.training import Draw, Learner, Split, Training, shuffle, split_cases
from reknow.lm import LM
from reknow.model.readable import find_unreadable
from reknow.registry import method_settings

__all__ = ["Learned"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Learned(Method):
    """A method that learns how to edit one model before it can edit it."""

    editor: Name | None = None
    """File or folder of the trained editor; None: the one that is bundled for the model."""

    training: ClassVar[Training]  # where nothing else is asked for

    def for_model(self, lm: LM) -> Self:
        """The settings with which an editor for this model is trained and which it keeps."""
        return replace(self, editor=None)

    @abstractmethod
    def learner(self, lm: LM, cases: Split, training: Training) -> Learner:
        """What is trained, of settings that `for_model` gave."""

    def draw(self, train_cases: Sequence[Case], training: Training) -> Draw:
        """Which cases make which micro-batch."""
        return shuffle(train_cases, training)

    def seen(self, lm: LM, edits: Sequence[Edit]) -> list[Edit]:
        keys = set(open_editor(self.name, self.editor, lm).seen.tolist())
        return [edit for edit in edits if edit_key(edit) in keys]

    @typed
    def fit(
        self,
        lm: LM,
        cases: Sequence[Case],
        out: str | Path,
        training: Training | None = None,
    ) -> Self:
        """Trains an editor in the folder `out`, and gives the method with its field `editor` set to the file.

        Called again on the same folder with the same arguments it goes on where it was. The cases' probes are
        training material here: paraphrases that must follow, other facts that must stay. So they must be other cases
        than those of an evaluation, which refuses cases that the editor has seen. The base model is what is
        learned for, without the patches that are applied. Cases that it cannot read are left out, logged.

        The folder has `editor.safetensors` (the best editor, when the training has ended), `checkpoint.safetensors`
        (until then), `log.jsonl` (the losses) and `manifest.json` (what was asked for).

        Raises:
            InputError: too few cases, a folder that was started with other arguments or where another process
                trains, or micro-batches that the processes cannot share.
            EditFailed: a loss that is no number; the last checkpoint is as it was.
        """
        training = training or self.training
        split = split_cases(_readable(lm, cases), training)
        method = self.for_model(lm)
        with lm.unpatched():
            learner = method.learner(lm, split, training)
        loop = Loop(lm, learner, method.draw(split.train, training), split.validation, Path(out), training)
        with write_lock(loop.folder) if loop.main else nullcontext():
            _run(method, loop, [*split.train, *split.validation])
        return replace(self, editor=str(loop.folder / EDITOR_FILE))


def _run(method: Learned, loop: Loop, cases: Sequence[Case]) -> None:
    """Trains and writes the editor, unless the folder has it already."""
    lm, path = loop.lm, loop.folder / EDITOR_FILE
    if loop.main:
        asked = {
            "reknow": reknow.__version__,
            "model": lm.fingerprint.digest,
            "method": method_settings(method),
            "training": {**asdict(loop.training), "tensorboard": None},
            "cases": len(cases),
            "cases_digest": cases_digest(cases),
        }
        open_manifest(loop.folder, asked, {"model": lm.name})
    loop.accelerator.wait_for_everyone()
    if path.exists():
        return
    with lm.unpatched(), torch.enable_grad():
        notes = loop.run()
    if not loop.best:
        raise EditFailed("expected a validation loss that is a number; got none: lower the learning rate")
    if loop.main:
        settings = json.loads(json.dumps(field_values(method) | {"editor": None}))
        Editor(method.name, settings, loop.best, lm.fingerprint, case_keys(cases), notes).save(path)
        (loop.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    loop.accelerator.wait_for_everyone()


def _readable(lm: LM, cases: Sequence[Case]) -> list[Case]:
    """The cases without those that are too long for the model, which are logged: one would end a training midway."""
    reasons = find_unreadable(lm, cases)
    left_out = [(case.edit, reason) for case, reason in zip(cases, reasons, strict=True) if reason is not None]
    if left_out:
        edit, reason = left_out[0]
        about = edit.id or edit.text
        _log.warning("%d of %d cases left out; the first: %s, %s", len(left_out), len(cases), about, reason)
    return [case for case, reason in zip(cases, reasons, strict=True) if reason is None]
