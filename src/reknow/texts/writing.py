"""How texts are written, in any script: what stands between two of them, and what their words are.

Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan set no space between words; Korean does.
"""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = (
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese and its neighbours
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u2e80-\u312f\u3190-\u33ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # radicals, marks, kana, Bopomofo, Han
    "\uff01-\uff9f\uffe0-\uffe6"  # full-width forms, half-width kana
    "\U0001b000-\U0001b16f\U00020000-\U000323af"  # old kana, rare Han
)
"""Ranges of characters, marks included, of scripts without spaces."""
_ENDS_UNSPACED, _BEGINS_UNSPACED = re.compile(rf"[{_UNSPACED}][^\w\s]*$"), re.compile(rf"[^\w\s]*[{_UNSPACED}]")
_CHARACTERS, _WORDS = re.compile(rf"[{_UNSPACED}]"), re.compile(rf"[^\W\d_{_UNSPACED}]+")
_ASIDE = re.compile(r"\s*\([^()]*\)$")
_ELIDED = re.compile(r"(?<![\w'‘’])([^\W\d]|\w*[^\W\dsxz])['’]$", re.IGNORECASE)
"""A word that lost its end before another: l', dell', O'; but not the plural's Beatles'."""
_FULL_STOPS = {"\u1000-\u109f": "။", "\u1780-\u17ff": "។", "\u0f00-\u0fff": "།", "\u0e00-\u0eff": "", _UNSPACED: "。"}
"""What ends a sentence whose last character is in a range, the first range that has it."""


CONTINUED, SPOKEN = 30, 256
"""Tokens at most of a text that is continued, and of an answer in a conversation, where nobody says how many."""


def separator_between(before: str, after: str) -> str:
    """What a writer sets between two texts that follow each other: a space, or nothing.

    Nothing stands behind a script without spaces, within a text that is mostly in one, behind an opening mark, or
    where a text brings its own space. A Chinese word in an English text has its space.
    """
    if after[:1].isspace() or before[-1:].isspace():
        return ""
    if _ENDS_UNSPACED.search(_ASIDE.sub("", before)):
        return ""
    if _BEGINS_UNSPACED.match(after) and len(_CHARACTERS.findall(before)) >= len(_WORDS.findall(before)):
        return ""
    return "" if before and _opens(before[:-1], before[-1], after) else " "


def join_texts(before: str, after: str) -> str:
    """Both texts with what belongs between them, in place of the spaces that end the first."""
    before = before.rstrip(" ")
    return before + separator_between(before, after) + after if before else after


def prepend(prefix: str, text: str) -> str:
    """The text behind sentences that lead to it; in a script without spaces it keeps the tokens that it has alone."""
    return prefix.rstrip(" ") + text if _BEGINS_UNSPACED.match(text) else join_texts(prefix, text)


def full_stop(sentence: str) -> str:
    """The mark that ends the sentence."""
    return next((stop for last, stop in _FULL_STOPS.items() if re.search(rf"[{last}]$", sentence)), ".")


def _opens(before: str, mark: str, after: str) -> bool:
    """Whether a mark leans on what follows it; many tell by what stands in front of them."""
    kind, number = unicodedata.category(mark), before.rstrip()[-1:].isdigit()
    # Whether nothing stands in front that the mark could close.
    free = not before or before[-1].isspace() or _opens(before[:-1], before[-1], mark)
    if kind == "Ps" or mark in "¿¡@/\\":  # brackets and low quotation marks
        return True
    if kind == "Sc":
        return not number  # $ 5, but 5 $
    if mark in "'’" and not free:
        return bool(_ELIDED.search(before + mark))
    if kind in ("Pi", "Pf") or mark in "\"'`*_#":  # « and “ open in one language and close in another
        return free
    if (kind == "Pd" or mark in "=&") and not free:
        return True  # Jean-, London–, AT&
    return mark in "-–+−±~≈" and free and after[:1].isdigit() and not number  # a number's sign


# ---- words

_SAME = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "−": "-", "⁄": "/", "_": None})
_WORD = re.compile(
    r"cm*"  # a character of a script without spaces, with its marks
    r"|(?:(?<![wdc)\]])-(?=d))?"  # a number's minus
    r"[wd]+(?:(?:[&@*$+#.']|(?<=d)[,:/](?=d))[wd]+)*(?:\+\+|[+#](?![wd]))?"  # 3.5, 1/2, 10:30, AT&T, O'Brien, C++, C#
    r"|%"
)
"""A word in the shape of a text, see `_shape`."""
_PIECE = re.compile(r"cm*|[^c\s]+")
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)")
_SILENT = re.compile(r"(?<!\d)[.']|[.'](?!\d)")  # U.S. is US, O'Brien is OBrien; 3.5 is not 35


def words(text: str) -> list[str]:
    """The text's words in one spelling: lower case, without punctuation, whatever the script.

    Hyphens and slashes part words; signs that belong to a number or to a name stay with it: "3.5", "-5", "1/2",
    "AT&T", "C++". In a script without spaces every character is a word.
    """
    text = unicodedata.normalize("NFKC", text).casefold().translate(_SAME)
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return [_SILENT.sub("", text[slice(*span)]) for span in word_spans(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a text stand: (first character, the one behind the last); words are those of `words`."""
    return [match.span() for match in _WORD.finditer(_shape(text))]


def pieces(text: str) -> list[str]:
    """What blanks part, and in scripts without spaces each character with its marks."""
    return [text[slice(*span)] for span in piece_spans(text)]


def piece_spans(text: str) -> list[tuple[int, int]]:
    """Where the pieces of a text stand: (first character, the one behind the last); they are those of `pieces`."""
    return [match.span() for match in _PIECE.finditer(_shape(text))]


def counted(number: int, one: str, many: str) -> str:
    """The number with the word for so many."""
    return f"{number} {one if number == 1 else many}"


def clip(text: str, count: int) -> str:
    """The text up to so many pieces, on one line."""
    ends = [end for _, end in piece_spans(text)]
    return " ".join(text.split()) if len(ends) <= count else " ".join(text[: ends[count - 1]].split()) + " …"


def _shape(text: str) -> str:
    """The text with a letter for the kind of each character: c of a script without spaces, m a mark on such a one, d
    a digit, w another letter or number, or a mark on it; spaces and punctuation as they are. As long as the text."""
    kinds: list[str] = []
    for character in text:
        kind = _kind(character)
        if kind == "m" and not (kinds and kinds[-1] in "cm"):
            kind = "w"
        kinds.append(kind)
    return "".join(kinds)


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] == "M":
        return "m"
    if category == "Nd":
        return "d"
    if category[0] in "LN":
        return "c" if _CHARACTERS.match(character) else "w"
    return character


# ---- the same text in other characters

_ALIKE = str.maketrans({**{c: "'" for c in "’‘ʼ´"}, **{c: '"' for c in "“”„«»"}, **{c: "-" for c in "‐‑–−"}})


def normalize(text: str) -> str:
    """The text in one Unicode form and without spaces around it, so that equal texts compare equal."""
    return unicodedata.normalize("NFC", text).strip()


def find_all(text: str, wanted: str) -> list[tuple[int, int]]:
    """Where a text holds another one: (first character, the one behind the last).

    Where it is not there letter for letter, Unicode's forms of a character count as the same, and so do typographic
    and plain quotation marks, hyphens and spaces.
    """
    if exact := [matches.span() for matches in re.finditer(re.escape(wanted), text)]:
        return exact
    folded, spans = _fold(text)
    sought, _ = _fold(wanted)
    matches = [at.span() for at in re.finditer(re.escape(sought), folded)] if sought else []
    whole = [None, *spans, None]  # a character that became several is found whole or not at all
    return [
        (spans[start][0], spans[end - 1][1])
        for start, end in matches
        if whole[start] != whole[start + 1] and whole[end] != whole[end + 1]
    ]


def explain_difference(text: str, wanted: str) -> str:
    """What keeps a text from holding another one, where it is hard to see: one character that looks like another."""
    windows = [text[start : start + len(wanted)] for start in range(max(0, len(text) - len(wanted) + 1))]
    same = [sum(a == b for a, b in zip(window, wanted, strict=True)) for window in windows]
    if not windows or max(same) < len(wanted) / 2:
        return ""
    nearest = windows[same.index(max(same))]
    there, here = next((a, b) for a, b in zip(nearest, wanted, strict=True) if a != b)
    return "" if (there + here).isascii() else f" ({_describe(there)} there, {_describe(here)} in the subject)"


def _describe(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()


def _fold(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text in one form of its characters, and for each of these where it comes from."""
    same_form: list[str] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for end in range(1, len(text) + 1):
        if end < len(text) and _composes(text[start:end], text[end]):
            continue
        same = "".join(c for c in unicodedata.normalize("NFKC", text[start:end]) if unicodedata.category(c) != "Cf")
        same_form += same.translate(_ALIKE)
        spans += [(start, end)] * len(same)
        start = end
    return "".join(same_form), spans


def _composes(before: str, character: str) -> bool:
    """Whether a character is no letter by itself behind others: an accent, or a part of a Hangul syllable."""
    apart = unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", character)
    return unicodedata.combining(character) > 0 or unicodedata.normalize("NFC", before + character) != apart
