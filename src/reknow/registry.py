"""The table of methods: a name, where the class is, and the fields in which a variant differs.

A class is imported when it is asked for: who edits with one method waits for no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pkgutil import resolve_name
from typing import Any, NamedTuple

from reknow.errors import InputError, did_you_mean


class Row(NamedTuple):
    """A row of the table."""

    home: str | type
    """`module:Class` below `reknow.methods`, or a class."""
    settings: Mapping[str, Any]
    """Fields that differ from the class's defaults."""
    paper: str

    @property
    def method(self) -> Any:
        """The class, a `Method`."""
        return resolve_name(f"reknow.methods.{self.home}") if isinstance(self.home, str) else self.home


PAPER = "-paper"
"""Behind a name: with what the paper sets for the model that is edited, or, as `rome-paper:gpt2-xl`, for another."""
_PAPER_NAME = re.compile(rf"{PAPER}(?::(.+))?$")

METHODS: dict[str, Row] = {
    "adalora": Row("lora:LoRA", {"variant": "adalora", "learning_rate": 0.05}, "Zhang et al. 2023, arXiv 2303.10512"),
    "alphaedit": Row("alphaedit:AlphaEdit", {}, "Fang et al. 2024, arXiv 2410.02355"),
    "alphaedit-blue": Row("alphaedit:AlphaEdit", {"boundary_layers": True}, "Li et al. 2025, arXiv 2502.03748"),
    "anyedit": Row("unke:UnKE", {"chunk_tokens": 20}, "Jiang et al. 2025, arXiv 2502.05628"),
    "anyedit-memit": Row("anyedit:AnyEdit", {}, "Jiang et al. 2025, arXiv 2502.05628"),
    "betaedit": Row("alphaedit:AlphaEdit", {"leakage": 0.1, "refresh": 1000}, "Liu et al. 2026, arXiv 2605.09285"),
    "calinet": Row("calinet:CaliNet", {}, "Dong et al. 2022, arXiv 2210.03329"),
    "defer": Row("defer:DEFER", {}, "Hartvigsen et al. 2022, arXiv 2211.11031"),
    "emmet": Row("emmet:EMMET", {}, "Gupta et al. 2024, arXiv 2403.14236"),
    "evoedit": Row("alphaedit:AlphaEdit", {"evolving": True}, "Lyu et al. 2025, arXiv 2510.13851"),
    "ft-l": Row(
        "ft:FT",
        {"loss": "last_token", "clamp": 0.03},
        "Constrained fine-tuning, as in Meng et al. 2022, arXiv 2202.05262",
    ),
    "ft-m": Row("ft:FT", {"loss": "target"}, "Fine-tuning on the answer, Zhang et al. 2024, arXiv 2401.01286"),
    "ft-t": Row(
        "ft:FT", {"loss": "text"}, "Fine-tuning on prompt and answer, as in Qi et al. 2024, arXiv 2406.11194"
    ),
    "ft-uke": Row("ft:FT", {"end_token": True}, "Xiong et al. 2025, arXiv 2506.09672"),
    "grace": Row("grace:GRACE", {}, "Hartvigsen et al. 2022, arXiv 2211.11031"),
    "ice": Row("ice:ICE", {}, "Consistent In-Context Editing, Qi et al. 2024, arXiv 2406.11194"),
    "instructedit": Row("instructedit:InstructEdit", {}, "Zhang et al. 2024, arXiv 2402.16123"),
    "ike": Row("ike:IKE", {}, "Zheng et al. 2023, arXiv 2305.12740"),
    "ike-easyedit": Row(
        "ike:IKE",
        {"demonstrations": 16, "demonstration_mix": None},
        "IKE as in EasyEdit, Wang et al. 2023, arXiv 2308.07269",
    ),
    "ike-zero": Row(
        "ike:IKE", {"demonstrations": 0}, "IKE without demonstrations, Zheng et al. 2023, arXiv 2305.12740"
    ),
    "ke": Row("ke:KE", {}, "KnowledgeEditor, De Cao et al. 2021, arXiv 2104.08164"),
    "kn": Row("kn:KN", {}, "Knowledge neurons, Dai et al. 2021, arXiv 2104.08696"),
    "kn-erase": Row("kn:KN", {"erase": True}, "Knowledge neurons, Dai et al. 2021, arXiv 2104.08696"),
    "locft-bf": Row(
        "ft:FT", {"breadth_first": True, "batch_size": 100, "stop_loss": 0.0}, "Yang et al. 2025, arXiv 2509.22072"
    ),
    "lora": Row("lora:LoRA", {"variant": "lora"}, "Hu et al. 2021, arXiv 2106.09685"),
    "malmen": Row("malmen:MALMEN", {}, "Tan et al. 2023, arXiv 2311.04661"),
    "melo": Row("melo:MELO", {}, "Yu et al. 2023, arXiv 2312.11795"),
    "memoir": Row("memoir:MEMOIR", {}, "Wang et al. 2025, arXiv 2506.07899"),
    "memit": Row("memit:MEMIT", {}, "Meng et al. 2022, arXiv 2210.07229"),
    "memit-fe": Row("memit:MEMIT", {"forward_targets": True}, "Liu et al. 2026, arXiv 2605.00358"),
    "memit-merge": Row("memit:MEMIT", {"merge_subjects": True}, "Dong et al. 2025, arXiv 2502.07322"),
    "mend": Row("mend:MEND", {}, "Mitchell et al. 2021, arXiv 2110.11309"),
    "pmet": Row("pmet:PMET", {}, "Li et al. 2023, arXiv 2308.08742"),
    "qlora": Row("lora:LoRA", {"variant": "qlora"}, "Dettmers et al. 2023, arXiv 2305.14314"),
    "r-rome": Row("rome:ROME", {"average_keys": True}, "Gupta et al. 2024, arXiv 2403.07175"),
    "rome": Row("rome:ROME", {}, "Meng et al. 2022, arXiv 2202.05262"),
    "serac": Row("serac:SERAC", {}, "Mitchell et al. 2022, arXiv 2206.06520"),
    "simie": Row("simie:SimIE", {}, "Guo et al. 2025, OpenReview VdEG08ZJCH"),
    "sphere": Row("alphaedit:AlphaEdit", {"suppression": 0.5}, "Liu et al. 2025, arXiv 2510.01172"),
    "stableedit": Row("ultraedit:UltraEdit", {"whiten": True, "warm_up": "zsre"}, "Ma et al. 2026, arXiv 2605.11836"),
    "ultraedit": Row("ultraedit:UltraEdit", {}, "Gu et al. 2025, arXiv 2505.14679"),
    "unke": Row("unke:UnKE", {}, "Deng et al. 2024, arXiv 2405.15349"),
    "wise": Row("wise:WISE", {}, "Wang et al. 2024, arXiv 2405.14768"),
    "wise-retrieve": Row("wise:WISE", {"retrieve": True}, "Wang et al. 2024, arXiv 2405.14768"),
}

FAMILIES: dict[str, dict[str, str]] = {
    "locate, then edit": {
        "rome": "Writes one fact into one matrix, at the subject.",
        "r-rome": "ROME with one key in both places; steadier in sequences.",
        "memit": "Writes many facts at once over a band of layers.",
        "memit-fe": "MEMIT with a target for each layer, carried forward.",
        "memit-merge": "MEMIT for several facts about one subject.",
        "emmet": "Writes many facts into one layer, each met exactly.",
        "pmet": "MEMIT, with the attention's share searched for apart.",
        "alphaedit": "Writes many facts in the null space of general text.",
        "alphaedit-blue": "AlphaEdit in its first and last layer alone.",
        "unke": "Trains one block so that a text follows a question.",
        "anyedit": "UnKE chunk by chunk, for longer texts.",
        "anyedit-memit": "MEMIT for answers that are texts, chunk by chunk.",
        "simie": "Solves for all edits that another method makes alone.",
        "betaedit": "AlphaEdit that also weighs what leaks into the null space.",
        "evoedit": "AlphaEdit whose null space loses what edits have used.",
        "sphere": "AlphaEdit that spares the main directions of the weights.",
        "kn": "Finds a fact's neurons and rewrites what they put out.",
        "kn-erase": "Finds a fact's neurons and switches them off.",
    },
    "fine-tuning": {
        "ft-l": "Trains one matrix, kept near its old values.",
        "ft-m": "Trains one matrix on the answer: a quick baseline.",
        "ft-t": "Trains one matrix on prompt and answer together.",
        "ft-uke": "Trains one layer on answers that are texts.",
        "locft-bf": "Trains one matrix on all edits, a hundred at a time.",
        "ice": "Trains to say what is said with the fact in front.",
        "lora": "Trains low-rank adapters on the edits.",
        "adalora": "Low-rank adapters, ranks put where they matter.",
        "qlora": "Low-rank adapters on a base quantised to 4 bits.",
    },
    "memory": {
        "grace": "Remembers the answer for prompts like the edit's.",
        "defer": "A trained gate lets a second, trained map answer.",
        "melo": "Looks up a small adapter for each group of prompts.",
        "wise": "Trains a copy of one matrix and routes prompts to it.",
        "wise-retrieve": "WISE with a copy for each block of edits.",
        "memoir": "Adds to a few columns of one matrix for prompts like the edit's.",
        "calinet": "Adds trained slots beside one MLP.",
        "serac": "A classifier hands an edit's questions to a small model.",
        "ike": "Puts the fact and demonstrations before a question.",
        "ike-easyedit": "IKE with the demonstrations that EasyEdit takes.",
        "ike-zero": "Puts the fact alone before a question.",
    },
    "learn to edit": {
        "mend": "A network turns an edit's gradient into a change.",
        "ke": "A network reads the edit and changes its gradient.",
        "malmen": "A network and least squares, many edits at once.",
        "instructedit": "MEND for several tasks, told apart by instructions.",
        "ultraedit": "Solves for the change from one backward pass.",
        "stableedit": "UltraEdit, gradients whitened, warmed up on other facts.",
    },
}
"""Families, their methods, and what each does in a sentence. A method that is in none is
listed by the first line of its docstring."""

NEED_A_SUBJECT = (
    "alphaedit",
    "alphaedit-blue",
    "betaedit",
    "emmet",
    "evoedit",
    "memit",
    "memit-fe",
    "memit-merge",
    "pmet",
    "r-rome",
    "rome",
    "simie",
    "sphere",
)
"""Those that edit at the subject's last token; SimIE by what it wraps unless another method is named."""


def known_settings(kind: type, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings under the names that their fields have now; raises InputError where one is no field of `kind`."""
    from reknow.checks.bounds import current_names  # the names alone are needed at once

    settings = current_names(kind, settings)
    known = [field.name for field in fields(kind)]
    for key in settings:
        if key not in known:
            raise did_you_mean(f"setting of {name}", key, known)
    return settings


def find_row(name: str) -> Row:
    """The row of a name, with or without `PAPER` behind it; raises InputError where there is none."""
    row = _PAPER_NAME.sub("", name)
    if row not in METHODS:
        raise did_you_mean("method", name, METHODS)
    return METHODS[row]


def make(name: str, settings: Mapping[str, Any]) -> Any:
    """The `Method` of that name with these settings; names that a setting had before are understood, with a warning.

    Raises:
        InputError: no such method, or no such field (names the near ones), or a value that the field cannot have.
    """
    from reknow.checks.bounds import refuse_mixed

    row = find_row(name)
    kind = row.method
    if paper := _PAPER_NAME.search(name):
        as_published, settings = resolve_name("reknow.methods.as_published:AsPublished"), {**settings}
        return as_published(name[: paper.start()], paper[1], known_settings(kind, settings, name))
    refuse_mixed(kind, {**row.settings, **settings})
    settings = known_settings(kind, settings, name)
    try:
        return kind(**{**row.settings, **settings})
    except TypeError as error:
        raise InputError(f"expected valid settings for {name}; got {settings}: {error}") from error


def method_settings(method: Any) -> dict[str, Any]:
    """The name and the fields of a `Method`, from which `make` gives it again."""
    return {"name": method.name, **asdict(method)}


def make_from_text(name: str, texts: Mapping[str, str], given: Mapping[str, Any] = {}) -> Any:
    """The `Method` of that name with settings as a person writes them: `make_from_text("memit", {"layers": "3,4"})`.

    Args:
        given: settings that hold where `texts` have no other.

    Raises:
        InputError: no such method, no such field, or a text that is no value of its field.
    """
    from reknow.checks.bounds import field_types, former_names
    from reknow.checks.reading import read_value

    kind = find_row(name).method
    known, former = field_types(kind), former_names(kind)
    values: dict[str, Any] = {}
    for key, text in texts.items():
        if key in former:
            field, mark = former[key]
            values[key] = read_value(key, text, bool if mark.values else known[field] | None)
        elif key in known:
            values[key] = read_value(key, text, known[key])
        else:
            raise did_you_mean(f"setting of {name}", key, known)
    renamed = {former[key][0] for key in values if key in former}
    return make(name, {key: value for key, value in given.items() if key not in renamed} | values)


def layer_setting(name: str) -> str:
    """The field of a method that says at which layers it edits; `layer`, which it then refuses, where it has none."""
    from reknow.checks.bounds import layer_field

    return layer_field(find_row(name).method) or "layer"


def as_now(saved: Any) -> Any:
    """What a manifest says, with the settings of methods in it (`name` and fields) as this version writes them."""
    if not isinstance(saved, Mapping):
        return saved
    if isinstance(name := saved.get("name"), str) and name in METHODS:
        with suppress(InputError):
            return {"name": name, **asdict(make(name, {key: saved[key] for key in saved if key != "name"}))}
    return {key: as_now(value) for key, value in saved.items()}
