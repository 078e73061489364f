"""Tables as text for people, for spreadsheets and for papers."""

from __future__ import annotations

from reknow.texts.tables import escape_latex, to_latex


def test_latex_prints_what_was_written():
    assert escape_latex(r"a_b & 50 % of #1 {x} ~^ C:\d <b> | 1–2") == (
        r"a\_b \& 50 \% of \#1 \{x\} \textasciitilde{}\textasciicircum{} C:\textbackslash{}d "
        r"\textless{}b\textgreater{} \textbar{} 1--2"
    )
    assert escape_latex("$x$\n\\end{tabular}") == r"\$x\$ \textbackslash{}end\{tabular\}"
    assert escape_latex("[0, 1]") == "{}[0, 1]", "else the line's end before it would take it for its own"


def test_a_table_of_latex():
    lines = [["method", "read", "cases", "new_answer"], ["ft & co", "before", "3", "50.0 [0.0, 100.0]"]]
    assert to_latex(lines, "Free generation, %").splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{Free generation, \%}",
        r"\begin{tabular}{llrr}",
        r"\toprule",
        r"method & read & cases & new\_answer \\",
        r"\midrule",
        r"ft \& co & before & 3 & 50.0 [0.0, 100.0] \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
