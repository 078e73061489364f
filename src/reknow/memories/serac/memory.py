"""SERAC's edit memory: which question goes to the counterfactual model, and with which edit before it.
(Mitchell et al. 2022, arXiv 2206.06520, §3)

    f(x) = h(z, x)   where z = argmax over the memory of p(z, x), if p(z, x) > threshold
           base(x)   otherwise
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from reknow.edits import Edit
from reknow.errors import PatchError
from reknow.lm import LM
from reknow.memories.nearest import Nearest
from reknow.memories.serac.models import ScopeAndCounterfactual
from reknow.patching.memory import Route
from reknow.patching.patches import Patch
from reknow.registry import make

__all__ = ["EditMemory"]


class EditMemory:
    """The running memory: sends a question in the scope of a stored edit to the counterfactual model.

    Attributes:
        modules: the scope classifier p and the counterfactual model h.
        edits: all that were stored, in their order, those that were replaced too.

    Raises:
        PatchError: the versions are not of one memory, or of another encoder or counterfactual model than is there.
    """

    def __init__(self, lm: LM, patches: Sequence[Patch]):
        methods = [make(patch.method, patch.settings) for patch in patches]
        self._method = methods[-1]
        self.modules = ScopeAndCounterfactual(self._method, lm, patches[0].state)
        if self.modules.digests != patches[0].memory["digests"]:
            raise PatchError(
                f"expected the encoder and the counterfactual model of {patches[0].label}; got others at "
                f"{self._method.encoder} and {self._method.counterfactual}: put those back"
            )
        self.edits: list[Edit] = []
        edit_of: list[Tensor] = []  # the edit of each key
        for patch, method in zip(patches, methods, strict=True):
            own, known = patch.state["owners"], len(self.edits)
            whole = own.unique().tolist() == list(range(len(patch.edits)))
            if not whole or method.difference(self._method) or any(i >= known for i in patch.memory["replaces"]):
                raise PatchError(f"expected versions of one memory; {patch.label} is of another: make the edit again")
            edit_of.append(own + known)
            self.edits += patch.edits
        replaced = {i for patch in patches for i in patch.memory["replaces"]}
        self._current = [i for i in range(len(self.edits)) if i not in replaced]
        edits = torch.cat(edit_of)
        current = torch.isin(edits, torch.tensor(self._current))
        self._keys = torch.cat([patch.state["keys"] for patch in patches])[current].to(lm.device)
        self._edit_of = edits[current]

    @cached_property
    def _nearest(self) -> Nearest:
        return Nearest(self._keys, approximate=self._method.approximate)

    def route(self, lm: LM, prompts: Sequence[str]) -> list[Route | None]:
        routes: list[Route | None] = []
        for i, log_p, prompt in zip(*self.scopes(prompts), prompts, strict=True):
            in_scope = log_p > math.log(self._method.threshold)
            routes.append((self.modules, self.modules.prompt_with_edit(self.edits[i], prompt)) if in_scope else None)
        return routes

    def scopes(self, prompts: Sequence[str]) -> tuple[list[int], list[float]]:
        """z and log p(z, x) of each prompt: the stored edit that it most likely belongs to."""
        cross = self.modules.cross is not None
        queries = self.modules.embed(prompts)
        distances, nearest = self._nearest.search(queries, self._method.candidates if cross else 1)
        candidates = self._edit_of[nearest.cpu()]  # (prompts, candidates)
        log_p = -distances / 2 if self.modules.cosine else -distances
        if cross:
            pairs = [
                (self.edits[i].text, prompt)
                for row, prompt in zip(candidates.tolist(), prompts, strict=True)
                for i in row
            ]
            log_p = self.modules.log_p(*zip(*pairs, strict=True)).view(candidates.shape)
        best = log_p.argmax(1, keepdim=True)
        return candidates.gather(1, best.cpu())[:, 0].tolist(), log_p.gather(1, best)[:, 0].tolist()

    def conflicts(self, edits: Sequence[Edit]) -> list[tuple[int, Edit, Edit]]:
        """(index of a stored edit, that edit, the new edit) where the new one has another answer to the same prompt,
        or about the same subject and in the stored one's scope."""
        limit, conflicts = math.log(self._method.threshold), []
        for new in edits:
            for i in self._current:
                old = self.edits[i]
                same_subject = new.subject is not None and new.subject == old.subject
                if old.target_new == new.target_new or not (same_subject or old.text == new.text):
                    continue
                if old.text == new.text or float(self.modules.log_p([old.text], [new.text])) > limit:
                    conflicts.append((i, old, new))
        return conflicts
