"""The trained editor: a file that can be shared like a model, and is refused where it does not fit."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import make_lm
from learned import some_cases, trained
from reknow import LM, MEND, evaluate
from reknow.errors import InputError
from reknow.learning.editors import Editor, open_editor, trained_settings
from reknow.learning.learned import Learned

BUNDLED = sorted(e.name for e in (files("reknow") / "assets/editors").iterdir() if e.name.endswith(".safetensors"))


@pytest.fixture(scope="module")
def mend() -> Learned:
    return trained("mend", "gpt2")


def test_it_belongs_to_its_model(mend, tmp_path):
    edit = some_cases(1)[0].edit
    with pytest.raises(InputError, match=r"belongs to a model with other weights: train one with `reknow train mend"):
        mend.edit(make_lm(seed=1), [edit])
    with pytest.raises(InputError, match="other layers or sizes"):
        mend.edit(make_lm("llama"), [edit])
    with pytest.raises(InputError, match="none is given and none is bundled"):
        MEND().edit(make_lm(), [edit])
    with pytest.raises(InputError, match="there is no such file"):
        MEND(editor=str(tmp_path / "none")).edit(make_lm(), [edit])
    half = LM((make_lm().model.to(torch.bfloat16), make_lm().tokenizer))
    assert mend.edit(half, [edit]).deltas, "the same model in another dtype is the same model"


LIKE_MEND = [("instructedit", 1), ("ke", 1)]


@pytest.mark.parametrize(
    ("method", "known"),
    [("mend", 1), *(pytest.param(*row, marks=pytest.mark.slow) for row in LIKE_MEND), ("malmen", None)],
)
def test_more_edits_than_it_knows_are_made_with_a_warning(method, known, caplog):
    lm, learned, edits = make_lm(), trained(method, "gpt2"), [case.edit for case in some_cases(3)]
    first = learned.edit(lm, edits[:1])
    assert not caplog.messages
    learned.edit(lm, edits)
    with lm.patched(first), lm.patched(learned.edit(lm, edits[1:2])):
        learned.edit(lm, edits[2:])
    told = [f"{n} edits of {method} in one model, whose editor was trained on {known} at once" for n in (3, 2)]
    assert [message.partition(":")[0] for message in caplog.messages] == ([] if known is None else told)


def test_it_is_a_file(mend, tmp_path):
    editor = Editor.load(Path(mend.editor).parent)
    matrices = {name: tensor.half() for name, tensor in editor.tensors.items() if tensor.dim() > 1}
    path = replace(editor, tensors=editor.tensors | matrices).save(tmp_path / "small.safetensors")
    small = open_editor("mend", str(path), make_lm())
    assert path.stat().st_size < Path(mend.editor).stat().st_size
    for name, tensor in small.tensors.items():
        torch.testing.assert_close(tensor, editor.tensors[name], rtol=1e-3, atol=1e-3)
        assert tensor.dtype == torch.float32
    assert small.settings["rank"] == 16 and small.method == "mend"
    other = replace(editor, method="ke").save(tmp_path / "ke.safetensors")
    with pytest.raises(InputError, match=r"expected an editor for mend; .* is one for ke"):
        MEND(editor=str(other)).edit(make_lm(), [some_cases(1)[0].edit])
    header = {"reknow": json.dumps({"format": 1, "kind": "weights"})}
    save_file({"a": torch.zeros(1)}, tmp_path / "patch", metadata=header)
    with pytest.raises(InputError, match=r"field kind: Input should be 'editor'"):
        Editor.load(tmp_path / "patch")


def test_cases_that_it_has_seen_are_refused(mend):
    lm, case = make_lm(), some_cases()[3]
    with pytest.raises(InputError, match=r"was not trained; it was on 1 of 1, such as '3'"):
        evaluate(lm, [case], mend)
    unseen = replace(case, edit=replace(case.edit, prompt="The home of {} is"))
    assert evaluate(lm, [unseen], mend)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_ones_speak_of_settings_as_today(name):
    with as_file(files("reknow") / "assets/editors" / name) as path:
        editor = Editor.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained_settings(editor)


def test_former_names_of_settings_are_read_with_a_warning(mend):
    editor = Editor.load(mend.editor)
    settings = {name: value for name, value in editor.settings.items() if name != "step_size_learning_rate"}
    older = replace(editor, settings=settings | {"step_size_rate": 0.5})
    with pytest.warns(FutureWarning, match="step_size_rate of MEND is called step_size_learning_rate now"):
        assert trained_settings(older).step_size_learning_rate == 0.5
