"""Adapters for servers: the line that serves one, the ranks that they take, and the name of the base."""

from __future__ import annotations

import json
import shlex

import pytest

from conftest import make_lm, some_patch
from reknow.errors import InputError, PatchError
from reknow.export.adapter import SERVED_RANKS, LoraReport, export_lora
from reknow.model.packaged import kept_folder


def adapter(lm, folder, **options):
    report = export_lora(lm, folder, **options)
    return report, json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (512, 512)])
def test_the_line_that_serves_it_has_the_least_rank_that_vllm_takes(rank, served, tmp_path):
    assert served in SERVED_RANKS
    report = LoraReport(tmp_path / "my adapter", {"a": 1, "b": rank}, 0.0, "someone/model")
    assert (report.rank, report.served_rank) == (rank, served)
    words = shlex.split(report.commands[0])
    assert words[:3] == ["vllm", "serve", "someone/model"] and "--enable-lora" in words
    assert words[words.index("--max-lora-rank") + 1] == str(served)
    assert words[words.index("--lora-modules") + 1] == f"my adapter={tmp_path / 'my adapter'}"


def test_what_no_server_takes_is_refused_with_the_ways_out(tmp_path):
    lm = make_lm("llama", hidden_size=520, intermediate_size=520, num_attention_heads=4, num_key_value_heads=4)
    lm.apply(some_patch(lm, dense=True, rank=520))
    for options, error in (({}, PatchError), ({"max_rank": 513}, InputError)):
        with pytest.raises(error, match=r"512 at most.*--truncate.*--to hf"):
            export_lora(lm, tmp_path / "adapter", **options)
        assert not (tmp_path / "adapter").exists()
    report, config = adapter(lm, tmp_path / "adapter", truncate=True)
    assert report.rank == report.served_rank == config["r"] == config["lora_alpha"] == 512
    assert 0 < report.error < 0.1


def test_a_smaller_bound_may_be_raised(tmp_path):
    lm = make_lm("llama")
    lm.apply(some_patch(lm, rank=3))
    with pytest.raises(PatchError, match=r"rank 2 at most.*raise max_rank, cut it.*--truncate.*--to hf"):
        export_lora(lm, tmp_path / "adapter", max_rank=2)


@pytest.mark.parametrize("how", ["by name", "by its folder"])
def test_a_model_from_a_package_is_named_as_others_can_open_it(how, tmp_path):
    lm = make_lm("llama")
    if how == "by name":
        lm.name = "demo:smollm2"
    else:
        lm.model.name_or_path = str(kept_folder("smollm2"))
    lm.apply(some_patch(lm))
    report, config = adapter(lm, tmp_path / "adapter")
    assert config["base_model_name_or_path"] == report.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert " serve HuggingFaceTB/SmolLM2-135M-Instruct " in report.commands[0]
