"""The applied patches as a LoRA adapter for llama.cpp, and a Modelfile that gives it to Ollama."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGUFType, GGUFWriter, Keys
from torch import Tensor
from torch.nn.functional import pad

from reknow.export.about import CARD, check_place, describe_export, write_record
from reknow.export.adapter import ask_truncated, factorize_patches
from reknow.export.card import write_card
from reknow.export.gguf_files import GGUFFile
from reknow.export.gguf_match import check_match
from reknow.export.gguf_names import Place, as_rows, find_places, llama_cpp_name
from reknow.export.gguf_record import CARD_FIELD, RECORD_FIELD
from reknow.export.measure import Measured, measure
from reknow.files.atomic import atomic_write_folder
from reknow.files.strict_json import strict_json
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.packaged import packaged_model
from reknow.patching.deltas import LowRank

ADAPTER, MODELFILE = "adapter.gguf", "Modelfile"


@dataclass(frozen=True)
class GGUFLoraReport:
    """What a GGUF adapter holds and what it lost."""

    folder: Path
    ranks: dict[str, int]
    """Rank by matrix name, before all were padded with zeros to the largest."""
    error: float
    """Relative Frobenius error of the worst matrix; 0 unless it was truncated."""
    base: str
    """The GGUF file of the base: the one that was given, or what stands for it."""
    measured: Measured
    """How its edits are answered."""

    @property
    def rank(self) -> int:
        """The one rank of the adapter, which is its alpha too."""
        return max(self.ranks.values())

    @property
    def adapter(self) -> Path:
        """The adapter's file."""
        return self.folder / ADAPTER

    @property
    def commands(self) -> list[str]:
        """The lines that serve base and adapter with llama.cpp, and with Ollama."""
        ollama = ["ollama", "create", self.folder.name.lower(), "-f", str(self.folder / MODELFILE)]
        llama_cpp = ["llama-server", "-m", self.base, "--lora", str(self.adapter)]
        return [shlex.join(llama_cpp), shlex.join(ollama)]


@typed_exclusively
def export_gguf_lora(
    lm: LM,
    folder: str | Path,
    base: str | Path | None = None,
    *,
    max_rank: int | None = None,
    truncate: bool = False,
    overwrite: bool = False,
) -> GGUFLoraReport:
    """Writes the applied patches as one GGUF adapter for llama.cpp, beside a Modelfile for Ollama.

    Args:
        base: the GGUF file of the base model that the Modelfile names; it is checked to be of that model.
        max_rank: largest rank allowed; None: 512.
        truncate: cut a higher rank by SVD instead of refusing it.

    Raises:
        PatchError: no patch is applied, one is a memory, a change has a higher rank, the model's layout in llama.cpp
            is not known, or `base` is of another model.
        ModelError: `base` is no whole GGUF file.
        InputError: the folder exists and `overwrite` is off, or the disk is full (an old folder stays).
    """
    folder = check_place(lm, folder, overwrite)
    factors, error = factorize_patches(lm, max_rank, truncate)
    if base is None:
        architecture = llama_cpp_name(lm)
        places = find_places(lm, factors, architecture)
    else:
        file = GGUFFile(Path(base))
        architecture = file.architecture
        places = check_match(lm, file, factors)
    ranks = {name: factor.rank for name, factor in factors.items()}
    packaged = packaged_model(lm.name, lm.model.name_or_path)
    served = str(base or (packaged.file if packaged else "BASE.gguf"))
    measured = ask_truncated(lm, measure(lm), max(ranks.values())) if error else measure(lm)
    report = GGUFLoraReport(folder, ranks, error, served, measured)

    def write(new: Path) -> None:
        record = describe_export(lm, "gguf-lora", measured)
        usage = replace(report, folder=Path(folder.name), base=Path(served).name).commands
        card = write_card(lm, "gguf-lora", measured, usage)
        notes = {RECORD_FIELD: strict_json(record, ensure_ascii=False), CARD_FIELD: card}
        tensors = {
            places[name].tensor: _padded(factor, report.rank, places[name]) for name, factor in factors.items()
        }
        _write_adapter(new / ADAPTER, architecture, report.rank, tensors, notes)
        (new / MODELFILE).write_text(_modelfile(lm, served, base is not None), encoding="utf-8")
        (new / CARD).write_text(card, encoding="utf-8")
        write_record(new, record)

    atomic_write_folder(folder, write, overwrite)
    return report


def _padded(factor: LowRank, rank: int, place: Place) -> tuple[Tensor, Tensor]:
    """The factors as the file has them, with zeros up to the rank. (rank, in), (out, rank)"""
    missing = rank - factor.rank
    return pad(factor.right, (0, 0, 0, missing)), place.arrange(pad(factor.left, (0, missing)))


def _write_adapter(
    file: Path, architecture: str, rank: int, tensors: dict[str, tuple[Tensor, Tensor]], notes: dict[str, str]
) -> None:
    """Writes factors by tensor name as llama.cpp reads them, which divides alpha by the rank."""
    writer = GGUFWriter(file, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
    for name, text in notes.items():
        writer.add_string(name, text)
    for name, factors in tensors.items():
        for part, tensor in zip(("lora_a", "lora_b"), factors, strict=True):
            writer.add_tensor(f"{name}.{part}", as_rows(tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _modelfile(lm: LM, served: str, given: bool) -> str:
    """What Ollama builds the edited model from."""
    where = str(Path(served).resolve()) if given else f"./{Path(served).name}"
    told = "" if given else f"# the GGUF file of {lm.name}, or its name in Ollama\n"
    return f"{told}FROM {where}\nADAPTER ./{ADAPTER}\n"
