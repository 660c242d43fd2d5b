"""Turns the tokens of one choice into text: detokenising, stop strings, stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.text.output.detokenizer import IncrementalDetokenizer
from server.text.output.stop import StopStringMatcher
from server.text.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """A client's options for the text of a choice."""

    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()  # with EOS, unless ignore_eos
    skip_special_tokens: bool = True
    include_stop: bool = False  # keep the stop string, or a stop token that is not skipped
    min_tokens: int = 0  # only later tokens may end the text
    shown_specials: frozenset[str] = frozenset()  # texts of special tokens that are never skipped


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text. The first `num_tokens` of the pushed tokens belong to the choice: all of them, or
    those up to and including the one that stopped it."""

    text: str
    num_tokens: int
    offsets: tuple[int, ...]  # where the text of each begins, in characters of the choice
    stop: str | int | None = None  # the stop string or token id that ended the choice


class TextStream:
    """The text of one choice. Push tokens as they come; tokens after a stop are ignored."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        options: StreamOptions | None = None,
    ) -> None:
        self._options = options or StreamOptions()
        skipped = frozenset[int]()
        if self._options.skip_special_tokens:
            skipped = tokenizer.special_ids - tokenizer.ids_of(self._options.shown_specials)
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, skipped)
        self._matcher = StopStringMatcher(self._options.stop, self._options.include_stop)
        self._special_stops = _special_stops(tokenizer, self._options)
        self._length = 0  # characters decoded so far, with those held back
        self._num_tokens = 0
        self.stop: str | int | None = None

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take new tokens. Stop strings are found at any offset; later tokens are ignored."""
        texts: list[str] = []
        offsets: list[int] = []
        for token_id in token_ids:
            if self.stop is not None:
                break
            offsets.append(self._length)
            texts.append(self._take(token_id))
        return TextDelta("".join(texts), len(offsets), tuple(offsets), self.stop)

    def finish(self) -> str:
        """The rest of the text when the choice ends without a stop; nothing after a stop."""
        if self.stop is not None:
            return ""
        text = self._scan(self._detokenizer.flush())
        return text + self._matcher.flush()

    @property
    def _may_stop(self) -> bool:
        """Whether the newest token may end the text. The engine applies the same rule."""
        return self._num_tokens > self._options.min_tokens

    def _take(self, token_id: int) -> str:
        self._num_tokens += 1
        if self._may_stop and token_id in self._special_stops:
            return self._end_at(self._special_stops[token_id])
        if self._may_stop and token_id in self._options.stop_token_ids:
            return self._end(token_id)
        return self._scan(self._detokenizer.add((token_id,)))

    def _scan(self, text: str) -> str:
        self._length += len(text)
        scan = self._matcher.feed(text, self._may_stop)
        self.stop = scan.stop
        return scan.text

    def _end_at(self, stop: str) -> str:
        """A stop string that is the text of a skipped token, so that no text shows it."""
        text = self._scan(self._detokenizer.flush())
        if self.stop is not None:
            return text
        self.stop = stop
        return text + self._matcher.flush() + (stop if self._options.include_stop else "")

    def _end(self, token_id: int) -> str:
        """A stop token: its text is left out unless the client asked for it."""
        last = self._detokenizer.add((token_id,)) if self._options.include_stop else ""
        text = self._scan(last + self._detokenizer.flush())
        if self.stop is None:
            self.stop = token_id
        return text + self._matcher.flush()


def _special_stops(tokenizer: Tokenizer, options: StreamOptions) -> dict[int, str]:
    """The stop strings that are special tokens, by id, where the text leaves these out."""
    if not options.skip_special_tokens:
        return {}
    ids = {tokenizer.special_id(stop): stop for stop in options.stop}
    return {index: stop for index, stop in ids.items() if index is not None}
