"""Which methods the page offers for a request: three with a reason, and all others that can make it."""

from __future__ import annotations

from typing import NamedTuple

from reknow.registry import METHODS, NEED_A_SUBJECT, layer_setting, make_from_text


class Suggestion(NamedTuple):
    """A method, what it changes, and when to take it."""

    method: str
    what: str
    reason: str

    @property
    def label(self) -> str:
        return f"{self.method} · {self.what}: {self.reason}"


_ROME = Suggestion("rome", "weights", "writes the fact into one matrix, where the subject is read; the rest stays")
_FT_M = Suggestion("ft-m", "fine-tuning", "trains one matrix on the answer; quick, changes more than the fact")
_GRACE = Suggestion("grace", "memory", "remembers the answer for this very prompt; no weight changes")
_IKE = Suggestion("ike", "memory", "puts the fact in front of all that is asked; no weight changes")


def suggest(subject: bool) -> list[Suggestion]:
    """Three methods for a request with a subject, or for a question without one."""
    return [_ROME, _FT_M, _GRACE] if subject else [_FT_M, _GRACE, _IKE]


def others(subject: bool) -> list[str]:
    """All other methods, without those that need the subject where there is none."""
    offered = {one.method for one in suggest(subject)}
    return [name for name in METHODS if name not in offered and (subject or name not in NEED_A_SUBJECT)]


def build(name: str, layer: str = ""):
    """The method of that name at a layer, or at several of them, as the form has them; empty: its own choice.

    Raises:
        InputError: there is none of that name, it edits at no layer, or the text is none.
    """
    return make_from_text(name, {layer_setting(name): layer.strip()} if layer.strip() else {})
