"""Reads calls of tools out of an answer, in whatever syntax a model writes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.text.answer.parts import CallArguments, CallBegin, Content, Part, PartList
from server.text.answer.scanner import MarkerScanner

# Gets the letters after a marker one by one; returns those at the end that it had no use for.
Attempt = Generator[None, str, str]


class NotACall(Exception):  # noqa: N818  (no error: the text is content)
    """What follows a marker, or a call, is no call. Never raised inside one."""


class CallSink(Protocol):
    """Takes the calls that an attempt finds."""

    def known(self, name: str) -> bool:
        """Whether there is a function of this name."""
        ...

    def begin(self, name: str) -> None: ...

    def write(self, text: str) -> None:
        """Add text to the arguments of the call that has begun."""
        ...

    def end_arguments(self) -> None:
        """The arguments are complete; the call may go on."""
        ...

    def complete(self) -> None:
        """The call is complete."""
        ...


class Syntax(Protocol):
    """How calls are written."""

    @property
    def markers(self) -> Sequence[str]:
        """Texts after which a call may follow."""
        ...

    @property
    def marks(self) -> Sequence[str]:
        """These, and texts that may follow a call."""
        ...

    @property
    def line_marker(self) -> str:
        """A letter with which a call may begin at the start of a line; "": none."""
        ...

    @property
    def between(self) -> str:
        """What the model writes between two calls."""
        ...

    @property
    def separators(self) -> str:
        """Letters, besides space, that may stand between calls."""
        ...

    def attempt(self, sink: CallSink, marker: str) -> Attempt:
        """Read what follows `marker`."""
        ...

    def written(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls as the model writes them: names, and arguments as an object, or as text that could
        not be read."""
        ...


@dataclass(frozen=True, slots=True)
class CallRules:
    """What counts as a call."""

    names: Container[str]  # functions that may be called
    hidden: frozenset[str] = frozenset()  # markers that are not shown as content
    most: int | None = None  # the answer ends after so many calls
    must_call: bool = False  # all text belongs to calls


class CallReader:
    """Splits a text into content and calls. A call is sent as it comes from the moment it is sure
    to be one; text that turns out to be none is content. What is wrong later inside its arguments
    stays there, because it has been sent."""

    may_think = False
    num_thought = 0

    def __init__(self, syntax: Syntax, rules: CallRules) -> None:
        self.end: int | None = None
        self.has_called = False
        self._syntax = syntax
        self._rules = rules
        self._scanner = MarkerScanner(syntax.markers, syntax.line_marker)
        self._parts = PartList()
        self._num_complete = 0
        self._length = 0  # letters fed so far
        self._attempt: Attempt | None = None
        self._has_begun = False  # a call of this attempt
        self._is_inside = False  # a call
        self._marker = ""  # of this attempt
        self._opening = ""  # the marker, with the space before it, as content
        self._tried: list[str] = []  # letters that followed it, or the last call

    def feed(self, text: str) -> Sequence[Part]:
        begin = 0
        while begin < len(text) and self.end is None:
            end = begin if self._attempt is not None else self._scanner.plain(text, begin)
            self._parts.add(Content, text[begin:end])
            if end == begin:
                self._push(text[begin])
                end += 1
            self._length += end - begin
            begin = end
            if self._rules.most is not None and self._num_complete >= self._rules.most:
                self.end = self._length
        return self._parts.take()

    def finish(self, cut: bool = False) -> Sequence[Part]:
        if self.end is None and not (cut and self._begins_a_call()):
            if self._attempt is None:
                self._parts.add(Content, self._scanner.finish())
            elif not self._has_begun:
                self._parts.add(Content, self._opening + "".join(self._tried))
        return self._parts.take()

    def _begins_a_call(self) -> bool:
        """Whether the text that is held back can only be the beginning of a call."""
        if self._rules.must_call:
            return True
        return self._attempt is not None and self._marker in self._syntax.markers

    def known(self, name: str) -> bool:
        return name in self._rules.names

    def begin(self, name: str) -> None:
        self._has_begun = self._is_inside = True
        self.has_called = False
        self._parts.add(CallBegin, name)

    def write(self, text: str) -> None:
        self._parts.add(CallArguments, text)

    def end_arguments(self) -> None:
        self.has_called = True

    def complete(self) -> None:
        self._num_complete += 1
        self._is_inside, self._tried = False, []
        self.has_called = True

    def _push(self, letter: str) -> None:
        """Take a letter. An attempt that ends gives back letters, which are taken anew."""
        letters = deque(letter)
        while letters:
            take = self._look if self._attempt is None else self._try
            letters.extendleft(reversed(take(letters.popleft())))

    def _look(self, letter: str) -> str:
        found = self._scanner.push(letter)
        self._parts.add(Content, found.text)
        if found.marker:
            shown = "" if found.marker in self._rules.hidden else found.marker
            self._marker, self._opening = found.marker, found.space + shown
            self._attempt = self._syntax.attempt(self, found.marker)
            next(self._attempt)
        return ""

    def _try(self, letter: str) -> str:
        assert self._attempt is not None
        if not self._is_inside:
            self._tried.append(letter)
        try:
            self._attempt.send(letter)
        except NotACall:
            back = "".join(self._tried)
        except StopIteration as end:
            back = str(end.value)
        else:
            return ""
        if self._has_begun:
            self.has_called = True  # its arguments end here, whatever they are
            self._scanner.restart(self._syntax.separators)
        else:
            self._parts.add(Content, self._opening)
            self._scanner.resume()
        self._attempt, self._tried = None, []
        self._has_begun = self._is_inside = False
        return back
