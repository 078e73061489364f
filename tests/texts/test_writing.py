"""What stands between two texts, in scripts with and without spaces, and what the whole path makes of it."""

from __future__ import annotations

import json

import pytest
from tokenizers import decoders

from families import tiny_model, tiny_tokenizer
from reknow import FT, IKE, LM, ROME, Case, Edit, Patch, Probe
from reknow.datasets.edits_file import load_edits
from reknow.editing.value_batch import encode_facts
from reknow.edits import to_json
from reknow.errors import InputError
from reknow.evaluation.probing import read_cases
from reknow.model.tokens import Text, encode
from reknow.texts.writing import full_stop, join_texts, separator_between


@pytest.mark.parametrize(
    ("before", "after", "space"),
    [
        ("法国的首都是", "巴黎", ""),
        ("日本の首都は", "東京", ""),
        ("เมืองหลวงของประเทศไทยคือ", "กรุงเทพ", ""),
        ("ရန်ကုန်သည်", "မြန်မာ", ""),
        ("រាជធានីនៃប្រទេសកម្ពុជាគឺ", "ភ្នំពេញ", ""),
        ("Apple公司的创始人是", "Steve Jobs", ""),
        ("长城建于公元前", "221", ""),
        ("问：法国的首都是什么？\nA:", "巴黎", ""),
        ("他最喜欢的品牌是Apple", "公司", ""),
        ("The Chinese name of Shanghai is", "上海", " "),  # a foreign word in a text with spaces
        ("Tokyo (東京)", "is", " "),
        ("프랑스의 수도는", "파리", " "),
        ("The capital of France is", "Paris", " "),
        ("The capital of France (", "Paris", ""),
        ('He answered: "', "Yes", ""),
        ('the "Big Apple"', "is", " "),
        ("„", "Berlin", ""),
        ("„Berlin“", "ist", " "),
        ("The ticket costs $", "5", ""),
        ("It costs 5 $", "in", " "),
        ("channel #", "1", ""),
        ("The language C#", "is", " "),
        ("It was at -", "5", ""),
        ("7 -", "5", " "),
        ("The list:\n-", "Paris", " "),
        ("The philosopher Jean-", "Paul Sartre", ""),
        ("La capitale de l’", "Italie", ""),
        ("The Beatles'", "Help!", " "),
        ("user@", "example.org", ""),
        ("and/", "or", ""),
        ("Well.\n", "Paris", ""),
        ("Well.", " Paris", ""),
    ],
)
def test_what_a_writer_sets_between_two_texts(before, after, space):
    assert separator_between(before, after) == space
    assert join_texts(before + "  ", after) == before + space + after


def test_sentences_end_as_their_script_ends_them():
    assert Edit("法国的首都是", target_new="罗马").statement == "法国的首都是罗马。"
    assert Edit("The capital of France is", target_new="Rome.").statement == "The capital of France is Rome."
    assert [full_stop(text) for text in ("ภาษาไทย", "ភ្នំពេញ", "မြန်မာ")] == ["", "។", "။"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("法国的首都是", "日本語"), ("It is (", "Paris"), ("He is Jean-", "Paris"), ("Lima?\n\n", "Peru")],
)
def test_an_answer_is_read_behind_the_tokens_behind_which_it_would_be_written(bos, prompt, answer):
    tokenizer = tiny_tokenizer(bos=bos)
    written, read_ = encode(tokenizer, [Text(prompt), Text(prompt, answer)])
    assert read_.ids[: read_.prompt_length] == written.ids
    assert tokenizer.decode(read_.target_ids) == answer


def test_a_token_across_the_joint_is_parted():
    """A vocabulary in which "(P" is one token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["(P", "是日"])
    for prompt, answer in (("It is (", "Paris"), ("他是", "日本語")):
        assert any(token in tokenizer.tokenize(prompt + answer) for token in ("(P", "是日"))
        written, scored = encode(tokenizer, [Text(prompt), Text(prompt, answer)])
        assert scored.ids[: scored.prompt_length] == written.ids
        assert tokenizer.decode(scored.target_ids) == answer


def test_spaces_that_end_a_prompt_are_read_alike_in_scoring_writing_and_tracing(lm):
    for prompt in ("The capital of Peru is", "秘鲁的首都是"):
        for spaces in (" ", "   ", "\u3000"):
            assert lm.generate(prompt + spaces, 6) == lm.generate(prompt, 6)
            assert lm.score([prompt + spaces], ["Lima"]) == lm.score([prompt], ["Lima"])
    assert lm.encode([Text.of("{} is ", "Peru")]) == lm.encode([Text.of("{} is", "Peru")])


def test_a_separator_is_kept_on_the_whole_path(lm):
    """Scoring, editing, the search for values, probes, contexts and demonstrations."""
    fused = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", separator="")
    assert fused.statement == "The mother tongue of Danielle Darrieux isEnglish."
    row, *_ = encode_facts(lm, [fused], ["", "Well. "])[0]
    prompt = lm.encode([Text(fused.text)])[0].ids
    assert row.ids[: len(prompt)] == prompt and lm.tokenizer.decode(row.target_ids) == "English"
    scored = lm.score([fused.text] * 3, ["English"] * 3, [None, "", " "])
    assert scored[0] == scored[2] != scored[1]
    case = Case(fused, (Probe(fused.text, ("English",), "generalization", "same", ""),))
    own, probe = read_cases(lm, [case], fluency=False)[0]
    assert own.nll == probe.nll == scored[1].nll
    patch = FT(layer=1, steps=3).edit(lm, [fused])
    assert patch.notes["losses"][0] == pytest.approx(scored[1].nll, rel=1e-3)
    demonstrated = IKE(demonstrations=0).edit(lm, [fused])
    (told,) = IKE.running_memory(lm, [demonstrated]).prompts(lm, [fused.text])
    assert "Darrieux isEnglish\n" in told


def test_a_separator_is_written_to_files_only_where_it_is_given(lm, edit, tmp_path):
    patch = ROME(layer=1, steps=2).edit(lm, [edit])
    assert "separator" not in json.dumps(patch.header())
    spaced = Edit(edit.prompt, subject=edit.subject, target_new="English", separator="\n")
    again = Patch.load(ROME(layer=1, steps=2).edit(lm, [spaced]).save(tmp_path / "a.patch"))
    assert again.edits == (spaced,)
    assert to_json(Case(edit, (Probe("a", ("b",), "locality", "c"),)))["probes"][0] == {
        "prompt": "a",
        "answers": ("b",),
        "kind": "locality",
        "name": "c",
    }


def test_a_separator_is_white_space():
    with pytest.raises(InputError, match="end of the prompt"):
        Edit("a", target_new="b", separator=": ")
    with pytest.raises(InputError, match="end of the prompt"):
        Probe("a", ("b",), "locality", "c", separator="-")


def test_a_subject_behind_other_texts_has_the_tokens_that_it_has_in_its_script(lm):
    for template, subject in (("{}的首都是", "日本"), ("{} is in", "Peru")):
        for prefix in ("Well. ", "好的。 "):
            (row,) = lm.encode([Text.of(template, subject, prefix=prefix)])
            spelled = lm.tokenizer.decode(row.ids[row.subject_first : row.subject_last + 1])
            assert spelled.strip() == subject
            filled = template.replace("{}", subject)
            space = " " if (prefix, subject) == ("Well. ", "Peru") else ""
            assert lm.tokenizer.decode(row.ids, skip_special_tokens=True) == prefix.strip() + space + filled


def test_a_file_says_what_stands_between(tmp_path):
    (tmp_path / "edits.json").write_text('[{"prompt": "A", "target_new": "b", "separator": ""}]')
    assert load_edits(tmp_path / "edits.json") == [Edit("A", target_new="b", separator="")]


@pytest.mark.parametrize("strips", [False, True])
def test_what_is_written_continues_the_prompt_to_the_letter(strips):
    """Also with a tokenizer that drops the space in front of what it decodes, as Llama 2's and Mistral's do."""
    tokenizer = tiny_tokenizer()
    if strips:
        tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    lm = LM((tiny_model("llama"), tokenizer))
    edit = Edit("The capital of Peru is", target_new="Lima .")
    lm.apply(FT(layer=2, steps=60, learning_rate=0.05).edit(lm, [edit]))
    count = len(lm.encode([Text.asked(edit)])[0].target_ids)
    assert lm.tokenizer.decode(lm.encode([Text.asked(edit)])[0].target_ids).startswith(" ") != strips
    assert lm.generate(edit.text, count) == lm.generate(edit.text + " ", count) == " Lima ."
