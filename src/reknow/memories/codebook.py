"""Tables in which a prompt is looked up: GRACE's codebook and MELO's clusters.
(Hartvigsen et al. 2022, arXiv 2211.11031; Yu et al. 2023, arXiv 2312.11795)

Every key is what a matrix reads at a prompt's last token, and holds what lies within its radius. A new key is placed
by GRACE's Algorithm 1, see `_placement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Literal

import torch
from torch import Tensor

from reknow.errors import PatchError
from reknow.patching.patches import Patch

__all__ = ["Clusters", "Codebook"]

_Answer = tuple[int, ...]
"""Tokens of an edit's answer."""

_EPSILON = 1e-5
"""What keeps two radii that meet apart, in units of `distance_scale`."""
_SAME_KEY_DISTANCE = 1e-3
"""Keys that are closer, in units of `distance_scale`, are the same prompt in another batch."""


def _placement(
    distance: float, reach: float, same_answer: bool, scale: float
) -> Literal["add", "join", "replace", "split"]:
    """What GRACE's Algorithm 1 does with a new key.

    Args:
        distance: to the nearest stored key.
        reach: radius of a new key plus that of the stored one.
        same_answer: whether both have the same answer.
        scale: `reknow.memories.distances.distance_scale`.

    Returns:
        `add`: it is far from all others. `join`: the stored key's radius grows to hold it. `replace`: it is the same
        prompt, and the old answer goes. `split`: it is added, and both radii shrink to half their distance.
    """
    if distance > reach:
        return "add"
    if same_answer:
        return "join"
    return "replace" if distance <= _SAME_KEY_DISTANCE * scale else "split"


@dataclass(eq=False)
class Codebook:
    """GRACE's table: a value for each key."""

    keys: Tensor  # (keys, in), float32
    values: Tensor  # (keys, out), float32
    radii: Tensor  # (keys,)
    answers: list[_Answer]
    changed: set[int] = field(default_factory=set)
    """Keys that were added or changed since the table was made."""
    untrained: set[int] = field(default_factory=set)
    """Keys that need a new value."""

    @classmethod
    def empty(cls, width_in: int, width_out: int, device: torch.device) -> Codebook:
        keys, values = (torch.zeros(0, width, device=device) for width in (width_in, width_out))
        return cls(keys, values, torch.zeros(0, device=device), [])

    @classmethod
    def of(cls, patches: Sequence[Patch], device: torch.device) -> Codebook:
        """The table that these versions make up, each with the keys that its edits added or changed.

        Raises:
            PatchError: a version's keys are not numbered on from those before.
        """
        slots, known = torch.cat([patch.state["slots"] for patch in patches]), 0
        for patch in patches:
            own = patch.state["slots"].sort().values
            new = own[own >= known]
            if not torch.equal(new, known + torch.arange(len(new))) or bool((own < 0).any()):
                raise PatchError(f"expected keys numbered one by one in {patch.label}; got others: edit again")
            known += len(new)
        newest = torch.zeros(known, dtype=torch.long).scatter_reduce(0, slots, torch.arange(len(slots)), "amax")
        names = "keys", "values", "radii"
        keys, values, radii = (torch.cat([p.state[name] for p in patches])[newest].to(device) for name in names)
        answers = [tuple(answer) for patch in patches for answer in patch.memory["labels"]]
        return cls(keys, values, radii, [answers[i] for i in newest])

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(distance to the nearest key, its number) of each query (n, in)."""
        mode = "donot_use_mm_for_euclid_dist"  # the quick way loses small distances between large keys
        nearest = torch.cdist(queries.float(), self.keys, compute_mode=mode).min(1)
        return nearest.values, nearest.indices

    def insert(self, key: Tensor, answer: _Answer, radius: float, scale: float) -> int:
        """Places an edit; gives the number of the key that has its value. See `_placement`. key: (in,)"""
        if not self.answers:
            return self._add(key, radius, answer)
        distances, slots = self.nearest(key[None])
        distance, slot = float(distances), int(slots)
        old = float(self.radii[slot])
        match _placement(distance, radius + old, answer == self.answers[slot], scale):
            case "add":
                return self._add(key, radius, answer)
            case "join":  # rounding must not put the prompt outside of what was widened for it
                self._change(slot, max(distance + _EPSILON * scale, old))
            case "replace":
                self._change(slot, old)
                self.answers[slot] = answer
                self.untrained.add(slot)
            case "split":
                self._change(slot, distance / 2 - _EPSILON * scale)
                return self._add(key, distance / 2, answer)
        return slot

    def _add(self, key: Tensor, radius: float, answer: _Answer) -> int:
        slot = len(self.answers)
        self.keys = torch.cat([self.keys, key[None]])
        self.values = torch.cat([self.values, self.values.new_zeros(1, self.values.shape[1])])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        self.answers.append(answer)
        self.changed.add(slot)
        self.untrained.add(slot)
        return slot

    def _change(self, slot: int, radius: float) -> None:
        self.radii[slot] = radius
        self.changed.add(slot)


@dataclass
class _Cluster:
    """Prompts with one answer that lie close together."""

    centre: Tensor  # (in,), the mean of the keys
    radius: float
    answer: _Answer
    members: list[tuple[Tensor, int]]
    """Key (in,) and LoRA block of each edit in it."""


@dataclass
class Clusters:
    """MELO's table; the edits go through it in their order."""

    clusters: list[_Cluster] = field(default_factory=list)

    def insert(self, key: Tensor, answer: _Answer, block: int, radius: float, scale: float) -> None:
        """Places an edit; see `_placement`. key: (in,)"""
        new = _Cluster(key, radius, answer, [(key, block)])
        if not self.clusters:
            self.clusters.append(new)
            return
        distances = _distances(torch.stack([cluster.centre for cluster in self.clusters]), key)
        nearest = int(distances.argmin())
        distance, cluster = float(distances[nearest]), self.clusters[nearest]
        match _placement(distance, radius + cluster.radius, answer == cluster.answer, scale):
            case "add":
                self.clusters.append(new)
            case "join":
                cluster.members.append((key, block))
                keys = torch.stack([member for member, _ in cluster.members])
                cluster.centre = keys.mean(0)
                cluster.radius = max(float(_distances(keys, cluster.centre).max()), radius)
            case "replace":
                self.clusters[nearest] = _Cluster(key, cluster.radius, answer, [(key, block)])
            case "split":
                cluster.radius, new.radius = distance / 2 - _EPSILON * scale, distance / 2 + _EPSILON * scale
                self.clusters.append(new)
                inside = (float((member - cluster.centre).norm()) <= cluster.radius for member, _ in cluster.members)
                cluster.members = list(compress(cluster.members, inside))

    def find(self, query: Tensor) -> int:
        """The block of the key nearest to the query (in,) in the nearest cluster, if its radius holds it; else −1."""
        distances = _distances(torch.stack([cluster.centre for cluster in self.clusters]), query)
        cluster = self.clusters[int(distances.argmin())]
        if distances.min() > cluster.radius or not cluster.members:
            return -1
        keys = torch.stack([key for key, _ in cluster.members])
        return cluster.members[int(_distances(keys, query).argmin())][1]


def _distances(keys: Tensor, query: Tensor) -> Tensor:
    """How far keys (n, in) are from a query (in,). (n,)"""
    return (keys.float() - query.float()).norm(dim=1)
