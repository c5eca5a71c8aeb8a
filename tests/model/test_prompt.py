"""The prompt template that the model was trained with."""

from __future__ import annotations

import numpy as np
import pytest

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.prompt import Heard, Segment, Template, Typed, folded, speak_as
from deeptalk_edge.model.rows import codec_columns
from tests.specs import VOCABULARY

AUDIO_ID = 29
BOS, EOS = VOCABULARY.bos, VOCABULARY.eos
PAD_A = codec_columns(VOCABULARY, VOCABULARY.pad_audio)
LETTERS = sorted(set("\n :Userant,Asibcdo"))  # a tokenizer of one id a letter


def _encode(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def _decode(segment: Segment) -> str:
    special = {BOS: "<BOS>", EOS: "<EOS>", AUDIO_ID: "*"}
    return "".join(special.get(i) or LETTERS[i] for i in segment.rows[:, -1])


TEMPLATE = Template(vocabulary=VOCABULARY, audio_id=AUDIO_ID, encode=_encode)


def test_a_conversation_begins_with_two_bos() -> None:
    segment = TEMPLATE.opening("cab", Typed(text="nod"))
    assert _decode(segment) == "<BOS><BOS>cab\n\nUser: nod\n\nAssistant: "


def test_a_later_turn_begins_with_one_bos_and_no_system_text() -> None:
    segment = TEMPLATE.next_turn(Typed(text="nod"))
    assert _decode(segment) == "<BOS>\n\nUser: nod\n\nAssistant: "


def test_an_answer_begins_with_bos_and_ends_with_eos() -> None:
    assert TEMPLATE.answer("bat") == [BOS, *_encode("bat"), EOS]


def test_a_typed_turn_has_no_codes_and_no_audio() -> None:
    segment = TEMPLATE.opening("cab", Typed(text="nod"))
    assert not segment.audio_mask.any()
    np.testing.assert_array_equal(segment.rows[:, :-1], np.tile(PAD_A, (len(segment.rows), 1)))


@pytest.mark.parametrize("num_frames", [1, 5])
def test_a_spoken_turn_has_one_masked_row_per_frame_between_boa_and_eoa(num_frames: int) -> None:
    segment = TEMPLATE.opening("cab", Heard(num_frames=num_frames))
    stars = "*" * (num_frames + 2)
    assert _decode(segment) == f"<BOS><BOS>cab\n\nUser: {stars}\n\nAssistant: "
    heard = np.flatnonzero(segment.rows[:, -1] == AUDIO_ID)
    assert np.flatnonzero(segment.audio_mask).tolist() == heard[1:-1].tolist()
    first, last = segment.rows[heard[[0, -1]], :-1]
    np.testing.assert_array_equal(first, codec_columns(VOCABULARY, VOCABULARY.begin_audio))
    np.testing.assert_array_equal(last, codec_columns(VOCABULARY, VOCABULARY.end_audio))
    others = np.delete(segment.rows[:, :-1], heard[[0, -1]], axis=0)
    np.testing.assert_array_equal(others, np.tile(PAD_A, (len(others), 1)))


def test_a_typed_turn_is_tokenized_in_one_piece() -> None:
    """Merges may cross the joins between template and text; around audio they cannot."""
    pieces: list[str] = []

    def encode(text: str) -> list[int]:
        pieces.append(text)
        return _encode(text)

    template = Template(vocabulary=VOCABULARY, audio_id=AUDIO_ID, encode=encode)
    template.opening("cab", Typed(text="nod"))
    assert pieces == ["cab\n\nUser: nod\n\nAssistant: "]


def test_a_speaker_is_asked_for_by_name_in_the_last_row() -> None:
    rows = TEMPLATE.opening("cab", Heard(num_frames=2)).rows
    spoken = speak_as(VOCABULARY, rows, "F10")
    np.testing.assert_array_equal(spoken[-1, :-1], codec_columns(VOCABULARY, 40))
    np.testing.assert_array_equal(spoken[:-1], rows[:-1])
    assert spoken[-1, -1] == rows[-1, -1]
    np.testing.assert_array_equal(rows[-1, :-1], PAD_A)  # the silent item's row is unchanged


def test_an_unknown_speaker_is_refused_with_the_known_names() -> None:
    rows = TEMPLATE.next_turn(Typed(text="nod")).rows
    with pytest.raises(ArtifactError, match=r"'Bob': this checkpoint has EOA, .*M29, F10"):
        speak_as(VOCABULARY, rows, "Bob")


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("One ticket to London, please!", "one ticket to london please"),
        ("  where's\tthe\nTicket-Office?? ", "where's the ticket office"),
        ("Where\N{RIGHT SINGLE QUOTATION MARK}s 'it'", "where's it"),
        (
            "\N{INVERTED QUESTION MARK}D\N{LATIN SMALL LETTER O WITH ACUTE}nde?",
            "d\N{LATIN SMALL LETTER O WITH ACUTE}nde",
        ),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}\N{IDEOGRAPHIC FULL STOP}", "a"),
        ("£5 + 7", "£5 + 7"),
        ("?!... ' --", ""),
    ],
)
def test_a_folded_question_is_its_words_in_lower_case(typed: str, wanted: str) -> None:
    assert folded(typed) == wanted
    assert folded(wanted) == wanted
