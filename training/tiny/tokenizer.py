"""The tiny checkpoint's tokenizer: byte-level BPE in which every word of the kiosk is one token.

Any text can be written, as bytes if need be; words that training knows are one id with a leading
space and one without.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deeptalk_edge.model.prompt import AUDIO_TOKEN

BOS = "<｜begin▁of▁sentence｜>"  # noqa: RUF001 - DeepSeek's own spelling
EOS = "<｜end▁of▁sentence｜>"  # noqa: RUF001

TEMPLATE_TEXT = "\n\nUser: \n\nAssistant: "


def train_tokenizer(words: Sequence[str], texts: Sequence[str]) -> Tokenizer:
    """Learn merges until every one of `words`, and every word of `texts`, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 16,  # more than there are pairs to merge
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS, EOS, AUDIO_TOKEN],
        show_progress=False,
    )
    lines = [*words, *(f" {word}" for word in words), *texts, TEMPLATE_TEXT]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token that `train_tokenizer` put in."""
    token_id: int | None = tokenizer.token_to_id(token)
    assert token_id is not None, f"{token} is missing from the tokenizer"
    return token_id


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text ids without any special id."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of an answer: specials, and ids beyond the tokenizer's own such as PAD_T, are
    nothing."""
    known = [i for i in ids if i < tokenizer.get_vocab_size()]
    return tokenizer.decode(known, skip_special_tokens=True)
