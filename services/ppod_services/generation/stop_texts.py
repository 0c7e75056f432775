"""Texts that end a completion, found while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"
"""What stands for a character of which parts are missing."""
_CONTEXT = 6


class StopTexts:
    """Turns tokens into text, one at a time, and tells when a stop text is complete.

    A token alone has no text: it may be a part of a character, and some tokenizers join words by what stands before. So
    each is decoded together with those before it, and the text that it adds is what counts. An incomplete character
    adds nothing until its last token has come.

    Args:
        tokenizer: of the model.
        texts: any of them ends the completion; none is empty.
        context: tokens before the completion; their text counts for nothing.
        resumed: tokens of the completion that were sampled before; their text counts.
    """

    def __init__(
        self, tokenizer: Tokenizer, texts: Sequence[str], context: Sequence[int], resumed: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = tuple(texts)
        self._longest = max(len(text) for text in texts)
        self._tokens = list(context)[-_CONTEXT:]
        self._before = 0
        self._settled = len(self._tokens)
        self._tail = ""
        for token in resumed:
            self.completes(token)

    def completes(self, token: int) -> bool:
        """Take the completion's next token; whether a stop text is complete with it."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._before : self._settled])
        now = self._decode(self._tokens[self._before :])
        # One character of which the context has a part, however many of its bytes are shown.
        begun = before.rstrip(INCOMPLETE)
        added = now[len(begun) + (begun != before) :]
        whole = added.rstrip(INCOMPLETE)
        found = any(text in self._tail[max(0, len(self._tail) - len(text) + 1) :] + whole for text in self._texts)
        if added and added == whole:
            self._before, self._settled = self._settled, len(self._tokens)
            self._tail = (self._tail + added)[-self._longest :]
        return found

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
