"""What a word is in any script, and what written answers, overlaps and entropies make of it."""

from __future__ import annotations

import math
import unicodedata

import pytest

from reknow.evaluation.long_text import rouge, token_f1
from reknow.evaluation.metrics import (
    LONG_ANSWER,
    case_metrics,
    generated,
    ngram_entropy,
    text_words,
    unchanged_generated,
)
from reknow.evaluation.readings import Reading
from reknow.texts.writing import clip, pieces, words


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("上海。", "上海", 1),
        ("上海，是", "上海", 1),
        ("「東京」です", "東京", 1),
        ("東京都", "京都", 0),
        ("กรุงเทพมหานคร", "กรุงเทพ", 1),
        ("กี", "ก", 0),  # a vowel sign belongs to its consonant
        ("서울, 한국", "서울", 1),
        ("서울특별시", "서울", 0),  # Korean has spaces
        ("iPhone手机", "iPhone", 1),
        ("हिन्दी भाषा", "हिन्दी", 1),
        ("हिन्दीवाला", "हिन्दी", 0),
        ("مرحبا، أهلا", "مرحبا", 1),
        ("¿Qué?", "qué", 1),
        ("London—the", "London", 1),
        ("Paris·Lyon", "Paris", 1),
        ("**Paris**", "Paris", 1),
        ("35", "3.5", 0),
        ("3.5 m", "3.5", 1),
        ("2.0", "2", 0),
        ("5.", "5", 1),
        ("5", "-5", 0),
        ("-5 degrees", "−5", 1),
        ("-5", "5", 0),
        ("1914-1918", "1914", 1),
        ("1,000 men", "1000", 1),
        ("10:30", "10", 0),
        ("½ of it", "1/2", 1),
        ("25", "2", 0),
        ("3rd", "3", 0),
        ("5% of", "5%", 1),
        ("5", "5%", 0),
        ("C++ and", "C", 0),
        ("C# is", "C", 0),
        ("C++.", "C++", 1),
        ("AT&T Inc.", "AT", 0),
        ("AT&T, the", "AT&T", 1),
        ("O'Brien", "O", 0),
        ("O’Brien said", "O'Brien", 1),
        ("Node.js", "Node", 0),
        ("U.S. Steel", "US", 1),
        (unicodedata.normalize("NFD", "Zoë Übel"), "Zoë", 1),
        ("Ｐａｒｉｓ", "Paris", 1),
    ],
)
def test_an_answer_is_written_where_its_last_word_ends(text, answer, right):
    assert generated(text, [answer]) == right


def test_words_and_pieces():
    assert words("The U.S. has 1,234.5 C++-users, O’Brien’s 上海") == [
        *("the", "us", "has", "1234.5", "c++", "users", "obriens", "上", "海")
    ]
    assert pieces("The (big) 上海。") == ["The", "(big)", "上", "海", "。"]
    assert clip("one  two three", 2) == "one two …" and clip("one\ntwo", 2) == "one two"
    assert clip("上海是中国", 3) == "上海是 …"


def test_overlap_counts_characters_where_no_spaces_are():
    ours, theirs = "上海是中国最大的城市之一", "上海是中国最大城市之一"
    assert token_f1(ours, theirs) == rouge(ours, theirs)["rouge_l"] == pytest.approx(22 / 23)
    assert token_f1("ไทย", "ลาว") < token_f1("ไทยลาว", "ลาว") < 1
    assert token_f1("It is 3.5 m", "It is 35 m") == pytest.approx(3 / 4)
    assert token_f1("हिन्दी भाषा", "हिन्दी") == pytest.approx(2 / 3)


def test_entropy_counts_characters_where_no_spaces_are():
    assert text_words("中国是हिन्दी. It's") == ["中", "国", "是", "हिन्दी", ".", "It", "'s"]
    # bigrams 我是 是我 我是 是我 我是: 3/5, 2/5; trigrams 1/2, 1/2
    h2 = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert ngram_entropy("我是我是我是") == pytest.approx((2 / 3 * h2 + 4 / 3) / 2)


def test_a_long_answer_is_long_in_any_script():
    def keys(answer: str) -> bool:
        one = Reading("reliability", "rewrite", "a", (answer,), (True,), (1,), 0.5, text=answer)
        return "token_f1@written" in case_metrics([one])

    assert keys("上海是中国最大的城市之一") and not keys("上海是中国城市")
    assert keys(" ".join("abcdefghij")) and not keys(" ".join("abcdefghi")) and LONG_ANSWER == 10


def test_an_answer_is_as_before_where_its_words_are():
    assert unchanged_generated("上海，是", "上海。", ["北京"]) == 1
    assert unchanged_generated("上海市", "上街", ["北京"]) == 0
    assert unchanged_generated("3.5 m", "35 m", ["7"]) == 0
