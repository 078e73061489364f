"""HalluEditBench: rows of its tables."""

from __future__ import annotations

from reknow import load_cases

HEADER = (
    "topic,subject,relation,object,question,output_some_model,eval_some_model,multiple_choices,paraphrased_question,"
    "multiple_choice_with_letters,multiple_choice_labels,yes_question,no_question,locality_question,"
    "reversed_relation_question,question_2hop,answer_2hop,question_3hop,answer_3hop"
)
ROW = (
    "moors,Moorland,founded by,Ada Moor,Who was Moorland founded by?,Cy,0.0,\"['Ada Moor', 'Cy']\",Who founded it?,"
    "A. Cy  B. Ada Moor,B,Was Moorland founded by Ada Moor?,Was Moorland founded by Cy?,Where does Moorland lie?,"
    "What did Ada Moor found?,Where was its founder born?,Lima,,"
)


def test_a_row_is_an_edit_and_its_questions(tmp_path):
    path = tmp_path / "moors.csv"
    path.write_text(f"{HEADER}\n{ROW}\n")
    (case,) = load_cases(path=path)
    edit = case.edit
    assert (edit.prompt, edit.subject, edit.id) == ("Who was {} founded by?", "Moorland", "halluedit/0")
    assert (edit.target_new, edit.target_true) == ("Ada Moor", "Cy")
    assert [(probe.kind, probe.name, probe.prompt, probe.answers[0]) for probe in case.probes] == [
        ("generalization", "rephrase", "Who founded it?", "Ada Moor"),
        ("portability", "2hop", "Where was its founder born?", "Lima"),
        ("portability", "reversed", "What did Ada Moor found?", "Moorland"),
        ("portability", "yes", "Was Moorland founded by Ada Moor?", "Yes"),
        ("portability", "no", "Was Moorland founded by Cy?", "No"),
        ("portability", "multiple_choice", "Who was Moorland founded by? A. Cy  B. Ada Moor", "B"),
    ]
