"""Edited models in the real llama.cpp: the new answer is given there, and other facts are continued as before."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

pytest.importorskip("xllamacpp")

from gguf_models import in_float16, llama_cpp, write_gguf
from reknow import LM, Edit, Patch, method
from reknow.evaluation.effect import control_facts
from reknow.export.gguf_adapter import export_gguf_lora
from reknow.export.gguf_model import export_gguf
from reknow.model.packaged import PACKAGED
from reknow.patching.patches import merge

pytestmark = [pytest.mark.engines, pytest.mark.slow]

QUICK = dict(covariance_tokens=5_000)
TONGUE = "The mother tongue of {} is"
ROME_EDIT = Edit(TONGUE, subject="Danielle Darrieux", target_new="English", target_true="French")
MEMIT_EDITS = (
    Edit(TONGUE, subject="Léon Blum", target_new="Dutch", target_true="French"),
    Edit("{} is located in the continent of", subject="Kinnear Glacier", target_new="Asia"),
)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM.demo("llama")


@pytest.fixture(scope="module")
def near(lm) -> list[str]:
    """Other facts that the model knows, in the words of the edits and in others."""
    return [fact.text for fact in control_facts(lm, [ROME_EDIT, *MEMIT_EDITS], 12)]


@pytest.fixture(scope="module")
def stacks(lm) -> dict[str, list[Patch]]:
    """Patches by what made them."""
    rome = method("rome", **QUICK).edit(lm, [ROME_EDIT])
    memit = method("memit", layers=(0, 1, 2), **QUICK).edit(lm, MEMIT_EDITS)
    with lm.patched(rome):
        on_top = method("memit", layers=(0, 1, 2), **QUICK).edit(lm, MEMIT_EDITS)
    return {"rome": [rome], "memit": [memit], "a stack": [rome, on_top], "merged": [merge([rome, on_top])]}


@pytest.fixture(scope="module", params=["F16", "Q8_0", "Q4_0"])
def base(request, lm, tmp_path_factory) -> Path:
    return write_gguf(lm, tmp_path_factory.mktemp("base") / f"{request.param}.gguf", request.param)


def words(texts: list[str]) -> list[str]:
    return [text.split()[0].rstrip(".,") for text in texts]


def check(lm: LM, base: Path, folder: Path, near: list[str]) -> None:
    """The applied patches' answers and the neighbours', as an adapter and in the file itself."""
    edits = [edit for patch in lm.patches for edit in patch.edits]
    asked, wanted = [edit.text for edit in edits], [edit.target_new.split()[0] for edit in edits]
    before = llama_cpp(base)
    old, kept = words(before(asked)), words(before(near))
    assert all(said != word for said, word in zip(old, wanted, strict=True))
    report = export_gguf_lora(lm, folder / "adapter", base)
    written = export_gguf(lm, base, folder / "new.gguf")
    assert written.measured.held == len(edits)
    for ask in (llama_cpp(base, report.adapter), llama_cpp(written.file)):
        assert words(ask(asked)) == wanted
        assert words(ask(near)) == kept


@pytest.mark.parametrize("name", ["rome", "memit", "a stack", "merged"])
def test_llama_cpp_gives_the_new_answers_and_the_old_neighbours(name, lm, stacks, near, base, tmp_path):
    assert len(near) == 12
    with lm.stacked(stacks[name]):
        check(lm, base, tmp_path, near)


def test_each_patch_can_be_an_adapter_of_its_own(lm, stacks, base, tmp_path):
    """llama.cpp adds any number of them; the sum is the stack."""
    files = []
    for number, patch in enumerate(stacks["a stack"]):
        with lm.stacked([patch]):
            files.append(export_gguf_lora(lm, tmp_path / str(number), base).adapter)
    ask = llama_cpp(base, *files)
    edits = [ROME_EDIT, *MEMIT_EDITS]
    assert words(ask([edit.text for edit in edits])) == [edit.target_new for edit in edits]


# --- models that others trained ----------------------------------------------------------------------------


def packaged_file(name: str, folder: Path) -> Path:
    """The GGUF file that a package holds, its parts put together; skips where it is not installed."""
    file = folder / PACKAGED[name].file
    for package, place in PACKAGED[name].parts.items():
        try:
            part = Path(str(distribution(package).locate_file(place)))
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed (make {'gemma' if name == 'gemma3' else 'setup'})")
        with file.open("ab") as whole:
            whole.write(part.read_bytes())
    return file


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_real_model_answers_anew_in_the_file_that_its_package_holds(name, tmp_path):
    """Q4_1 and a mixture of K-quants, of which only the edited tensor becomes Q8_0."""
    file = packaged_file(name, tmp_path)
    lm = LM(file)
    lm.apply(method("rome", layer=3, **QUICK).edit(lm, [ROME_EDIT]))
    near = [TONGUE.format("Charles de Gaulle"), "The capital of Japan is", "The Eiffel Tower is in the city of"]
    check(lm, file, tmp_path, near)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> LM:
    packaged_file("smollm2", tmp_path_factory.mktemp("package"))
    return LM.demo("smollm2")


@pytest.fixture(scope="module")
def near_smollm2(smollm2) -> list[str]:
    """Other facts that it knows well, those in the words of the edits first: where two answers are nearly alike, the
    rounding of an engine's products decides, with patches and without."""
    found = [fact.text for fact in control_facts(smollm2, [ROME_EDIT, *MEMIT_EDITS], 30)]
    return [text for text in found if margin(smollm2, text) > 0.7][:12]


@torch.no_grad()
def margin(lm: LM, prompt: str) -> float:
    """How much likelier the first token of the answer is than any other, in nats."""
    best = lm.model(**lm.tokenizer(prompt, return_tensors="pt")).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


@pytest.fixture(scope="module")
def stacks_of_smollm2(smollm2) -> dict[str, list[Patch]]:
    """MEMIT over its default band alone, and on top of a ROME patch, the two merged; the default's covariances, since
    with fewer tokens in them MEMIT changes a neighbour in the model itself."""
    rome = method("rome", layer=3).edit(smollm2, [ROME_EDIT])
    with smollm2.patched(rome):
        on_top = method("memit").edit(smollm2, MEMIT_EDITS)
    return {"memit": [method("memit").edit(smollm2, MEMIT_EDITS)], "merged": [merge([rome, on_top])]}


@pytest.mark.real
@pytest.mark.parametrize(("name", "kind"), [("memit", "Q4_1"), ("merged", "Q4_1"), ("merged", "F16")])
def test_a_real_model_with_many_layers_changed(name, kind, smollm2, near_smollm2, stacks_of_smollm2, tmp_path):
    """In the 4-bit file of its package, and in one whose matrices are all F16."""
    base = packaged_file("smollm2", tmp_path)
    if kind == "F16":
        base = in_float16(base, tmp_path / "f16.gguf")
    (patch,) = stacks_of_smollm2[name]
    assert len(near_smollm2) == 12 and len(patch.deltas) > 3
    with smollm2.stacked([patch]):
        check(smollm2, base, tmp_path, near_smollm2)
