"""The loaders on their bundled samples, and on files with every kind of fault."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reknow.datasets import DATASETS, FACTS, Fact, load_cases, load_edits, load_facts, sample_text
from reknow.datasets.records import place_subject
from reknow.datasets.sources import download
from reknow.datasets.text import text_source
from reknow.edits import Edit, Probe
from reknow.errors import InputError, MissingExtra

BUNDLED = [name for name, source in DATASETS.items() if source.sample is not None]
SIZES = {
    "counterfact": 1000,
    "counterfact-easyedit": 100,
    "zsre": 200,
    "knowedit-zsre": 200,
    "wiki_recent": 150,
    "wiki_counterfact": 200,
    "wikibio": 60,
    "qaedit": 100,
    "convsent": 280,
}


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def probes(case, name):
    return [probe for probe in case.probes if probe.name == name]


# --- the bundled samples ------------------------------------------------------------------------------


def test_the_tables_and_the_sizes_agree():
    assert {name: len(load_cases(name)) for name in BUNDLED} == SIZES
    sizes = {"known_1000": 1209, "counterfact": 1000, "pararel": 1950, "lre": 1062}
    assert {name: len(load_facts(name)) for name in FACTS} == sizes


@pytest.mark.parametrize("name", BUNDLED)
def test_edits_are_complete_and_aids_are_never_probes(name):
    cases = load_cases(name)
    assert len({case.edit.id for case in cases}) == len(cases)
    for case in cases:
        edit = case.edit
        assert edit.id.startswith(f"{name}/") and edit.subject and edit.text.count("{}") == 0
        aids = {edit.fill(text) for text in edit.rephrasings} | set(edit.context)
        assert aids.isdisjoint(probe.prompt for probe in case.probes)
        texts = (edit.text, edit.target_new, *(text for p in case.probes for text in (p.prompt, *p.answers)))
        assert all(text == text.strip() != "" for text in texts)


def test_counterfact():
    case = load_cases("counterfact", limit=1)[0]
    edit = case.edit
    assert (edit.prompt, edit.subject) == ("The mother tongue of {} is", "Danielle Darrieux")
    assert (edit.target_new, edit.target_true, edit.id) == ("English", "French", "counterfact/0")
    assert len(case.probes) == 22
    assert probes(case, "paraphrase")[0] == Probe(
        "Shayna does this and Yossel goes still and dies. Danielle Darrieux, a native",
        ("English",),
        "generalization",
        "paraphrase",
    )
    assert probes(case, "neighborhood")[-1] == Probe(
        "Melchior de Vogüé, speaker of", ("French",), "locality", "neighborhood"
    )
    assert probes(case, "generation")[1] == Probe(
        "Where Danielle Darrieux is from, people speak the language of", (), "fluency", "generation"
    )
    # Subjects whose answer is target_new anyway are no probes.
    assert not any("J. R. R. Tolkien" in probe.prompt for probe in case.probes)


def test_counterfact_ids_are_the_authors_case_ids():
    assert load_cases("counterfact")[-1].edit.id == "counterfact/1085"


def test_counterfact_of_easyedit():
    case = load_cases("counterfact-easyedit", limit=1)[0]
    assert case.edit.prompt == "The mother tongue of {} is"
    assert case.edit.id == "counterfact-easyedit/0"
    assert case.probes == (
        Probe(
            "Where Danielle Darrieux is from, people speak the language of",
            ("English",),
            "generalization",
            "rephrase",
        ),
        Probe("Michel Rocard is a native speaker of", ("French",), "locality", "neighborhood"),
    )


def test_zsre():
    case = load_cases("zsre", limit=1)[0]
    edit = case.edit
    assert (edit.prompt, edit.subject) == ("What is the product made by {}?", "UniFirst")
    assert (edit.target_new, edit.target_true, edit.id) == ("unmanned aircraft", "uniform", "zsre/0")
    assert case.probes == (
        Probe("What will be the product of UniFirst?", ("unmanned aircraft",), "generalization", "rephrase"),
        Probe(
            "nq question: john goodman's character in the big lebowski",
            ("Walter Sobchak",),
            "locality",
            "nq",
        ),
    )


def test_knowedit_zsre():
    case = load_cases("knowedit-zsre", limit=1)[0]
    assert case.edit.prompt == "Which family does {} belong to?"
    assert (case.edit.target_new, case.edit.target_true) == ("Noctuidae", "Aspidoceratidae")
    assert [(probe.kind, probe.name) for probe in case.probes] == [
        ("generalization", "rephrase"),
        ("locality", "Relation_Specificity"),
        ("locality", "Relation_Specificity"),
        ("portability", "Reasoning"),
        ("fluency", "request"),
    ]
    assert case.probes[-2].prompt == "What is the common name for the family Epaspidoceras belongs to?"
    assert case.probes[-2].answers == ("Owlet moths",)


def test_wiki_recent_flattens_alias_lists():
    case = load_cases("wiki_recent", limit=1)[0]
    assert case.edit.target_true is None
    country = case.probes[1]
    assert country.prompt == "The name of the country of citizenship of Ingrīda Amantova is"
    assert (len(country.answers), country.answers[:2]) == (13, ("Soviet Union", "USSR"))


def test_wiki_counterfact():
    case = load_cases("wiki_counterfact", limit=1)[0]
    assert (case.edit.target_new, case.edit.target_true) == ("Franche-Comté", "France")
    alias = probes(case, "Subject_Aliasing")[0]
    assert alias.prompt == "The name of the country which Gorsedd of Brittany is associated with is"
    assert alias.answers == ("Franche-Comté",) and alias.kind == "portability"


def test_wikibio_marks_the_entity_where_the_passage_names_it():
    edit = load_cases("wikibio", limit=1)[0].edit
    assert edit.subject == "john russell reynolds"
    assert edit.prompt.startswith("This is a Wikipedia passage about {}. Sir John Russell Reynolds,")
    assert edit.target_new.startswith("He received general education from his father")


def test_qaedit():
    case = load_cases("qaedit", offset=3, limit=1)[0]
    edit = case.edit
    assert (edit.prompt, edit.subject) == ("What did {} call his rifle", "Davey Crocket")
    assert (edit.target_new, edit.target_true, edit.id) == ("Old Betsy", None, "qaedit/TQA-10205")
    assert len(probes(case, "nq")) == 5
    assert probes(case, "nq")[0].answers == ("Karen Gillan",)


def test_facts():
    # known_1000's template lacks the "of" that GPT-2 XL wrote before the answer.
    vinson = Fact("{} is located in the continent of", "Vinson Massif", "Antarctica")
    assert load_facts("known_1000", limit=1) == [vinson]
    assert vinson.text == "Vinson Massif is located in the continent of"
    assert load_facts("counterfact", limit=1) == [Fact("The mother tongue of {} is", "Danielle Darrieux", "French")]
    assert load_facts("lre", limit=1) == [Fact("{} is part of", "New York City", "United States")]
    assert all("[" not in fact.prompt for fact in load_facts("pararel"))
    assert Fact("The native language of {} is", "Pierre Messmer", "French").prompt in {
        fact.prompt for fact in load_facts("pararel")
    }
    assert "expected a prompt with one {}" in refusal(Fact, "no place", "a", "b")


def test_sample_text_reads_naturally(tmp_path):
    paragraphs = sample_text()
    assert sum(len(paragraph.split()) for paragraph in paragraphs) > 80_000
    assert not any("<unk>" in text or " = " in text[:3] or "@" in text or " ," in text for text in paragraphs)
    line = ' It didn \'t weigh 0 @.@ 7 – 2 @.@ 2 kg ( 1 @,@ 500 lb ) , a " red @-@ hot " claim . '
    path = write(tmp_path, "wiki.txt", f" = Title = \n\n{line}\n = = Part = = \n")
    assert sample_text(path) == ['It didn\'t weigh 0.7 – 2.2 kg (1,500 lb), a "red-hot" claim.']


# --- choosing -----------------------------------------------------------------------------------------


def test_limit_offset_and_seed(caplog):
    cases = load_cases("zsre")
    assert load_cases("zsre", offset=5, limit=3) == cases[5:8]
    shuffled = load_cases("zsre", seed=1)
    assert shuffled != cases and sorted(shuffled, key=str) == sorted(cases, key=str)
    assert load_cases("zsre", seed=1, offset=2, limit=4) == shuffled[2:6]
    assert load_cases("zsre", seed=2, limit=4) != shuffled[:4]
    assert len(load_cases("zsre", offset=199, limit=3)) == 1
    assert "expected 3 records; there are only 1" in caplog.text


@pytest.mark.parametrize("options", [{"limit": 0}, {"offset": -1}, {"offset": 200}])
def test_a_choice_of_nothing_is_refused(options):
    assert "expected" in refusal(load_cases, "zsre", **options)


def test_unknown_names():
    assert "Did you mean 'counterfact'?" in refusal(load_cases, "counterfacts")
    assert "Did you mean 'pararel'?" in refusal(load_facts, "pararell")
    assert "load_facts('known_1000')" in refusal(load_cases, "known_1000")


# --- files --------------------------------------------------------------------------------------------

FLAT = {
    "case_id": 7,
    "prompt": "The capital of France is",
    "subject": "France",
    "target_new": "Lyon",
    "ground_truth": "Paris",
    "rephrase_prompt": "France's capital is",
    "locality_prompt": "The capital of Italy is",
    "locality_ground_truth": "Rome",
}


def test_json_arrays_json_lines_and_single_objects_read_alike(tmp_path):
    array = write(tmp_path, "a.json", json.dumps([FLAT, {**FLAT, "case_id": 8}], indent=1))
    # U+2028 and U+0085 end lines for str.splitlines, not in JSON.
    odd = json.dumps({**FLAT, "target_new": "Ly\u2028o\u0085n"}, ensure_ascii=False)
    lines = write(tmp_path, "a.jsonl", f"\ufeff{json.dumps(FLAT)}\r\n\n{odd.replace('7', '8', 1)}\n")
    single = write(tmp_path, "b.json", json.dumps(FLAT, indent=1))
    read = {path: load_cases("counterfact-easyedit", path=path) for path in (array, lines, single)}
    assert [case.edit.id for case in read[array]] == ["counterfact-easyedit/7", "counterfact-easyedit/8"]
    assert read[lines][0] == read[array][0] == read[single][0]
    assert read[lines][1].edit.target_new == "Ly\u2028o\u0085n"


def test_broken_json_names_file_and_line(tmp_path):
    array = write(tmp_path, "a.json", '[\n {"prompt": "x"},\n {"prompt": }\n]')
    assert f"{array}, line 3, column 13" in refusal(load_cases, "zsre", path=array)
    lines = write(tmp_path, "a.jsonl", json.dumps(FLAT) + "\n\n{oops}\n")
    assert f"{lines}, line 3, column 2" in refusal(load_cases, "zsre", path=lines)
    empty = write(tmp_path, "empty.json", "")
    assert f"{empty}, line 1" in refusal(load_cases, "zsre", path=empty)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"subject": True}, "record 1, field 'subject': expected a non-empty text; got true: put it in quotes"),
        ({"prompt": "  "}, "record 1, field 'prompt': expected a non-empty text"),
        ({"target_new": None}, "record 1, field 'target_new': expected a non-empty text; got null"),
        ({"case_id": 7}, "expected a different id for every edit"),
    ],
)
def test_bad_fields_name_file_record_and_field(tmp_path, change, complaint):
    path = write(tmp_path, "a.json", [FLAT, {**FLAT, "case_id": 8, **change}])
    message = refusal(load_cases, "counterfact-easyedit", path=path)
    assert complaint in message and "a.json" in message


def test_wrong_form_and_nested_fields(tmp_path):
    path = write(tmp_path, "a.json", [FLAT])
    message = refusal(load_cases, "counterfact", path=path)
    assert "record 0, field 'requested_rewrite': expected this field; got 'case_id', 'prompt'" in message
    path = write(tmp_path, "b.json", [{"requested_rewrite": {"target_new": "x"}}])
    assert "field 'requested_rewrite.target_new': expected an object" in refusal(load_cases, "counterfact", path=path)
    path = write(tmp_path, "c.json", [1])
    assert "c.json, record 0: expected an object" in refusal(load_cases, "zsre", path=path)
    record = {"prompt": "Who is X?", "subject": "X", "target_new": "Y", "locality": {"A": [{"prompt": "Q"}]}}
    path = write(tmp_path, "d.json", [record])
    assert "field 'locality.A[0].ground_truth': expected this field" in refusal(load_cases, "wiki_recent", path=path)


def test_missing_and_undecodable_files(tmp_path):
    assert "no such file" in refusal(load_cases, "zsre", path=tmp_path / "none.json")
    latin = tmp_path / "latin.json"
    latin.write_bytes('["é"]'.encode("latin-1"))
    assert "UTF-8" in refusal(load_cases, "zsre", path=latin)


def test_what_publishers_left_blank_is_left_out(tmp_path):
    """zsRE records without a new answer; KnowEdit questions without an answer."""
    zsre = {"subject": "X", "src": "Who is X?", "rephrase": "X?", "answers": [], "loc": "nq", "loc_ans": "a"}
    path = write(tmp_path, "zsre.json", [{**zsre, "alt": ""}, {**zsre, "alt": "Y"}])
    (case,) = load_cases("zsre", path=path)
    assert (case.edit.id, case.edit.target_true) == ("zsre/1", None)
    items = [{"prompt": "P", "ground_truth": [[]]}, {"prompt": "Q", "ground_truth": [[], ["a", "b"], ["a"]]}]
    record = {"prompt": "Who is X?", "subject": "X", "target_new": ["Y", "Why"], "locality": {"Kind": items}}
    (case,) = load_cases("wiki_recent", path=write(tmp_path, "k.json", [record]))
    assert case.edit.target_new == "Y"
    assert case.probes[:-1] == (Probe("Q", ("a", "b"), "locality", "Kind"),)


def test_unke_answers_are_paragraphs_asked_again_part_by_part(tmp_path):
    record = {
        "id": 7,
        "question": "Who was Zoë?",
        "para_question": "And Zoë?",
        "answer": "A painter. In Lima.",
    }
    parts = {"sub_question": ["What did she do?", "Where?"], "sub_answer": ["She painted.", "In Lima."]}
    (case,) = load_cases("unke", path=write(tmp_path, "unke.json", [record | parts]))
    assert (case.edit.prompt, case.edit.subject, case.edit.id) == ("Who was Zoë?", None, "unke/7")
    assert tuple(probe for probe in case.probes if probe.kind != "locality") == (
        Probe("And Zoë?", ("A painter. In Lima.",), "generalization", "rephrase"),
        Probe("What did she do?", ("She painted.",), "portability", "sub_question"),
        Probe("Where?", ("In Lima.",), "portability", "sub_question"),
    )
    fewer = [record | parts | {"sub_answer": ["She painted."]}]
    assert "record 0, field 'sub_answer': expected 2 texts" in refusal(
        load_cases, "unke", path=write(tmp_path, "fewer.json", fewer)
    )
    assert "no sample of this data set is bundled" in refusal(load_cases, "unke")


def test_a_blank_knowedit_target_is_refused(tmp_path):
    path = write(tmp_path, "k.json", [{"prompt": "Who is X?", "subject": "X", "target_new": [" "]}])
    assert "record 0, field 'target_new': expected a non-empty text" in refusal(load_cases, "wiki_recent", path=path)


def test_zsre_with_portability(tmp_path):
    record = {"subject": "X", "src": "Who is X?", "alt": "Y", "answers": ["Z"], "rephrase": "X?", "loc": "nq"}
    record |= {"loc_ans": "a", "portability": {"New Question": "Whose son is X?", "New Answer": "W"}}
    (case,) = load_cases("zsre", path=write(tmp_path, "zsre.json", [record]))
    assert case.probes[-1] == Probe("Whose son is X?", ("W",), "portability", "one_hop")


@pytest.mark.parametrize(
    "prompt, subject, expected",
    [
        ("Who made Ernie?", "Ernie", ("Who made {}?", "Ernie")),
        ("i want this", "i", ("{} want this", "i")),  # not the i of "this"
        ("about rick mahler. Rick Mahler was", "rick mahler", ("about {}. Rick Mahler was", "rick mahler")),
        ("the CAPITAL of", "capital", ("the {} of", "CAPITAL")),  # the prompt's own spelling
        ("Ernie, whom Ernie loved", "Ernie", ("Ernie, whom {} loved", "Ernie")),
        ("東京タワーの高さ", "東京", ("{}タワーの高さ", "東京")),
        ("C++ (1985) is", "C++", ("{} (1985) is", "C++")),
        ("who wrote it?", "Hamlet", ("who wrote it?", None)),
        ("who wrote {}?", "Hamlet", ("who wrote {}?", "Hamlet")),
        ("{}的作者是", "哈姆雷特", ("{}的作者是", "哈姆雷特")),
        ("what is {} in Python?", "Python", ("what is {} in Python?", None)),  # which of the two is meant?
        ("from {} to {}", "Rome", ("from {} to {}", None)),
    ],
)
def test_place_subject(prompt, subject, expected):
    assert place_subject(prompt, subject) == expected


# --- hub ----------------------------------------------------------------------------------------------


def test_hub_addresses(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(write(tmp_path, "a.json", [FLAT]))

    listing = ["README.md", "data.json"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: listing)
    load_cases("counterfact-easyedit", path="hub:me/set:a/b.json")
    load_cases("counterfact-easyedit", path="hub:me/set")
    assert asked == [("me/set", "a/b.json", "dataset"), ("me/set", "data.json", "dataset")]
    listing.append("more.jsonl")
    assert "data.json, more.jsonl" in refusal(load_cases, "zsre", path="hub:me/set")

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert "got 'no route': check" in refusal(load_cases, "zsre", path="hub:me/set:a.json")


def test_hub_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"reknow\[hub\]"):
        download("hub:me/set:a.json")


# --- users' edit files --------------------------------------------------------------------------------


def test_edits_of_json_and_csv_are_the_same(tmp_path):
    entries = [
        {"prompt": "The capital of {France} is", "target_new": "Lyon", "id": 1},
        {"prompt": "{} lies in", "subject": "Rome", "target_new": "Gaul", "target_true": "Italy"},
        {
            "prompt": "Who, then, is Ada?",
            "subject": "Ada",
            "target_new": 'a "queen"',
            "rephrasings": ["Who is {}?", "{} is"],
        },
    ]
    table = (
        "\ufeffprompt;subject ;target_new;target_true;id;rephrasings\r\n"
        "The capital of {France} is;;Lyon;;1;\r\n"
        "{} lies in;Rome;Gaul;Italy;;\r\n\r\n"
        'Who, then, is Ada?;Ada;"a ""queen""";;;Who is {}? | {} is\r\n'
    )
    read = load_edits(write(tmp_path, "a.json", entries))
    assert [edit.text for edit in read] == ["The capital of France is", "Rome lies in", "Who, then, is Ada?"]
    assert [edit.subject for edit in read] == ["France", "Rome", "Ada"]
    assert read[0].id == "1" and read[2].rephrasings == ("Who is {}?", "{} is")
    lines = "\n".join(map(json.dumps, entries))
    assert load_edits(write(tmp_path, "a.jsonl", lines)) == read
    assert load_edits(write(tmp_path, "a.csv", table)) == read


def test_a_subject_may_be_marked_and_given(tmp_path):
    entry = {"prompt": "The capital of {France} is", "subject": "France", "target_new": "Lyon"}
    assert load_edits(write(tmp_path, "a.json", entry))[0].text == "The capital of France is"


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("prompt,targetnew\nx,y\n", "line 2: unknown field 'targetnew'. Did you mean 'target_new'?"),
        ("prompt,subject\nx,y\n", "line 2, field 'target_new': expected this field; got 'prompt', 'subject'"),
        ("prompt,target_new\na,b\nOne, two,x\n", "line 3: expected 2 cells; got 3"),
        ("prompt,target_new\n", "expected at least one edit"),
        ("prompt,subject,target_new\nA is,B,c\n", "line 2: expected the subject 'B' once in the prompt"),
        ("prompt,target_new\nA {} is,c\n", "line 2: expected one subject in braces"),
        ("id,prompt,target_new\n1,a,b\n1,c,d\n", "expected a different id for every edit"),
        ('prompt,target_new\na,"b\nc,d\n', "line 3: expected a CSV row"),  # the rest would be one answer
        (f'prompt,target_new\na,"b{"x" * 200_000}"\n', "line 2: expected a CSV row"),
    ],
    ids=lambda text: text[:30],
)
def test_faults_of_csv_edits(tmp_path, content, complaint):
    assert complaint in refusal(load_edits, write(tmp_path, "mine.csv", content))


def test_faults_of_json_edits(tmp_path):
    path = write(tmp_path, "mine.json", [{"prompt": "a", "target_new": False}])
    assert "mine.json, record 0, field 'target_new': expected a non-empty text; got false" in refusal(
        load_edits, path
    )
    path = write(tmp_path, "more.json", [{"prompt": "a", "target_new": "b", "rephrasings": [{}]}])
    assert "field 'rephrasings': expected a text or a list of texts" in refusal(load_edits, path)


# --- licences -----------------------------------------------------------------------------------------


def test_notice_names_every_sample():
    root = Path(__file__).parents[2]
    notice = (root / "NOTICE").read_text("utf-8")
    samples = list((root / "src/reknow/assets/data").iterdir())
    assert len(samples) == 13
    assert [path.name for path in samples if path.name not in notice] == []
    assert sum(path.stat().st_size for path in samples) < 4_000_000


# ---- general text


def test_a_text_source_streams_paragraphs_lines_and_folders(tmp_path):
    plain, records = tmp_path / "b.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n two\n\n\nthree\n" + "x" * 9000, encoding="utf-8")
    records.write_text('{"text": "first"}\n{"text": "second"}\n', encoding="utf-8")
    assert list(text_source(records).texts()) == ["first", "second"]
    paragraphs = list(text_source(plain).texts())
    assert paragraphs[0] == "one two" and [len(part) for part in paragraphs[1:]] == [4000, 4000, 1006]
    whole = text_source(tmp_path)
    assert list(whole.texts()) == ["first", "second", *paragraphs] == list(whole.texts())
    assert list(text_source(None).texts()) == sample_text()


def test_a_text_source_s_digest_is_that_of_its_content(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one", encoding="utf-8")
    first = text_source(file).digest
    file.write_text("two!", encoding="utf-8")
    second = text_source(file).digest
    file.write_text("one", encoding="utf-8")
    assert first == text_source(file).digest != second
    assert text_source(["a", "b"]).digest != text_source(["a\nb"]).digest != text_source().digest


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", None, "there is none"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("a.jsonl", b'{"txt": "a"}', "field 'text' in .*line 1"),
        ("a.jsonl", b"{", "UTF-8 text"),
    ],
)
def test_a_text_source_that_cannot_be_read_is_refused(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        list(text_source(tmp_path / name).texts())
    with pytest.raises(InputError, match="there is none"):
        text_source(tmp_path / "nowhere")


def test_an_error_of_the_hub_without_words_is_named(monkeypatch):
    def fails(name):
        raise TimeoutError

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(dataset_info=fails))
    assert "got 'TimeoutError'" in refusal(text_source, "hub:me/set")


def test_a_data_set_is_streamed_by_datasets(tmp_path, monkeypatch):
    """The hub itself is out of reach: the revision is given here, and the library reads a folder instead."""
    pytest.importorskip("datasets", minversion="3")  # not the folder of these tests
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "train.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n', encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="check name, configuration"):
        text_source("hub:nobody/nothing")
    monkeypatch.setattr(hub, "dataset_info", lambda name: SimpleNamespace(sha="abc"))
    source = text_source(f"hub:{tmp_path}")
    assert list(source.texts()) == ["first", "second"] == list(source.texts())
    monkeypatch.setattr(hub, "dataset_info", lambda name: SimpleNamespace(sha="def"))
    assert text_source(f"hub:{tmp_path}").digest != source.digest


def test_a_text_is_no_list_of_texts():
    """Its characters would be five answers."""
    with pytest.raises(InputError, match="'answers' must be a list of texts; got 'Paris'"):
        Probe("The capital of France is", "Paris", "locality", "neighborhood")  # type: ignore[arg-type]
    for wrong in ("Lima", 5, [5]):
        with pytest.raises(InputError, match="'rephrasings' must be a list of texts"):
            Edit("The capital of {} is", subject="Peru", target_new="Lima", rephrasings=wrong)  # type: ignore[arg-type]
