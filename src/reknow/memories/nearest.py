"""Nearest neighbours among stored vectors: exact, or approximate where there are very many."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from reknow.errors import InputError, MissingExtra

__all__ = ["Nearest"]

_QUERIES = 256
"""Questions compared at once, so that their distances to 100,000 vectors stay within 100 MB."""
_PROBED = 32
"""Cells that an approximate look-up visits."""
_TRAINED_ON = 64
"""Vectors per cell from which its centre is computed."""


class Nearest:
    """Finds the stored vectors nearest to a query, by squared Euclidean distance.

    Args:
        vectors: (stored, features) float32, at least one.
        approximate: with faiss: the vectors lie in about 4 √stored cells, of which the 32 nearest are looked through.

    Raises:
        InputError: nothing is stored.
        MissingExtra: approximate, and faiss is not installed.
    """

    def __init__(self, vectors: Tensor, *, approximate: bool = False):
        if not len(vectors):
            raise InputError("expected at least one stored vector; got none: the memory is empty, make an edit first")
        self.vectors = vectors.float().contiguous()
        self._squares = self.vectors.pow(2).sum(1)  # (stored,)
        self._index = _index(self.vectors) if approximate else None

    @torch.no_grad()
    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """(squared distances, indices) of the k nearest, nearest first; k is cut to what is stored.

        Args:
            queries: (queries, features).

        Returns:
            two tensors (queries, k); an approximate look-up that finds fewer gives infinity and index 0.
        """
        queries, k = queries.to(self.vectors), min(k, len(self.vectors))
        indices = torch.cat([self._nearest(batch, k) for batch in queries.split(_QUERIES)])
        differences = (
            self.vectors[indices.clamp(min=0)] - queries[:, None]
        )  # subtracted again: ‖a‖² + ‖b‖² − 2ab cancels
        distances = differences.pow(2).sum(-1).masked_fill(indices < 0, torch.inf)
        order = distances.argsort(dim=1, stable=True)
        return distances.gather(1, order), indices.clamp(min=0).gather(1, order)

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        """Indices of the k nearest, −1 where none was found. (queries, k)"""
        if self._index is not None:
            _, indices = self._index.search(queries.cpu().numpy(), k)
            return torch.from_numpy(indices).to(queries.device)
        scores = torch.addmm(self._squares[None], queries, self.vectors.T, alpha=-2)  # ‖v‖² − 2 qv
        return scores.topk(k, dim=1, largest=False).indices


def _index(vectors: Tensor):
    """faiss's index with an inverted list per cell; the same vectors give the same index."""
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra("faiss-cpu", "retrieval", "approximate look-up") from error
    stored: np.ndarray = vectors.cpu().numpy()
    cells = max(1, min(len(stored) // 39, round(4 * math.sqrt(len(stored)))))  # faiss wants 39 vectors per cell
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(stored.shape[1]), stored.shape[1], cells)
    index.cp.max_points_per_centroid = _TRAINED_ON
    index.cp.seed = 0
    index.train(stored)
    index.add(stored)
    index.nprobe = min(_PROBED, cells)
    return index
