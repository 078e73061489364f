"""EasyEdit's files of hyperparameters as methods, and the page that says how to move over."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reknow import AlphaEdit
from reknow.cli import app
from reknow.cli.hparams import read_hparams
from reknow.cli.settings import build_method
from reknow.errors import InputError
from reknow.published import published

PAGE = (Path(__file__).parents[2] / "docs" / "from_easyedit.md").read_text(encoding="utf-8")
SEARCH = """
model_name: "./hugging_cache/gpt2-xl"
stats_dir: "./data/stats"
device: 0
fact_token: "subject_last"
v_num_grad_steps: 20
v_lr: 5e-1
v_loss_layer: 47
v_weight_decay: 0.5
kl_factor: 0.0625
rewrite_module_tmp: "transformer.h.{}.mlp.c_proj"
ln_f_module: "transformer.ln_f"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
"""
BAND = 'layers: [13, 14, 15, 16, 17]\nclamp_norm_factor: 0.75\nlayer_selection: "all"\nmom2_adjustment: true\n'
TUNING = "layers: [0]\nnum_steps: 25\nbatch_size: 3\nmax_length: 40\nlr: 5e-4\nweight_decay: 0\nkl_factor: 0\n"
FILES = {
    "rome": 'alg_name: "ROME"\nlayers: [17]\nclamp_norm_factor: 4\nmom2_adjustment: false\nfp16: false\n'
    "context_template_length_params: [[5, 10], [10, 10]]\n" + SEARCH,
    "memit": 'alg_name: "MEMIT"\nmom2_update_weight: 20000\n' + BAND + SEARCH,
    "alphaedit": 'alg_name: "AlphaEdit"\nmom2_update_weight: 20000\nnullspace_threshold: 2e-2\nL2: 10\n'
    'P_loc: "./null_space_project.pt"\n' + BAND + SEARCH,
    "ft-l": 'alg_name: "FT"\nobjective_optimization: "prompt_last"\nnorm_constraint: 5e-4\n' + TUNING,
    "ft-m": 'alg_name: "FT"\nobjective_optimization: "target_new"\nnorm_constraint: 5e-4\n' + TUNING,
}
BESIDE = 'model_name: "./cache/gpt-j-6b"\ndevice: 0\n'
FILES |= {
    "emmet": 'alg_name: "EMMET"\nlayers: [17]\nclamp_norm_factor: 0.75\nmom2_update_weight: 10000\n'
    'update_norm_lambda: 0\nemmet_lambda: 0.1\nlayer_selection: "all"\n' + SEARCH,
    "grace": 'alg_name: "GRACE"\ninner_params:\n- transformer.h[35].mlp.c_fc.weight\nedit_lr: 1.0\nn_iter: 200\n'
    "eps: 1.0\ndist_fn: euc\nval_init: cold\nval_train: sgd\nval_reg: None\nreg: early_stop\n"
    "replacement: replace_last\neps_expand: coverage\nnum_pert: 8\ndropout: 0.0\n" + BESIDE,
    "pmet": 'alg_name: "PMET"\nlayers: [3, 4, 5, 6, 7, 8]\nclamp_norm_factor: 0.75\nv_num_grad_steps: 30\n'
    "v_lr: 2e-1\nv_loss_layer: 27\nv_weight_decay: 0.5\nkl_factor: 1\nmom2_adjustment: true\n"
    "mom2_update_weight: 15000\n"
    'rewrite_module_tmps: ["transformer.h.{}.mlp.fc_out"]\nnll_loss_factor: 1\n' + BESIDE,
    "defer": 'alg_name: "DEFER"\ninner_params:\n- transformer.h.25.mlp.fc_out.weight\nedit_lr: 7e-5\nn_iter: 100\n'
    "threshold: 0.5\n" + BESIDE,
    "wise-retrieve": 'alg_name: "WISE"\nmask_ratio: 0.2\nedit_lr: 1.0\nn_iter: 70\nnorm_constraint: 1.0\n'
    "act_margin: [15.0, 40.0, 20.0]\nact_ratio: 0.88\nsave_freq: 500\nmerge_freq: 1000\nmerge_alg: 'ties'\n"
    "objective_optimization: 'only_label'\ninner_params:\n- transformer.h[21].mlp.fc_out.weight\ndensities: 0.53\n"
    "weights: 1.0\nretrieve: True\nreplay: False\n" + BESIDE,
}
MODELS = dict.fromkeys(("pmet", "defer", "wise-retrieve"), "gpt-j-6b")


def written(folder: Path, text: str) -> Path:
    (folder / "one.yaml").write_text(text, encoding="utf-8")
    return folder / "one.yaml"


@pytest.mark.parametrize("row", FILES)
def test_a_file_says_what_the_published_settings_say(row, tmp_path):
    file = written(tmp_path, FILES[row])
    assert read_hparams(file) == (row, published(row, MODELS.get(row, "gpt2-xl"), source="easyedit").settings)


def test_a_file_stands_for_a_method_whose_settings_may_be_given(tmp_path):
    file = written(tmp_path, FILES["alphaedit"])
    made = build_method(str(file), ["steps=7"])
    assert made == AlphaEdit.paper("gpt2-xl", source="easyedit", steps=7)
    free = written(tmp_path, FILES["ft-l"].replace("norm_constraint: 5e-4", "norm_constraint: false"))
    assert read_hparams(free)[1]["clamp"] is None
    rome = written(tmp_path, FILES["rome"].replace("mom2_adjustment: false", "mom2_adjustment: true"))
    assert "covariance_tokens" not in read_hparams(rome)[1]


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("model.layers[27].mlp.down_proj.weight", "value"),
        ("transformer.h[25].mlp.fc_out.weight", "value"),
        ("transformer.h[25].mlp.fc_in.weight", "mlp_in"),
        ("model.layers[27].mlp.up_proj.weight", "mlp_in"),
    ],
)
def test_graces_codebook_stands_where_the_file_has_it(module, site, tmp_path):
    file = written(tmp_path, FILES["grace"].replace("transformer.h[35].mlp.c_fc.weight", module))
    assert read_hparams(file)[1]["site"] == site


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('alg_name: "MEND"\n', "unknown alg_name to take over 'MEND'"),
        (
            FILES["grace"].replace("replace_last", "replace_all"),
            "expected replacement replace_last or replace_prompt",
        ),
        (FILES["grace"].replace("[35]", ""), "expected inner_params with the matrix of one layer"),
        (FILES["grace"].replace("mlp.c_fc", "attn.c_proj"), "expected one matrix of an MLP as inner_params"),
        (FILES["grace"].replace("c_fc.", "router."), "expected one matrix of an MLP as inner_params"),
        (FILES["pmet"].replace("factor: 1\n", "factor: 2\n"), "as all else is not done here"),
        (FILES["rome"] + "v_lrr: 1\n", "unknown field to take over 'v_lrr'. Did you mean 'v_lr'?"),
        (
            FILES["rome"].replace("subject_last", "last"),
            "expected fact_token: 'subject_last', as all else is not done",
        ),
        (FILES["ft-l"].replace("prompt_last", "both"), "expected objective_optimization prompt_last or target_new"),
        ("layers: [1]\n", "expected EasyEdit's hyperparameters with alg_name"),
        ("alg_name: [", "expected EasyEdit's hyperparameters as YAML"),
        ("alg_name: !!python/object/apply:os.getcwd []\n", "expected EasyEdit's hyperparameters as YAML"),
        (FILES["rome"].replace("5e-1", "fast"), "learning_rate"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(text, said, tmp_path):
    with pytest.raises(InputError) as refused:
        build_method(str(written(tmp_path, text)))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"expected EasyEdit's hyperparameters as YAML in .*none\.yaml"):
        read_hparams(tmp_path / "none.yaml")


@pytest.mark.slow
def test_every_command_of_the_page_runs(empty_folder):
    for name, kind in (("requests.json", "json"), ("rome.yaml", "yaml")):
        (text,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
        (empty_folder / name).write_text(text, encoding="utf-8")
    stats = empty_folder / "data/stats/gpt2/wikipedia_stats"
    stats.mkdir(parents=True)
    moment = {"mom2.mom2": np.eye(1024, dtype=np.float32), "mom2.count": 10}
    np.savez(stats / "transformer.h.0.mlp.c_proj_float32_mom2_100000.npz", **moment)
    commands = re.findall(r"^\$ reknow (.*)$", PAGE, re.MULTILINE)
    assert len(commands) > 8
    for command in commands:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, command + result.output
    for line in (empty_folder / "runs/saved/cases.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["method"] in ("saved", "unedited")
