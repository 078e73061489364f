"""The Python in README and tour runs as written, and the map of the architecture is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def snippets(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["README.md", "docs/tour.md"])
def test_the_python_of_a_page_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    code = snippets(file, "python")
    assert code
    for part in code:
        exec(compile(part, file, "exec"), scope)


def test_the_map_is_true():
    (tree,) = (text for text in snippets("docs/architecture.md", "text") if text.startswith("src/reknow/"))
    folders: dict[int, str] = {}  # by indent
    named = set()
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        parent = "".join(folder for depth, folder in folders.items() if depth < indent)
        name = line.split()[0]
        named.add(parent + name)
        folders = {depth: folder for depth, folder in folders.items() if depth < indent}
        if name.endswith("/"):
            folders[indent] = name
    assert not {name for name in named if not (ROOT / name).exists()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "src/reknow").glob("*.py")} - named <= {
        "src/reknow/__init__.py"
    }


def test_every_public_name_is_there():
    import reknow

    for name in reknow.__all__:
        assert getattr(reknow, name) is not None


@pytest.mark.parametrize("page", ["docs/architecture.md"])
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"`((?:src/|tests/|docs/|scripts/)?[a-z_]+/[a-z_/]+\.(?:py|md))`", (ROOT / page).read_text(encoding="utf-8")
    )
    assert named and not [
        name for name in named if not (ROOT / name).exists() and not (ROOT / "src/reknow" / name).exists()
    ]


def test_every_claim_has_its_line_and_a_study_that_is_there():
    from reknow.studies.articles import ARTICLES
    from reknow.studies.instructedit.editors import STUDIES

    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| \d.*$", page, re.MULTILINE)
    ]
    assert [int(number) for number, *_ in lines] == list(range(1, len(lines) + 1))
    assert all(len(line) == 7 and all(line) for line in lines)
    assert {verdict.partition(":")[0].split()[0].strip(",") for *_, verdict, _ in lines} == {
        "yes",
        "partly",
        "no",
        "open",
    }
    named = set(re.findall(r"`study ([a-z-]+)`", page)) - {"NAME"}
    assert named and named <= {"tracing", "domains", "gradients", *ARTICLES, *STUDIES}


OTHERS = """
AutoProcessor Reasoning Relation_Specificity Subject_Aliasing attribute_prompts compute_n_gram_entropy
eval_utils_counterfact final_data_v2 locality_ground_truth new_answer_alias portability_ground_truth pred print_kl py
WikiUpdate editevery locality_question mhop_ans no_question output_MODEL popular
question_2hop question_6hop summarize test_prediction_acc word_tokenize yes_question
NUMBER PATH
"""
"""What docstrings name of other people's code and files, and two words that stand for something."""


def test_names_in_docstrings_are_there():
    source, known, docstrings = ROOT / "src/reknow", set(OTHERS.split()), []
    for path in source.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known |= set(path.relative_to(source).with_suffix("").parts)
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            match node:
                case ast.Constant(value=str(text)) if id(node) in documentation:
                    docstrings.append((f"{path.relative_to(source)}:{node.lineno}", text))
                case ast.Constant(value=str(text)):  # values of settings, fields of files
                    known |= set(re.findall(r"\w+", text))
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                    known.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    known.add(name)
                case ast.alias(name=name):
                    known |= set(name.split("."))
    named = [(place, name) for place, text in docstrings for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", text)]
    assert len(named) > 300
    assert not [f"{place} `{name}`" for place, name in named if not known.issuperset(name.split("."))]
