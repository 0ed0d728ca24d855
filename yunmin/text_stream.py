"""Incremental detokenization: text that never ends in half a character, and never shows a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from yunmin.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes in UTF-8, so no more than four byte tokens can be waiting for their character


class TextStream:
    """Turns one sequence's token ids into pieces of text.

    The pieces concatenate to the text of all ids, cut before the first stop string.

    Args:
        tokenizer: decodes.
        stop: strings that end the text.
        context: ids before the first, on which the text of the first may depend (a word's leading space).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # ids whose text is known, kept as context, then ids whose text is still to come
        self._ids = list(context)[-_LONGEST_CHARACTER:]
        self._known = len(self._ids)
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that is certain now, possibly none."""
        self._ids.append(token_id)
        settled = len(self._ids)
        if self._tokenizer.decode(self._ids).endswith(_INCOMPLETE):
            # bytes this far from the end cannot be completed any more
            settled -= _LONGEST_CHARACTER - 1
            if settled <= self._known:
                return ""
        before = self._tokenizer.decode(self._ids[: self._known])
        text = self._tokenizer.decode(self._ids[:settled])[len(before) :]
        self._ids, self._known = self._ids[self._known :], settled - self._known
        return self._release(text)

    def finish(self) -> str:
        """The rest of the text when no more tokens come."""
        before = self._tokenizer.decode(self._ids[: self._known])
        rest = self._tokenizer.decode(self._ids)[len(before) :]
        self._known = len(self._ids)
        text = self._release(rest)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, text: str) -> str:
        """Holds back what may become a stop string; cuts at one that is complete."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
