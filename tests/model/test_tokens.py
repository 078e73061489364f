"""Where prompt, subject and target sit among the tokens of every common kind of tokenizer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from families import TEXT, tiny_tokenizer
from reknow.errors import InputError, ModelError
from reknow.model.tokens import EncodedText, Text, encode, pad
from reknow.texts.writing import separator_between


def byte_level(*, trim: bool = False):
    """GPT-2's kind; `trim` reports offsets without the leading space, as RoBERTa's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    return tokenizer


def closed_byte_level():
    """Puts <s> in front of every text and </s> behind it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def llama_like(*, legacy: bool):
    """Sentencepiece's BPE with bytes for unknown characters; `legacy` writes ▁ in a normalizer, as Llama 2 does."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>", "<unk>", *bytes_], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    if legacy:
        backend.pre_tokenizer = None  # type: ignore[assignment]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram():
    """T5's and XLNet's kind; here without a beginning, and with an end, of text."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece():
    """BERT's kind: lower case, accents stripped, [CLS] and [SEP] around the text."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, trimmed": byte_level(trim=True),
    "byte-level, bos": tiny_tokenizer(bos=True),
    "byte-level, bos and eos": closed_byte_level(),
    "metaspace, bos": llama_like(legacy=False),
    "legacy metaspace, bos": llama_like(legacy=True),
    "unigram, eos": unigram(),
    "wordpiece, cls and sep": wordpiece(),
}
EXACT = [name for name in TOKENIZERS if name not in ("unigram, eos", "wordpiece, cls and sep")]
"""Those whose tokens spell the text byte for byte."""


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def one(tokenizer, text: Text, **options) -> EncodedText:
    return encode(tokenizer, [text], **options)[0]


def spelling(tokenizer, token: int) -> bytes:
    """The bytes that a token stands for, read from its name in the vocabulary; special tokens stand for none."""
    if token in tokenizer.all_special_ids:
        return b""
    name = tokenizer.convert_ids_to_tokens(token)
    if name.startswith("<0x"):
        return bytes([int(name[3:5], 16)])
    if "Metaspace" in repr(tokenizer.backend_tokenizer.pre_tokenizer) or tokenizer.backend_tokenizer.normalizer:
        return name.replace("▁", " ").encode()
    return bytes(byte_of(character) for character in name)


def byte_of(character: str) -> int:
    """Inverse of GPT-2's table: printable Latin-1 characters are themselves, the others count on from 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return ord(character) if ord(character) < 256 else others[ord(character) - 256]


def parts(tokenizer, row: EncodedText) -> tuple[bytes, bytes, bytes]:
    """(bytes up to the subject's last token, of the whole prompt, of the target)."""
    spell = [spelling(tokenizer, token) for token in row.ids]
    upto = b"".join(spell[: row.subject_last + 1]) if row.subject_last is not None else b""
    return upto, b"".join(spell[: row.prompt_length]), b"".join(spell[row.prompt_length :])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("template", "subject", "target"),
    [
        ("The mother tongue of {} is", "Danielle Darrieux", "English"),  # several tokens
        ("{} lives in", "Danielle Darrieux", "São Paulo"),  # at the start; a target of several words
        ("The capital of", "", "Lima"),  # no subject
        ("The owner of {}", "Beats Music", "Apple"),  # at the end
        ("Paris is to Paris as {} is to", "Paris", "France"),  # its name stands there twice before
        ("I know {}, and {0}", "Paris", "too"),
        ("{}の母語は", "日本語", "英語"),  # no spaces, characters of several tokens
        ("{} speaks", "Zoe\u0308 U\u0308bel", "e\u0301"),  # combining characters
        ("{} 🙂👩‍👧 says", "👩‍👧", "🙂"),
        ("Where is {}?\n", "the Eiffel Tower", "Paris"),  # the prompt ends in a line break
        ("\tQ: {}  \nA:", "Peru ", "Lima"),  # runs of spaces, a subject with a trailing space
    ],
)
def test_parts_spell_what_they_name(name, template, subject, target):
    tokenizer = TOKENIZERS[name]
    text = Text.of(template, subject, target, prefix="Well. ") if subject else Text(template, target)
    row = one(tokenizer, text)
    upto, prompt, answer = parts(tokenizer, row)
    extra = b" " if prompt[:1] == b" " else b""  # metaspace writes a space in front of the first word
    space = separator_between(text.prompt, target)
    assert prompt == extra + text.prompt.encode()
    assert answer == (space + target).encode()
    if subject:
        end = len(extra + text.prompt[: text.subject[1]].rstrip().encode())
        assert len(upto) - len(spelling(tokenizer, row.ids[row.subject_last])) < end <= len(upto)


WORDS = st.lists(
    st.text(alphabet="aPrs.,'éÜß日本🙂\u0301", min_size=1, max_size=6).filter(lambda w: w.strip()),
    min_size=1,
    max_size=3,
).map(" ".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.sampled_from(EXACT), before=WORDS, subject=WORDS, after=WORDS, target=WORDS, glued=st.booleans())
def test_any_text_is_cut_at_its_characters(name, before, subject, after, target, glued):
    """No byte of the answer is in the prompt, and the subject's last token holds the subject's last byte."""
    tokenizer = TOKENIZERS[name]
    gap = "" if glued else " "
    text = Text.of(f"{before}{gap}{{}}{gap}{after}", subject, target)
    row = one(tokenizer, text)
    upto, prompt, answer = parts(tokenizer, row)
    extra = b" " if prompt[:1] == b" " else b""
    assert prompt == extra + text.prompt.encode()
    assert answer == f"{separator_between(text.prompt, target)}{target}".encode()
    end = len(extra + text.prompt[: text.subject[1]].encode())
    assert len(upto) - len(spelling(tokenizer, row.ids[row.subject_last])) < end <= len(upto)


def test_all_kinds_agree_on_plain_words(tokenizer):
    row = one(tokenizer, Text.of("The capital of {} is", "Peru", "Lima"))
    tokens = [tokenizer.decode([token]).strip() for token in row.ids]
    joined = "".join(token.removeprefix("##") for token in tokens[row.prompt_length :])
    assert joined.lower() == "lima"
    last = "".join(token.removeprefix("##") for token in tokens[: row.subject_last + 1])
    assert last.lower().removeprefix("<s>").removeprefix("[cls]") == "thecapitalofperu"


def test_a_space_that_ends_the_prompt_belongs_to_the_answer(tokenizer):
    spaced, bare = encode(
        tokenizer, [Text("The capital of Peru is ", "Lima"), Text("The capital of Peru is", "Lima")]
    )
    assert spaced == bare


def test_a_space_before_the_answer_is_not_doubled(tokenizer):
    assert one(tokenizer, Text("Peru is", " Lima")) == one(tokenizer, Text("Peru is", "Lima"))


def test_without_an_answer_the_prompt_is_all(tokenizer):
    row = one(tokenizer, Text("The capital of Peru is"))
    assert row.prompt_length == len(row.ids) and row.target_ids == ()
    full = one(tokenizer, Text("The capital of Peru is", "Lima"))
    assert full.ids[: full.prompt_length] == row.ids


def test_an_end_token_never_stands_behind_the_text(tokenizer):
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    assert one(tokenizer, Text("The capital of Peru is")).ids[-1] not in ends
    assert one(tokenizer, Text("The capital of Peru is", "Lima")).ids[-1] not in ends


def test_an_empty_prompt_has_a_token_to_continue_from(tokenizer):
    row = one(tokenizer, Text(""))
    assert len(row.ids) == 1 and row.prompt_length == 1
    assert row.ids[0] in tokenizer.all_special_ids


def test_an_answer_behind_nothing_needs_a_beginning_token(tokenizer):
    if tokenizer("")["input_ids"][:1] in ([], [tokenizer.eos_token_id]):
        with pytest.raises(InputError, match="write a prompt"):
            one(tokenizer, Text("", "Lima"))
    else:
        assert one(tokenizer, Text("", "Lima")).prompt_length == 1


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(InputError, match="at least one token"):
        one(TOKENIZERS["wordpiece, cls and sep"], Text("Peru is", " "))


def test_a_subject_without_tokens_is_refused():
    with pytest.raises(InputError, match="subject"):
        one(TOKENIZERS["wordpiece, cls and sep"], Text.of("{} is", "\u200d"))


def test_texts_are_encoded_alike_alone_and_together(tokenizer):
    texts = [Text("The capital of Peru is", "Lima"), Text("Paris"), Text.of("{} is a", "Beats Music")]
    assert encode(tokenizer, texts) == [one(tokenizer, text) for text in texts]


def test_nothing_to_encode(tokenizer):
    assert encode(tokenizer, []) == []


CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def chatty():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = "<s>" + CHAT
    return tokenizer


def test_chat_puts_the_prompt_into_a_message(chatty):
    row = one(chatty, Text.of("The capital of {} is", "Peru", "Lima", prefix="Yes. "), chat=True)
    assert chatty.decode(row.ids[: row.prompt_length]) == (
        "<s><|user|>\nYes. The capital of Peru is</s>\n<|assistant|>\n"
    )
    assert chatty.decode(row.target_ids) == "Lima"
    assert row.ids.count(chatty.bos_token_id) == 1
    assert chatty.decode(row.ids[: row.subject_last + 1]).endswith("Peru")


def test_chat_finds_the_prompt_though_the_template_trims_it_and_says_it_elsewhere(chatty):
    chatty.chat_template = "user of Peru\n" + CHAT
    row = one(chatty, Text.of(" {} ", "Peru", "Lima"), chat=True)
    assert chatty.decode(row.ids[: row.subject_last + 1]) == "user of Peru\n<|user|>\nPeru"


def test_chat_refuses_a_template_that_changes_the_prompt(chatty):
    chatty.chat_template = CHAT.replace("trim", "upper")
    with pytest.raises(ModelError, match="chat=False"):
        one(chatty, Text("The capital of Peru is"), chat=True)


ROWS = [EncodedText((3, 4, 5), 3, 1), EncodedText((6,), 1, 0), EncodedText((7, 8, 9, 10, 11), 5, 2)]


@pytest.mark.parametrize("anchors", [None, [0, 0, 0], [1, 0, 2], [2, 0, 0]])
def test_padding_keeps_rows_and_lines_up_anchors(anchors):
    batch = pad(ROWS, 99, anchors=anchors)
    column = max(anchors) if anchors else batch.ids.shape[1] - 1
    for i, row in enumerate(ROWS):
        real = batch.mask[i].bool()
        assert batch.ids[i][real].tolist() == list(row.ids)
        assert (batch.ids[i][~real] == 99).all()
        assert batch.positions[i][real].tolist() == list(range(len(row.ids)))
        assert (batch.positions[i][~real] == 0).all()
        anchor = anchors[i] if anchors else len(row.ids) - 1
        assert int(batch.starts[i]) + anchor == column
    assert batch.mask.sum(0).gt(0).all(), "no column of padding alone"


def test_padding_one_row_adds_nothing():
    batch = pad(ROWS[:1], 99)
    assert torch.equal(batch.ids, torch.tensor([[3, 4, 5]])) and bool(batch.mask.all())
