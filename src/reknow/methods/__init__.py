"""The table of methods: a name, the class, and the fields in which a variant differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from reknow.checks.arguments import typed
from reknow.contract import Method
from reknow.errors import InputError, did_you_mean
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


class Entry(NamedTuple):
    """A row of the table."""

    method: type[Method]
    settings: Mapping[str, Any]
    paper: str


METHODS: dict[str, Entry] = {
    "adalora": Entry(LoRA, {"kind": "adalora", "learning_rate": 0.05}, "Zhang et al. 2023, arXiv 2303.10512"),
    "alphaedit": Entry(AlphaEdit, {}, "Fang et al. 2024, arXiv 2410.02355"),
    "alphaedit-blue": Entry(AlphaEdit, {"boundary_layers": True}, "Li et al. 2025, arXiv 2502.03748"),
    "calinet": Entry(CaliNet, {}, "Dong et al. 2022, arXiv 2210.03329"),
    "defer": Entry(DEFER, {}, "Hartvigsen et al. 2022, arXiv 2211.11031"),
    "emmet": Entry(EMMET, {}, "Gupta et al. 2024, arXiv 2403.14236"),
    "ft-l": Entry(
        FT, {"loss": "last_token", "clamp": 0.03}, "Constrained fine-tuning, as in Meng et al. 2022, arXiv 2202.05262"
    ),
    "ft-m": Entry(FT, {"loss": "target"}, "Fine-tuning on the answer, Zhang et al. 2024, arXiv 2401.01286"),
    "ft-t": Entry(FT, {"loss": "text"}, "Fine-tuning on prompt and answer, as in Qi et al. 2024, arXiv 2406.11194"),
    "grace": Entry(GRACE, {}, "Hartvigsen et al. 2022, arXiv 2211.11031"),
    "ice": Entry(ICE, {}, "Consistent In-Context Editing, Qi et al. 2024, arXiv 2406.11194"),
    "instructedit": Entry(InstructEdit, {}, "Tian et al. 2024, arXiv 2402.16123"),
    "ike": Entry(IKE, {}, "Zheng et al. 2023, arXiv 2305.12740"),
    "ike-easyedit": Entry(
        IKE, {"demonstrations": 16, "shares": None}, "IKE as in EasyEdit, Wang et al. 2023, arXiv 2308.07269"
    ),
    "ike-zero": Entry(IKE, {"demonstrations": 0}, "IKE without demonstrations, Zheng et al. 2023, arXiv 2305.12740"),
    "ke": Entry(KE, {}, "KnowledgeEditor, De Cao et al. 2021, arXiv 2104.08164"),
    "kn": Entry(KN, {}, "Knowledge neurons, Dai et al. 2021, arXiv 2104.08696"),
    "kn-erase": Entry(KN, {"erase": True}, "Knowledge neurons, Dai et al. 2021, arXiv 2104.08696"),
    "locft-bf": Entry(
        FT, {"breadth_first": True, "batch_size": 100, "stop_loss": 0.0}, "Yang et al. 2025, arXiv 2509.22072"
    ),
    "lora": Entry(LoRA, {"kind": "lora"}, "Hu et al. 2021, arXiv 2106.09685"),
    "malmen": Entry(MALMEN, {}, "Tan et al. 2023, arXiv 2311.04661"),
    "melo": Entry(MELO, {}, "Yu et al. 2023, arXiv 2312.11795"),
    "memit": Entry(MEMIT, {}, "Meng et al. 2022, arXiv 2210.07229"),
    "memit-merge": Entry(MEMIT, {"merge_subjects": True}, "Dong et al. 2025, arXiv 2502.07322"),
    "mend": Entry(MEND, {}, "Mitchell et al. 2021, arXiv 2110.11309"),
    "pmet": Entry(PMET, {}, "Li et al. 2023, arXiv 2308.08742"),
    "qlora": Entry(LoRA, {"kind": "qlora"}, "Dettmers et al. 2023, arXiv 2305.14314"),
    "r-rome": Entry(ROME, {"average_keys": True}, "Gupta et al. 2024, arXiv 2403.07175"),
    "rome": Entry(ROME, {}, "Meng et al. 2022, arXiv 2202.05262"),
    "serac": Entry(SERAC, {}, "Mitchell et al. 2022, arXiv 2206.06520"),
    "ultraedit": Entry(UltraEdit, {}, "Gu et al. 2025, arXiv 2505.14679"),
    "wise": Entry(WISE, {}, "Wang et al. 2024, arXiv 2405.14768"),
    "wise-retrieve": Entry(WISE, {"retrieve": True}, "Wang et al. 2024, arXiv 2405.14768"),
}


@typed
def method(name: str, **settings) -> Method:
    """The method of that name: `method("ft-m", steps=40)`.

    Raises:
        InputError: no such method, or no such field; names the near ones.
    """
    if name not in METHODS:
        raise did_you_mean("method", name, METHODS)
    entry = METHODS[name]
    known = [field.name for field in fields(entry.method)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise did_you_mean(f"setting of {name}", key, known)
    try:
        return entry.method(**{**entry.settings, **{key: _frozen(value) for key, value in settings.items()}})
    except TypeError as error:
        raise InputError(f"expected valid settings for {name}; got {settings}: {error}") from error


def _frozen(value: Any) -> Any:
    """The value with tuples for the lists that JSON makes of them."""
    return tuple(_frozen(part) for part in value) if isinstance(value, list) else value
