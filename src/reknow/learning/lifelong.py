"""Statistics of all edits so far, by which UltraEdit and StableEdit normalise what a batch of edits asks for.

Matrices of one shape share them. Each patch keeps those of its own edits, and an edit begins with the sum of what the
patches on the stack have.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from reknow.contract import Method, field_values
from reknow.datasets.cases import load_cases, parse_address
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.learning.blocks import RunningNorm
from reknow.learning.gradients import TokenFactors
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.tokens import EncodedText, Text
from reknow.patching.patches import Patch, merged_away

__all__ = ["LifelongNorms", "RunningScatter", "readable", "refuse_other_settings", "stream_of"]

_WARM_UP = "warm_up", "warm_up_edits", "warm_up_writes"
"""Fields that say on which facts the statistics begin."""

_Norm = TypeVar("_Norm", RunningNorm, "RunningScatter")


class RunningScatter(nn.Module):
    """Mean and scatter matrix of all vectors seen so far, to whiten by (arXiv 2605.11836, Algorithm 1)."""

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scatter", torch.zeros(size, size))
        """Ψ = Σ (x − m)(x − m)ᵀ."""

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Takes the vectors (n, size) into the statistics."""
        if len(x):
            x = exact(x)
            own = x - x.mean(0)
            self._join(float(len(x)), x.mean(0), own.T @ own)

    def joined(self, other: RunningScatter) -> RunningScatter:
        """The statistics of what either has seen."""
        both = copy.deepcopy(self)
        both._join(float(other.count), exact(other.mean), exact(other.scatter))
        return both

    @torch.no_grad()
    def _join(self, new: float, mean: Tensor, scatter: Tensor) -> None:
        count = float(self.count)
        shift = mean - exact(self.mean)
        between = torch.outer(shift, shift) * (count * new / (count + new))
        # Added in float64 and rounded once.
        self.scatter.copy_(exact(self.scatter) + scatter + between)
        self.mean.copy_(exact(self.mean) + shift * (new / (count + new)))
        self.count += new

    def inverse_root(self, floor: float, *, relative: bool) -> Tensor | None:
        """Σ^(−1/2), Σ = Ψ / (ν − d − 1) the expected covariance (Corollary 3.3); eigenvalues below the floor count as
        so large. None: there are too few vectors. (size, size), float64

        Args:
            floor: a share of the mean eigenvalue where it is `relative`, else a plain number.
        """
        free = float(self.count) - len(self.mean) - 1
        if free <= 0:
            return None
        values, vectors = torch.linalg.eigh(exact(self.scatter) / free)
        least = floor * float(values.mean()) if relative else floor
        return (vectors * values.clamp(min=max(least, torch.finfo(values.dtype).tiny)).rsqrt()) @ vectors.T


class LifelongNorms:
    """The statistics that an edit goes by: those of the patches before it, and its own.

    Args:
        before: patches of the method that are on the stack.
        floor: keep the gradients' covariance too, and whiten by it, see `RunningScatter.inverse_root`; None: do not.
    """

    def __init__(self, before: Iterable[Patch], *, floor: float | None = None, relative: bool = True):
        before, whiten = list(before), floor is not None
        self._floor, self._relative = floor, relative
        self._before = _sum_of(before, "norm", RunningNorm)
        self.scatters_before = _sum_of(before, "whitening", RunningScatter) if whiten else {}
        self.own: dict[str, RunningNorm] = {}
        self.scatters: dict[str, RunningScatter] | None = {} if whiten else None
        self._seen: dict[str, list[Tensor]] = {}
        """The first vectors that the scatter matrices are of: all, where they are fewer than one has numbers."""
        self._now: dict[str, RunningNorm] = {}
        self._roots: dict[str, tuple[Tensor, Tensor] | None] = {}

    def observe(self, factors: TokenFactors) -> None:
        """Takes a batch's inputs and gradients into the statistics, by which it is normalised itself."""
        for h, g in factors.values():
            shape = _shape_of(h, g)
            self.own.setdefault(shape, RunningNorm(h.shape[1] + g.shape[1]).to(h.device)).observe(
                torch.cat([h, g], 1)
            )
            if self.scatters is not None:
                self.scatters.setdefault(shape, RunningScatter(g.shape[1]).to(g.device)).observe(g)
                if sum(map(len, seen := self._seen.setdefault(shape, []))) < g.shape[1]:
                    seen.append(g[: g.shape[1]].clone())
        self._now = {shape: _joined(self._before.get(shape), norm) for shape, norm in self.own.items()}
        for shape, own in (self.scatters or {}).items():
            scatter = _joined(self.scatters_before.get(shape), own)
            root = scatter.inverse_root(self._floor or 0.0, relative=self._relative)
            self._roots[shape] = None if root is None else (scatter.mean, root.float())

    def normalised(self, h: Tensor, g: Tensor, least: int) -> tuple[Tensor, Tensor]:
        """ĥ and ĝ, each its own root mean square's multiple while fewer than `least` tokens were seen.

        (n, in), (n, out) → the same; ĝ is whitened where there is a covariance, else divided by its deviations.
        """
        shape = _shape_of(h, g)
        norm = self._now[shape]
        if float(norm.count) < max(2, least):
            own = [x / x.square().mean(1, keepdim=True).sqrt() for x in (h, g)]
            return own[0], own[1]
        h_hat, g_hat = norm(torch.cat([h, g], 1)).split([h.shape[1], g.shape[1]], 1)
        if (found := self._roots.get(shape)) is not None:
            mean, root = found
            g_hat = (g - mean) @ root.to(g.device)
        return h_hat, g_hat

    def state(self) -> dict[str, Tensor]:
        """Those of this edit alone, as a patch keeps them."""
        named = {f"norm.{shape}": norm.state_dict() for shape, norm in self.own.items()}
        named |= {f"whitening.{shape}": self._thin(shape, own) for shape, own in (self.scatters or {}).items()}
        return {f"{name}.{part}": value for name, parts in named.items() for part, value in parts.items()}

    def _thin(self, shape: str, scatter: RunningScatter) -> dict[str, Tensor]:
        """Its tensors; x − m, a row for each vector, in place of Ψ while they are fewer than a vector has numbers."""
        state, seen = scatter.state_dict(), exact(torch.cat(self._seen[shape]))  # (tokens, size)
        if len(seen) < seen.shape[1]:
            del state["scatter"]
            state["rows"] = (seen - seen.mean(0)).float()
        return state


def refuse_other_settings(patches: Iterable[Patch], method: Method, matrices: Collection[str]) -> None:
    """Raises InputError where a patch on the stack has statistics that an edit of these matrices cannot go on with:
    those of another method, of other matrices, or begun on other facts."""
    name, now = method.name, field_values(method)
    # Where nothing is warmed up on, neither counts how much.
    warm_up = _WARM_UP if now["warm_up"] is not None else _WARM_UP[:1]
    for patch in patches:
        if not _states(patch, "norm"):
            raise merged_away(patch, "statistics")
        own, got = "layers, matrices and whiten", ""
        if patch.method != name or set(patch.deltas) != set(matrices):
            got = f"{patch.method} in {len(patch.deltas)} matrices, then {name} in {len(matrices)}"
        elif differ := [field for field in warm_up if patch.settings.get(field, now[field]) != now[field]]:
            own = ", ".join(differ)
            got = f"another {own}"
        if got:
            raise InputError(
                "expected a sequence to go on with the settings of its patches, whose statistics it needs; got "
                f"{got}: set {own} as in {patch.label}, or take it off"
            )


def stream_of(address: str | None, count: int) -> list[Edit]:
    """The first edits of some cases, NAME, NAME:FILE or FILE, to warm up on; none of None."""
    if address is None:
        return []
    _, name, path = parse_address(address)
    return [edit for case in load_cases(name, path=path) for edit in case.edits][:count]


def readable(lm: LM, stream: Sequence[Edit], address: str) -> list[EncodedText]:
    """The facts that fit into the model's positions, as rows; raises InputError where there is none.

    Args:
        address: where they are from.
    """
    rows = lm.encode([Text.asked(edit) for edit in stream])
    rows = [row for row in rows if lm.max_tokens is None or len(row.ids) <= lm.max_tokens]
    if not rows:
        most = "" if lm.max_tokens is None else f", of at most {lm.max_tokens} tokens"
        raise InputError(
            f"expected other facts than the edits to warm up on{most}; got none in {address}: name others, or leave "
            "warm_up out"
        )
    return rows


def _shape_of(h: Tensor, g: Tensor) -> str:
    """The name of the statistics that matrices of one shape share."""
    return f"{g.shape[1]}x{h.shape[1]}"


def _joined(before: _Norm | None, own: _Norm) -> _Norm:
    return own if before is None else before.to(own.mean.device).joined(own)


def _sum_of(patches: Iterable[Patch], kind: str, norm: type[_Norm]) -> dict[str, _Norm]:
    """Shape → the statistics of all patches, of one kind."""
    found: dict[str, _Norm] = {}
    for patch in patches:
        for shape, state in _states(patch, kind).items():
            if (rows := state.pop("rows", None)) is not None:
                state["scatter"] = exact(rows).T @ exact(rows)
            one = norm(len(state["mean"]))
            one.load_state_dict(state)
            found[shape] = _joined(found.get(shape), one)
    return found


def _states(patch: Patch, kind: str) -> dict[str, dict[str, Tensor]]:
    """Shape → the tensors of one kind that the patch keeps for it."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in patch.state.items():
        name, shape, part = key.split(".")
        if name == kind:
            found.setdefault(shape, {})[part] = value
    return found
