"""Decode a generated text and find where it ends, as transformers, vLLM and lm-evaluation-harness
do with the same files."""

from collections.abc import Iterable, Sequence
from typing import Any

from btx_jax.checkpoints.training_state import CheckpointMetadata
from btx_jax.data.tokenizers import Tokenizer


def stop_ids(
    metadata: CheckpointMetadata, tokenizer: Tokenizer, further: Iterable[int | None] = ()
) -> list[int]:
    """Every id that ends a text, without duplicates and in this order: the tokenizer's EOS, all
    those in generation_config.json and config.json, and `further` ones, such as a chat's end of
    turn."""
    told: list[Any] = [tokenizer.eos]
    for file in ("generation_config", "config"):
        ids = metadata.huggingface.get(file, {}).get("eos_token_id")
        told += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(i for i in [*told, *further] if isinstance(i, int) and i >= 0))


def continuation(
    tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], stops: Sequence[str] = ()
) -> tuple[str, bool]:
    """(text of the ids `new` after those of a prompt, up to the first stop string; whether there
    was one). A stop string may be, or contain, a token that decoding skips."""
    text = tokenizer.decode(new, prompt)
    ends = [text.find(stop) for stop in stops if stop in text]
    if stops and not tokenizer.special_ids.isdisjoint(new):
        written = tokenizer.decode(new, prompt, special=True)
        for start in (written.find(stop) for stop in stops if stop in written):
            ends.append(_shown(tokenizer, prompt, new, start))
    return (text[: min(ends)], True) if ends else (text, False)


def _shown(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], start: int) -> int:
    """Number of characters of the decoded text that correspond to the first `start` characters of
    the text with special tokens written out."""
    count, written = 0, 0
    while count < len(new):
        length = len(tokenizer.decode(new[: count + 1], prompt, special=True))
        if length > start:
            break
        count, written = count + 1, length
    inside = 0 if new[count] in tokenizer.special_ids else start - written
    return len(tokenizer.decode(new[:count], prompt)) + inside


class Stream:
    """The text of a continuation as it grows; text once returned never changes."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._tokenizer, self._prompt, self._stops = tokenizer, prompt, stops
        self.given, self.is_finished = "", False

    def more(self, new: Sequence[int], is_last: bool = False) -> str:
        """The additional text that can be returned after all ids so far. Bytes of an incomplete
        character, the possible beginning of a stop string, and characters that the tokenizer may
        still clean up are held back."""
        text, self.is_finished = continuation(self._tokenizer, self._prompt, new, self._stops)
        if not is_last and not self.is_finished:
            text = text.rstrip("\ufffd")
            open_ends = (*self._stops, *self._tokenizer.cleaned)
            wait = max((_overlap(text, end) for end in open_ends), default=0)
            text = text[: len(text) - wait]
        part = text[len(self.given) :]
        self.given += part
        return part


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of the text that begin the stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
