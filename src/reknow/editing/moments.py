"""Covariances of keys as the code of ROME and MEMIT keeps them (kmeng01/rome 0874014, util/runningstats.py).

A file (transformer.h.17.mlp.c_proj_float32_mom2_100000.npz, say) holds Σ k kᵀ under `mom2.mom2` and the number of
tokens under `mom2.count`. It names neither its model nor its text. Nothing is unpickled, and no memory is taken for a
larger matrix than is wanted.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reknow.errors import InputError

__all__ = ["read_moment"]

_SUM, _COUNT = "mom2.mom2", "mom2.count"
_MOST_HEADER = 1 << 16
"""Bytes that an array's header takes at most."""


def read_moment(folder: Path, matrix: str, width: int) -> tuple[Tensor, int]:
    """C = Σ k kᵀ / tokens of a matrix, and the number of tokens.

    Args:
        matrix: name of the module.
        width: of its keys.

    Returns:
        (width, width), as exact as the file has it, on the CPU.

    Raises:
        InputError: the folder has no file of this matrix, or several; it is damaged, or of another size or kind.
    """
    found = [file for file in sorted(folder.glob("*.npz")) if re.match(rf"{re.escape(matrix)}_[^.]*mom2", file.name)]
    if len(found) != 1:
        got = ", ".join(file.name for file in found) or "none"
        raise InputError(
            f"expected one file of {matrix} in {folder}, such as {matrix}_float32_mom2_100000.npz; got {got}: give "
            "the folder that has it"
        )
    try:
        with np.load(found[0], allow_pickle=False) as arrays:
            sizes = {one.filename: one.file_size for one in arrays.zip.infolist()}
            if sizes.get(f"{_SUM}.npy", 0) > 8 * width * width + _MOST_HEADER:
                raise ValueError(f"{_SUM} is larger than {width} × {width}")
            total, count = np.asarray(arrays[_SUM]), int(arrays[_COUNT])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise _refusal(found[0], " ".join(str(error).split())) from error
    if total.shape != (width, width) or total.dtype.name not in ("float32", "float64"):
        raise _refusal(
            found[0], f"it has {' × '.join(map(str, total.shape))} numbers of {total.dtype}, not of {width}"
        )
    mean = torch.from_numpy(total) / max(count, 1)
    scale = float(mean.diagonal().mean())
    if count < 1 or not 0 < scale < float("inf") or not torch.allclose(mean, mean.T, rtol=1e-3, atol=1e-4 * scale):
        raise _refusal(found[0], f"it is no mean of k kᵀ over {count} tokens")
    return mean, count


def _refusal(file: Path, reason: str) -> InputError:
    return InputError(
        f"expected a covariance as ROME's code keeps it in {file}; it is none of this matrix ({reason}): give a "
        "whole file that was made for this model, or read text for one"
    )
