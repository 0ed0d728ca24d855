"""Incremental detokenization: text that never ends in half a character, and never shows a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from yunmin.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAY_CHANGE = 3  # bytes a UTF-8 character can be short of its end, each shown as one U+FFFD or all as one
_CONTEXT_IDS = 4  # of the prompt, on which the text of the first token may depend (a word's leading space)
_LONG_WINDOW = 64  # ids; only a long run of malformed bytes gets there
_LONG_WINDOW_KEPT = 16  # ids, of at least one byte each: more than can still change


class TextStream:
    """Turns one sequence's token ids into pieces of text.

    With a byte-level tokenizer the pieces concatenate to exactly the text of all ids, whatever they are, cut before
    the stop string that is complete first.

    Args:
        tokenizer: decodes.
        stop: strings that end the text.
        context: ids before the first. If they end within a character, its text begins the stream once it is complete.

    Attributes:
        stopped: whether a stop string has come; there is no more text then.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # the window: ids whose text is known, for context, then ids whose text may still change
        self._ids = [i for i in context[-_CONTEXT_IDS:] if tokenizer.is_shown(i)]
        self._known = len(self._ids)
        self._shown = tokenizer.decode(self._ids)  # the part of the window's text that needs no showing
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that is certain now, possibly none."""
        if not self._tokenizer.is_shown(token_id):
            return ""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        complete = len(text.rstrip(_REPLACEMENT))
        certain = text[: max(complete, len(text) - _MAY_CHANGE)]
        piece = self._beyond_shown(certain)
        if len(certain) == len(text):
            self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
            self._shown = self._tokenizer.decode(self._ids)
        elif len(self._ids) > _LONG_WINDOW:
            self._shorten_window(text)
        return self._release(piece)

    def finish(self) -> str:
        """The rest of the text when no more tokens come; what is then incomplete shows as U+FFFD."""
        text = self._release(self._beyond_shown(self._tokenizer.decode(self._ids)))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _beyond_shown(self, certain: str) -> str:
        """The part of the window's certain text that was not shown; counts it as shown."""
        # shorter than what is known only where the context ended within a character
        common = next((n for n, (a, b) in enumerate(zip(self._shown, certain, strict=False)) if a != b), None)
        common = min(len(self._shown), len(certain)) if common is None else common
        if common == len(certain):
            return ""
        self._shown = certain
        return certain[common:]

    def _shorten_window(self, text: str) -> None:
        """Drops old ids where the text falls apart exactly, so that malformed bytes do not cost quadratic time."""
        old, recent = self._ids[:-_LONG_WINDOW_KEPT], self._ids[-_LONG_WINDOW_KEPT:]
        old_text = self._tokenizer.decode(old)
        if old_text + self._tokenizer.decode(recent) == text:
            self._ids, self._known, self._shown = recent, 0, self._shown[len(old_text) :]

    def _release(self, text: str) -> str:
        """Holds back what may become a stop string; cuts at one that is complete."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            # the one that is complete first, so that nothing depends on how the text falls into pieces
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
