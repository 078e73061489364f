"""How far an edited model may be from its base: limits, and what goes beyond them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from reknow.errors import InputError, did_you_mean
from reknow.evaluation.soundness import Health
from reknow.files.schema import FormatError, explain, read_content

try:
    import tomllib
except ImportError:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class Limits:
    """Up to where an edited model counts as sound; docs/limits.md says from which measurements the defaults are."""

    edits: float = 300
    """Edits of all patches, without those that later ones replace; no more."""
    in_force: float = 0.75
    """Share of them whose new answer is said; no less."""
    others_kept: float = 0.65
    """Share of other facts that the model knows whose answer is still said; no less."""
    perplexity_ratio: float = 1.3
    """Perplexity of plain text, by that before; no more."""
    kl: float = 0.25
    """Mean KL(before ‖ now) over the tokens of plain text, in nats; no more."""
    norm: float = math.inf
    """‖ΔW‖ / ‖W‖ of the matrix where it is largest; no more."""


SHARES = ("in_force", "others_kept")
"""Of which more is better."""


@dataclass(frozen=True)
class Measured:
    """One number beside its limit."""

    name: str
    """The field of `Limits`."""
    value: float | None
    """None where there is nothing to measure."""
    limit: float

    @property
    def kept(self) -> bool:
        """Whether the limit is kept; a value that is no number keeps none."""
        if self.value is None:
            return True
        return self.value >= self.limit if self.name in SHARES else self.value <= self.limit


def compare(health: Health, limits: Limits) -> list[Measured]:
    """What was measured, beside the limits, in their order."""
    values: dict[str, float | None] = {
        "edits": health.edits,
        "in_force": health.in_force,
        "others_kept": health.others_kept,
        "perplexity_ratio": health.perplexity_ratio,
        "kl": health.kl,
        "norm": health.largest_norm,
    }
    return [Measured(field.name, values[field.name], getattr(limits, field.name)) for field in fields(Limits)]


def read_limits(path: str | Path) -> Limits:
    """Limits from a TOML file of `Limits`' fields; those that it leaves out are the defaults, `inf` is no limit.

    Raises:
        InputError: there is no such file, it is no TOML, names another field, or a value is no number of its kind.
    """
    known = [field.name for field in fields(Limits)]
    try:
        read = tomllib.loads(read_content(path).decode("utf-8"))
    except (OSError, FormatError, ValueError) as error:
        raise InputError(
            f"expected limits as TOML in {path}; it cannot be read ({explain(error)}): give a file with lines such "
            f"as {known[3]} = 1.2"
        ) from error
    for name, value in read.items():
        if name not in known:
            raise InputError(f"{path}: {did_you_mean('limit', name, known)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
        if not number or value < 0 or (name in SHARES and value > 1):
            wanted = "a share from 0 to 1" if name in SHARES else "a number from 0 on, or inf"
            raise InputError(f"expected {name} in {path} as {wanted}; got {value!r}: correct it")
    return Limits(**{name: float(value) for name, value in read.items()})
