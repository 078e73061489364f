"""reknow: change what a language model knows, one fact at a time, and prove what changed and what did not."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reknow.datasets import load_cases, load_edits
    from reknow.edits import Case, Edit, Probe
    from reknow.errors import ReknowError
    from reknow.evaluation import evaluate
    from reknow.lm import LM
    from reknow.methods import METHODS, method
    from reknow.methods.alphaedit import AlphaEdit
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
    from reknow.methods.mend import MEND
    from reknow.methods.pmet import PMET
    from reknow.methods.rome import ROME
    from reknow.methods.serac import SERAC
    from reknow.methods.ultraedit import UltraEdit
    from reknow.methods.wise import WISE
    from reknow.model.chat import Chat
    from reknow.patching.patches import Patch, diff, merge

__all__ = [
    "DEFER",
    "EMMET",
    "FT",
    "GRACE",
    "ICE",
    "IKE",
    "KE",
    "KN",
    "LM",
    "MALMEN",
    "MELO",
    "MEMIT",
    "MEND",
    "METHODS",
    "PMET",
    "ROME",
    "SERAC",
    "WISE",
    "AlphaEdit",
    "CaliNet",
    "Case",
    "Chat",
    "Edit",
    "InstructEdit",
    "LoRA",
    "Patch",
    "Probe",
    "ReknowError",
    "UltraEdit",
    "__version__",
    "diff",
    "evaluate",
    "load_cases",
    "load_edits",
    "merge",
    "method",
]

_HOMES = {
    "datasets": ("load_cases", "load_edits"),
    "edits": ("Case", "Edit", "Probe"),
    "errors": ("ReknowError",),
    "evaluation": ("evaluate",),
    "lm": ("LM",),
    "methods": ("METHODS", "method"),
    "methods.alphaedit": ("AlphaEdit",),
    "methods.calinet": ("CaliNet",),
    "methods.defer": ("DEFER",),
    "methods.emmet": ("EMMET",),
    "methods.ft": ("FT",),
    "methods.grace": ("GRACE",),
    "methods.ice": ("ICE",),
    "methods.ike": ("IKE",),
    "methods.instructedit": ("InstructEdit",),
    "methods.ke": ("KE",),
    "methods.kn": ("KN",),
    "methods.lora": ("LoRA",),
    "methods.malmen": ("MALMEN",),
    "methods.melo": ("MELO",),
    "methods.memit": ("MEMIT",),
    "methods.mend": ("MEND",),
    "methods.pmet": ("PMET",),
    "methods.rome": ("ROME",),
    "methods.serac": ("SERAC",),
    "methods.ultraedit": ("UltraEdit",),
    "methods.wise": ("WISE",),
    "model.chat": ("Chat",),
    "patching.patches": ("Patch", "diff", "merge"),
}


def __getattr__(name: str):
    """Imports a public name when it is first used, so that `reknow --help` does not wait for torch."""
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(f"reknow.{home}"), name)
            return globals()[name]
    raise AttributeError(f"module 'reknow' has no attribute '{name}'")
