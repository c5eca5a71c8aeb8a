"""Text appears without half characters, stray spaces or losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.runtime.lm.text import TextTokenizer
from tests.runtime.speaking_checkpoint import BOS, EOS, SPEC, byte_level_tokenizer

PAD = SPEC.vocabulary.pad_text


@pytest.fixture(scope="session")
def tokenizer(bundle: Bundle) -> TextTokenizer:
    return TextTokenizer(bundle.file("tokenizer.json"), SPEC.vocabulary)


@given(st.text())
def test_pieces_join_to_the_text_and_are_never_broken(tokenizer: TextTokenizer, text: str) -> None:
    stream = tokenizer.stream()
    ids = [BOS, *tokenizer.encode(text), EOS]
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == stream.text
    if "\ufffd" not in text:
        assert stream.text == text.lstrip()
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_when_its_last_byte_does(tokenizer: TextTokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("aé€🙂")] == [
        *["a", "", "é", "", "", "€", "", "", "", "🙂"]
    ]


def test_padding_between_words_has_no_text(tokenizer: TextTokenizer) -> None:
    stream = tokenizer.stream()
    ids = [PAD, *tokenizer.encode(" one"), PAD, PAD, *tokenizer.encode(" two"), PAD]
    assert "".join(stream.push(i) for i in ids) == "one two"


def test_half_a_character_at_the_end_is_dropped(tokenizer: TextTokenizer) -> None:
    stream = tokenizer.stream()
    for i in tokenizer.encode("ok é")[:-1]:
        stream.push(i)
    assert stream.finish() == ""
    assert stream.text == "ok "


def test_word_pieces_keep_their_spaces(tmp_path: Path) -> None:
    vocab = {"▁the": 0, "▁cat": 1, "s": 2, "<|audio|>": 3}
    metaspace = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Metaspace()
    metaspace.save(str(tmp_path / "tokenizer.json"))
    stream = TextTokenizer(tmp_path / "tokenizer.json", SPEC.vocabulary).stream()
    assert [stream.push(i) for i in (0, 1, 2, 0)] == ["the", " cat", "s", " the"]


def test_special_tokens_in_a_users_text_are_plain_text(tokenizer: TextTokenizer) -> None:
    assert max(tokenizer.encode("<|audio|><eos>")) < 256


def test_half_a_surrogate_pair_becomes_a_question_mark(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("a\ud83d") == tokenizer.encode("a?")


def test_a_tokenizer_without_the_audio_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(ArtifactError, match=r"the token <\|audio\|> is missing"):
        TextTokenizer(path, SPEC.vocabulary)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        TextTokenizer(path, SPEC.vocabulary)


def test_the_template_uses_our_ids(tokenizer: TextTokenizer) -> None:
    assert tokenizer.template.audio_id == byte_level_tokenizer().token_to_id("<|audio|>")
