"""What the papers set for models that they edited, recognised by their shape and never by their name.

From the authors' files `hparams/ROME` of kmeng01/rome and `hparams/MEMIT` of kmeng01/memit (GPT-2 XL, GPT-J), and
from those of the same names in zjunlp/EasyEdit (the others).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from reknow.lm import LM


class Published(NamedTuple):
    """One shape of model and the layers that were edited."""

    model_type: str
    """As in its configuration."""
    layers: int
    hidden_size: int
    rome: int
    """The layer of ROME."""
    memit: tuple[int, int] | None
    """First and last layer of MEMIT's band, and of those who follow it: PMET, AlphaEdit."""


TABLE = (
    Published("gpt2", 24, 1024, 8, None),  # medium
    Published("gpt2", 36, 1280, 12, None),  # large
    Published("gpt2", 48, 1600, 17, (13, 17)),  # XL
    Published("gptj", 28, 4096, 5, (3, 8)),
    Published("llama", 16, 2048, 5, (4, 8)),  # Llama 3.2 1B
    Published("llama", 28, 3072, 5, (4, 8)),  # Llama 3.2 3B
    Published("llama", 32, 4096, 5, (4, 8)),  # Llama 2 7B, 3 and 3.1 8B
    Published("mistral", 32, 4096, 5, (4, 8)),  # 7B
    Published("qwen2", 28, 3584, 5, (4, 8)),  # Qwen 2 and 2.5 7B
)


def published(lm: LM) -> Published | None:
    """The row of the model; None where no paper edited one of its shape."""
    kind = lm.model.config.get_text_config(decoder=True).model_type
    shape = (kind, lm.layers, lm.parts.hidden_size)
    return next((row for row in TABLE if row[:3] == shape), None)
