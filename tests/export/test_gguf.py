"""GGUF: files opened as models, adapters, and files written anew with some tensors changed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from conftest import make_lm, save, some_patch
from families import slow_but, tiny_model, tiny_tokenizer
from gguf_models import permuted, write_gguf
from reknow import LM, Edit
from reknow.cli import app
from reknow.errors import InputError, ModelError, PatchError
from reknow.export import gguf_model
from reknow.export.gguf_adapter import export_gguf_lora
from reknow.export.gguf_files import GGUFFile
from reknow.export.gguf_match import allowed_error
from reknow.export.gguf_model import export_gguf
from reknow.export.gguf_names import Place
from reknow.patching.deltas import LowRank
from reknow.patching.stack import save_stack

IDS = torch.tensor([[10, 40, 80, 120, 200]])


def edited(rank: int = 1, size: float = 0.5, **changes) -> LM:
    lm = make_lm("llama", **changes)
    lm.apply(some_patch(lm, rank=rank, size=size))
    return lm


def parts(file: Path) -> tuple[dict[str, bytes], dict[str, tuple[str, bytes]]]:
    """Bytes of each field but those of an export, and type and bytes of each tensor."""
    reader = GGUFReader(file)
    own = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    fields = {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in own.items()
        if not name.startswith("reknow.")
    }
    tensors = {
        tensor.name: (
            tensor.tensor_type.name,
            file.read_bytes()[tensor.data_offset : tensor.data_offset + tensor.n_bytes],
        )
        for tensor in reader.tensors
    }
    return fields, tensors


def matrix(file: Path, name: str) -> torch.Tensor:
    tensor = next(each for each in GGUFReader(file).tensors if each.name == name)
    return torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type)))


def reknow(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- a GGUF file as a model --------------------------------------------------------------------------------


def test_a_file_opens_as_a_model_and_as_the_base_of_a_stack(tmp_path):
    lm = make_lm("llama")
    file = write_gguf(lm, tmp_path / "base.gguf", "F32")
    found = LM(file)
    assert torch.allclose(found.model(IDS).logits, lm.model(IDS).logits, atol=1e-5)
    assert found.name == found.model.name_or_path == str(file) and found.dtype == torch.float32
    assert found.fingerprint.digest == LM(file).fingerprint.digest
    patch = some_patch(found)
    save_stack(tmp_path / "stack", str(file), [patch])
    found.apply(patch)
    assert torch.equal(LM(tmp_path / "stack").model(IDS).logits, found.model(IDS).logits)
    assert LM(file, dtype="bfloat16").dtype == torch.bfloat16
    asked = LM(file).generate("The capital of Peru is", 5)
    assert asked == LM(file, tokenizer=str(file)).generate("The capital of Peru is", 5)


def test_a_quantised_file_opens_as_what_its_blocks_hold(tmp_path):
    lm = make_lm("llama")
    file = write_gguf(lm, tmp_path / "base.gguf", "Q4_0")
    name = lm.parts.value[1]
    assert torch.equal(LM(file).base_weight(name), matrix(file, "blk.1.ffn_down.weight"))
    assert not torch.equal(LM(file).base_weight(name), lm.base_weight(name))


def test_an_adapter_of_peft_on_a_gguf_file_names_no_server_that_cannot_read_both(tmp_path):
    file = write_gguf(make_lm("llama"), tmp_path / "base.gguf")
    lm = LM(file)
    some_patch(lm).save(tmp_path / "a.patch")
    said = reknow("export", tmp_path / "a.patch", tmp_path / "out", "--to", "lora", "--model", file)
    assert said.exit_code == 0 and "vllm" not in said.output, said.output
    assert "as transformers opens it (gguf_file=…); llama.cpp wants --to gguf-lora" in " ".join(said.output.split())
    assert "vllm" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_patch_made_on_the_model_of_a_gguf_file_is_told_how_it_gets_there(tmp_path):
    lm = make_lm("llama")
    patch = some_patch(lm)
    packed = LM(write_gguf(lm, tmp_path / "base.gguf", "Q4_0"))
    with pytest.raises(PatchError, match=r"a GGUF file of that model gets it by `reknow export --to gguf --base"):
        packed.apply(patch)
    with pytest.raises(PatchError, match=r"\(reknow apply --force\)$"):
        make_lm("gpt2").apply(patch)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    whole = write_gguf(make_lm("llama"), tmp_path / "whole.gguf").read_bytes()
    for broken in (b"GGUF", whole[:-5000], whole[:3000], b"GGUF" + bytes(5000)):
        (tmp_path / "broken.gguf").write_bytes(broken)
        with pytest.raises(
            ModelError, match=r"expected a GGUF file that transformers can read.*broken\.gguf"
        ) as found:
            LM(tmp_path / "broken.gguf")
        assert "\n" not in str(found.value)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv7")
    writer.add_tensor("a", np.zeros((2, 2), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(ModelError, match="rwkv7 is not supported"):
        LM(tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"holds GGUF files: give one, such as .*broken\.gguf"):
        LM(tmp_path)


# --- a file with the edits in it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", slow_but(("F32", "Q4_0"), ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"))
)
def test_only_the_edited_tensor_changes(kind, tmp_path):
    lm = edited()
    base, out = write_gguf(lm, tmp_path / "base.gguf", kind), tmp_path / "out.gguf"
    report = export_gguf(lm, base, out)
    now = kind if kind in ("F32", "F16", "BF16", "Q8_0") else "Q8_0"
    assert report.tensors == {"blk.1.ffn_down.weight": (kind, now)} and report.not_asked is None
    (fields, old), (new_fields, new) = parts(base), parts(out)
    assert fields == new_fields and list(old) == list(new)
    assert [name for name in old if old[name] != new[name]] == ["blk.1.ffn_down.weight"]
    assert new["blk.1.ffn_down.weight"][0] == now
    (delta,) = lm.patches[0].deltas.values()
    wanted = matrix(base, "blk.1.ffn_down.weight") + delta.dense()
    error = float((matrix(out, "blk.1.ffn_down.weight") - wanted).norm() / wanted.norm())
    assert error <= {"F32": 1e-7, "F16": 5e-4, "BF16": 4e-3}.get(now, 0.01)
    (score,), (answer,) = LM(out).score(["The capital of Land 0 is"], ["Lima"]), report.measured.last
    assert answer.said == score.said
    assert answer.probability == pytest.approx(float(torch.tensor(-score.nll * len(score.correct)).exp()), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "size", "now"),
    [
        ("F16", 30.0, "F16"),
        ("F16", 1e4, "F32"),
        ("BF16", 1.0, "BF16"),
        ("BF16", 30.0, "F16"),
        ("Q8_0", 0.1, "Q8_0"),
        ("Q8_0", 30.0, "F16"),
        ("Q4_0", 0.1, "Q8_0"),
        ("Q4_0", 30.0, "F16"),
        ("Q4_0", 1e6, "F32"),
    ],
)
def test_a_tensor_gets_a_type_in_which_its_weights_survive_the_change(kind, size, now, tmp_path):
    """The change is `size` · √2 times as large as the weights or so; blocks take their scale from it."""
    lm = edited(size=size / 2)
    base, out, name = write_gguf(lm, tmp_path / "base.gguf", kind), tmp_path / "out.gguf", "blk.1.ffn_down.weight"
    assert export_gguf(lm, base, out).tensors == {name: (kind, now)}
    (delta,) = lm.patches[0].deltas.values()
    weights = matrix(base, name)
    lost = (matrix(out, name).double() - weights.double() - delta.dense()).norm() / weights.norm()
    assert lost <= 0.02 or now == "F32"


def test_rows_that_are_no_whole_blocks_become_float16(tmp_path):
    lm = edited(intermediate_size=48)
    base, name = write_gguf(lm, tmp_path / "base.gguf", "F16"), "blk.1.ffn_down.weight"
    file = GGUFFile(base)
    (delta,) = lm.patches[0].deltas.values()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gguf_model, "read_tensor", lambda *_: matrix(base, name))
        file.tensors[name] = file.tensors[name]._replace(tensor_type=GGMLQuantizationType.Q4_0)
        assert gguf_model._choose_type(file, Place(name), delta) == GGMLQuantizationType.F16


@pytest.mark.parametrize("place", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_matrices_of_attention_lie_where_llama_cpp_has_them(place, tmp_path):
    lm = make_lm("llama")
    name = f"model.layers.1.self_attn.{place}"
    out, inside = lm.base_weight(name).shape
    delta = LowRank(torch.randn(out, 2), torch.randn(2, inside))
    lm.apply(replace(some_patch(lm), deltas={name: delta}))
    file = write_gguf(lm, tmp_path / "base.gguf", "F32")
    export_gguf(lm, file, tmp_path / "out.gguf")
    assert torch.allclose(LM(tmp_path / "out.gguf").model(IDS).logits, lm.model(IDS).logits, atol=1e-4)
    export_gguf_lora(lm, tmp_path / "adapter", file)
    tensors = {each.name: np.array(each.data) for each in GGUFReader(tmp_path / "adapter/adapter.gguf").tensors}
    (a,), (b,) = ([value for key, value in tensors.items() if key.endswith(part)] for part in ("lora_a", "lora_b"))
    wanted = delta.dense().float().numpy()
    heads = {"q_proj": lm.model.config.num_attention_heads, "k_proj": lm.model.config.num_key_value_heads}.get(place)
    assert np.allclose(b @ a, permuted(wanted, heads) if heads else wanted, atol=1e-5)


def test_a_second_export_says_what_is_in_the_file_already(tmp_path):
    lm = edited()
    first, base = lm.patches[0].id, write_gguf(lm, tmp_path / "base.gguf")
    export_gguf(lm, base, tmp_path / "once.gguf")
    again = LM(tmp_path / "once.gguf")
    again.apply(some_patch(again, 3, layers=(2,)))
    export_gguf(again, tmp_path / "once.gguf", tmp_path / "twice.gguf")
    said = reknow("show", tmp_path / "twice.gguf")
    assert said.exit_code == 0 and again.patches[0].id in said.output
    assert f"has these patches already: {first}" in said.output
    assert [name for name in GGUFReader(tmp_path / "twice.gguf").fields if name.startswith("reknow.")] == [
        "reknow.json",
        "reknow.card",
    ]


def test_the_file_says_what_it_is_and_how_it_answered(tmp_path):
    lm = edited()
    base = write_gguf(lm, tmp_path / "base.gguf", "Q4_0")
    save_stack(tmp_path / "stack", _saved(lm, tmp_path / "hf"), lm.patches)
    out = tmp_path / "out.gguf"
    done = reknow("export", tmp_path / "stack", "--to", "gguf", "--base", base, "--out", out)
    assert done.exit_code == 0, done.output
    assert "blk.1.ffn_down.weight: Q4_0, now Q8_0" in done.stdout and "The capital of Land 0 is" in done.stdout
    found = json.loads(reknow("show", out, "--json").stdout)
    assert found["kind"] == "gguf" and found["patches"][0]["id"] == lm.patches[0].id
    assert found["from"]["file"] == "base.gguf" and found["measured"]["written"][0]["probability"] is not None
    card = GGUFFile(out).text("reknow.card")
    assert card is not None and "| as written |" in card and str(tmp_path) not in card
    assert "says nothing of edits" in reknow("show", base).stderr


def test_a_card_has_licence_and_origin_of_the_file(tmp_path):
    url = "https://huggingface.co/someone/tiny"
    file = write_gguf(make_lm("llama"), tmp_path / "a.gguf", license="mit", base_model__0__repo_url=url)
    lm = LM(file)
    lm.apply(some_patch(lm))
    export_gguf_lora(lm, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out/README.md").data.to_dict()
    assert (data["license"], data["base_model"], data["base_model_relation"]) == ("mit", "someone/tiny", "adapter")
    found = json.loads((tmp_path / "out/reknow.json").read_text())
    assert found["base"]["licence"] == "mit" and found["base"]["name"] == str(file)


def _saved(lm, folder) -> str:
    with lm.unpatched():
        return save(lm, folder)


def test_a_large_file_is_copied_block_by_block(tmp_path):
    """A process that writes a file of 200 MB anew takes far less memory than that for it."""
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(base, "llama")
    for number in range(4):
        writer.add_tensor(f"large.{number}", np.zeros((50, 250_000), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    code = (
        "import resource, sys; from pathlib import Path; from reknow.export.gguf_files import GGUFFile\n"
        "file, peak = GGUFFile(Path(sys.argv[1])), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); file.write_with(Path(sys.argv[2]), {}, {'reknow.json': '{}'}); print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, base, out], capture_output=True, text=True, check=True)
    assert base.stat().st_size > 200_000_000 < out.stat().st_size
    assert int(run.stdout) < 60_000  # kilobytes
    assert parts(base)[1] == parts(out)[1]


# --- what is refused ---------------------------------------------------------------------------------------


def refused(lm, base, tmp_path, error, words):
    for action in (
        lambda: export_gguf(lm, base, tmp_path / "out.gguf"),
        lambda: export_gguf_lora(lm, tmp_path / "adapter", base),
    ):
        with pytest.raises(error, match=words) as found:
            action()
        assert "\n" not in str(found.value)
    assert not (tmp_path / "out.gguf").exists() and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_the_file_of_another_model_is_refused(kind, tmp_path):
    lm = edited()
    other = LM((tiny_model("llama", seed=1), tiny_tokenizer(bos=True)))
    refused(lm, write_gguf(other, tmp_path / "other.gguf", kind), tmp_path, PatchError, "has other weights in blk.1")
    small = make_lm("llama", intermediate_size=96)
    refused(lm, write_gguf(small, tmp_path / "small.gguf", kind), tmp_path, PatchError, "has another size")
    short = make_lm("llama", num_hidden_layers=1)
    words = "has no tensor blk.1.ffn_down.weight: give the file that was made from that model"
    refused(lm, write_gguf(short, tmp_path / "short.gguf", kind), tmp_path, PatchError, words)


def test_the_file_of_a_model_that_was_trained_on_is_refused_where_its_type_tells(tmp_path):
    lm = edited()
    tuned = make_lm("llama")
    for parameter in tuned.model.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        file = write_gguf(tuned, tmp_path / "tuned.gguf", kind)
        refused(lm, file, tmp_path, PatchError, r"has other weights.*differ by 5%")


def test_quantisation_alone_stays_well_within_what_is_allowed():
    torch.manual_seed(0)
    rows = torch.randn(64, 256)
    for kind in ("F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"):
        stored = GGMLQuantizationType[kind]
        found = torch.from_numpy(np.array(quants.dequantize(quants.quantize(rows.numpy(), stored), stored)))
        assert (found - rows).norm() / rows.norm() < 0.6 * allowed_error(stored), kind


def test_damaged_and_split_files_are_refused(tmp_path):
    lm = edited()
    whole = write_gguf(lm, tmp_path / "whole.gguf")
    broken = tmp_path / "broken.gguf"
    for content in (b"GGUF", whole.read_bytes()[:-4000], whole.read_bytes()[:2000], b"no" * 500):
        broken.write_bytes(content)
        refused(lm, broken, tmp_path, ModelError, "expected a whole GGUF file")
    reader = GGUFFile(whole)
    reader.number = lambda key: 3 if key == "split.count" else None  # type: ignore[method-assign]
    assert GGUFFile.number(reader, "llama.block_count") == lm.layers and GGUFFile.number(reader, "no.such") is None


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_layouts_that_are_not_known_are_refused(family, tmp_path):
    lm = make_lm(family)
    name = "query_key_value" if family == "gpt_neox" else ""
    full = next((full for full, _ in lm.model.named_modules() if name and full.endswith(name)), None)
    if full is None:
        lm.apply(some_patch(lm))
    else:
        out, inside = lm.base_weight(full).shape
        lm.apply(replace(some_patch(lm), deltas={full: LowRank(torch.randn(out, 1), torch.randn(1, inside))}))
    with pytest.raises(PatchError, match=r"expected .*known.*`--to hf`"):
        export_gguf_lora(lm, tmp_path / "adapter")


def test_sums_that_overflow_and_places_that_are_taken_are_refused(tmp_path):
    lm = edited()
    base, out = write_gguf(lm, tmp_path / "base.gguf"), tmp_path / "out.gguf"
    large = LowRank(torch.full((32, 1), 1e38), torch.full((1, 64), 1e3))
    with pytest.raises(PatchError, match=r"are numbers; blk\.1\.ffn_down\.weight with the change overflows"):
        gguf_model._choose_type(GGUFFile(base), Place("blk.1.ffn_down.weight"), large)
    assert not out.exists()
    before = base.read_bytes()
    with pytest.raises(InputError, match="apart from what is read"):
        export_gguf(lm, base, base, overwrite=True)
    out.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        export_gguf(lm, base, out)
    assert base.read_bytes() == before and out.read_text() == "mine"


def test_options_that_mean_nothing_are_refused(tmp_path):
    base = write_gguf(make_lm("llama"), tmp_path / "base.gguf")
    for words, options in (
        ("expected --base FILE.gguf", ["out.gguf", "--to", "gguf"]),
        ("--base as a GGUF file", ["out.gguf", "--to", "gguf", "--base", tmp_path / "none.gguf"]),
        ("--to lora alone", ["out", "--to", "lora", "--base", base]),
        ("--to gguf alone", ["out.gguf", "--to", "gguf", "--base", base, "--max-rank", "3"]),
        ("one place to write to; got none", ["--to", "hf"]),
        ("one place to write to; got OUT and --out", ["out", "--out", "out", "--to", "hf"]),
    ):
        result = reknow("export", tmp_path / "stack", *options)
        assert result.exit_code == 2 and words in result.stderr, result.output


def test_what_transformers_cannot_read_is_written_and_said_not_to_be_asked(tmp_path, monkeypatch):
    lm = edited()
    base = write_gguf(lm, tmp_path / "base.gguf")

    def unreadable(*_):
        raise ModelError("it is of no known architecture")

    monkeypatch.setattr(gguf_model, "_ask_file", unreadable)
    report = export_gguf(lm, base, tmp_path / "out.gguf")
    assert report.not_asked == "it is of no known architecture" and report.measured.written is None
    found = json.loads(reknow("show", tmp_path / "out.gguf", "--json").stdout)
    assert "written" not in found["measured"] and found["measured"]["after"]


# --- adapters ----------------------------------------------------------------------------------------------


def test_an_adapter_has_one_rank_and_one_alpha(tmp_path):
    lm = edited()
    lm.apply(some_patch(lm, 2, rank=3, layers=(2,)))
    report = export_gguf_lora(lm, tmp_path / "adapter")
    reader = GGUFReader(report.adapter)
    fields = GGUFFile(report.adapter)
    assert fields.text("general.type") == "adapter" and fields.text("adapter.type") == "lora"
    assert fields.architecture == "llama" and sorted(report.ranks.values()) == [1, 3]
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {each.name: np.array(each.data) for each in reader.tensors}
    assert alpha == 3.0 and {min(each.shape) for each in tensors.values()} == {3}
    for name, delta in ((name, patch.deltas[name]) for patch in lm.patches for name in patch.deltas):
        layer = name.split(".")[2]
        left, right = (tensors[f"blk.{layer}.ffn_down.weight.lora_{part}"] for part in "ba")
        assert np.allclose(left @ right * alpha / 3, delta.dense(), atol=1e-6)
    assert fields.text("reknow.card") == (tmp_path / "adapter/README.md").read_text().rstrip()
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter.gguf",
        "Modelfile",
        "README.md",
        "reknow.json",
    }


def test_a_modelfile_names_base_and_adapter(tmp_path):
    lm = edited()
    base = write_gguf(lm, tmp_path / "base.gguf")
    export_gguf_lora(lm, tmp_path / "with", base)
    assert (tmp_path / "with/Modelfile").read_text() == f"FROM {base}\nADAPTER ./adapter.gguf\n"
    report = export_gguf_lora(lm, tmp_path / "without")
    lines = (tmp_path / "without/Modelfile").read_text().splitlines()
    assert lines[0].startswith("#") and lines[1:] == ["FROM ./BASE.gguf", "ADAPTER ./adapter.gguf"]
    assert report.commands[0] == f"llama-server -m BASE.gguf --lora {tmp_path / 'without/adapter.gguf'}"


def test_show_reads_adapters_by_folder_and_by_file(tmp_path):
    lm = edited()
    lm.patches[0].notes.clear()
    export_gguf_lora(lm, tmp_path / "adapter")
    for source in (tmp_path / "adapter", tmp_path / "adapter/adapter.gguf"):
        said = reknow("show", source)
        assert said.exit_code == 0 and "a GGUF LoRA adapter for llama.cpp" in said.output, said.output
        assert lm.patches[0].id in said.output


def test_a_patch_of_another_base_is_refused(tmp_path):
    lm = make_lm("llama")
    patch = some_patch(lm)
    patch.save(tmp_path / "a.patch")
    other = _saved(LM((tiny_model("llama", seed=1), tiny_tokenizer(bos=True))), tmp_path / "other")
    for kind in ("lora", "gguf-lora", "hf"):
        said = reknow("export", tmp_path / "a.patch", tmp_path / "out", "--to", kind, "--model", other)
        assert said.exit_code == 2 and "this one has other weights" in said.stderr
    assert not (tmp_path / "out").exists()


def test_the_edits_of_more_than_one_patch_are_asked(tmp_path):
    lm = edited()
    lm.apply(replace(some_patch(lm, 2), edits=(Edit("The sea is", target_new="deep"),)))
    report = export_gguf(lm, write_gguf(lm, tmp_path / "base.gguf"), tmp_path / "out.gguf")
    assert [edit.target_new for edit in report.measured.edits] == ["Lima", "deep"]
    assert len(report.measured.last) == 2
