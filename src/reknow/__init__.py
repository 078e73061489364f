"""reknow: change what a language model knows, one fact at a time, and prove what changed and what did not."""

from importlib import import_module
from typing import TYPE_CHECKING

from reknow.registry import METHODS

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reknow.datasets.cases import load_cases
    from reknow.datasets.edits_file import load_edits
    from reknow.edits import Case, Edit, Probe
    from reknow.errors import ReknowError
    from reknow.evaluation import Plan, evaluate
    from reknow.lm import LM
    from reknow.methods import method
    from reknow.methods.alphaedit import AlphaEdit
    from reknow.methods.anyedit import AnyEdit
    from reknow.methods.calinet import CaliNet
    from reknow.methods.defer import DEFER
    from reknow.methods.emmet import EMMET
    from reknow.methods.ft import FT
    from reknow.methods.grace import GRACE
    from reknow.methods.ice import ICE
    from reknow.methods.ike import IKE
    from reknow.methods.instructedit import InstructEdit
    from reknow.methods.ke import KE
    from reknow.methods.kn import KN
    from reknow.methods.lora import LoRA
    from reknow.methods.malmen import MALMEN
    from reknow.methods.melo import MELO
    from reknow.methods.memit import MEMIT
    from reknow.methods.memoir import MEMOIR
    from reknow.methods.mend import MEND
    from reknow.methods.pmet import PMET
    from reknow.methods.rome import ROME
    from reknow.methods.serac import SERAC
    from reknow.methods.simie import SimIE
    from reknow.methods.ultraedit import UltraEdit
    from reknow.methods.unke import UnKE
    from reknow.methods.wise import WISE
    from reknow.model.chat import Chat
    from reknow.patching.patches import Patch, diff, merge

_HOMES = {
    "Case": "edits",
    "Chat": "model.chat",
    "Edit": "edits",
    "LM": "lm",
    "Patch": "patching.patches",
    "Plan": "evaluation",
    "Probe": "edits",
    "ReknowError": "errors",
    "diff": "patching.patches",
    "evaluate": "evaluation",
    "load_cases": "datasets.cases",
    "load_edits": "datasets.edits_file",
    "merge": "patching.patches",
    "method": "methods",
}
_HOMES |= {name: f"methods.{file}" for file, _, name in (str(row.home).partition(":") for row in METHODS.values())}

__all__ = sorted([*_HOMES, "METHODS", "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    """Imports a public name when it is first used, so that `reknow --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reknow' has no attribute '{name}'")
    found = globals()[name] = getattr(import_module(f"reknow.{_HOMES[name]}"), name)
    return found
