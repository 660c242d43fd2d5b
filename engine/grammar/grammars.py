"""The grammars of live requests: compiled beside the steps, then followed by line."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.matcher import Matcher
from engine.grammar.token_rules import RuledText
from engine.request import Grammar, Request

KEPT = 256  # compiled grammars
# Of the texts of all kept grammars, and of one: a compiled one takes some 400 bytes per character.
KEPT_CHARACTERS, LONGEST_KEPT = 2**18, 2**14

Compiled = Future[LLMatcher]
Follower = Matcher | RuledText


class Grammars:
    """Held by the scheduler, which moves matchers on, and by the runner of rank 0, which reads
    their masks. All methods but `ask` are for the thread of the steps."""

    def __init__(self, build: Callable[[], GrammarCompiler], eos_token_ids: frozenset[int]) -> None:
        """`build` is called at once, on the thread that compiles; it may raise a ValueError."""
        self._eos_token_ids = eos_token_ids
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiler = self._thread.submit(build)
        self._kept: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._num_characters = 0  # of their texts
        self._matchers: dict[str, Follower] = {}  # by request id, from its submission to its end
        self._by_line: dict[int, Follower] = {}

    @property
    def any_runs(self) -> bool:
        """Whether a running row may not have any token."""
        return bool(self._by_line)

    def ask(self, grammar: Grammar) -> Compiled:
        """The compiled grammar, or a ValueError, when it is ready."""
        found = self._kept.get(grammar)
        if found is None:
            found = self._thread.submit(self._compile, grammar)
            if len(grammar.text) > LONGEST_KEPT:
                return found
            self._kept[grammar] = found
            self._num_characters += len(grammar.text)
        self._kept.move_to_end(grammar)
        while len(self._kept) > KEPT or self._num_characters > KEPT_CHARACTERS:
            dropped, _ = self._kept.popitem(last=False)
            self._num_characters -= len(dropped.text)
        return found

    def open(self, request: Request, compiled: LLMatcher | None) -> None:
        """Follow a request from now on. `compiled`: its grammar, if it has one."""
        params, matcher = request.params, None
        if compiled is not None:
            size = self._compiler.result().vocab_size
            matcher = Matcher(compiled, size, self._eos_token_ids, params)
        if matcher is None or params.has_token_rules:
            found: Follower = RuledText(matcher, self._eos_token_ids, params)
        else:
            found = matcher
        self._matchers[request.request_id] = found

    def take(self, request_id: str, output_ids: Sequence[int]) -> None:
        """Another engine has drawn these tokens of a request, which may have no grammar."""
        matcher = self._matchers.get(request_id)
        if matcher is not None:
            matcher.take(output_ids)

    def close(self, request_id: str) -> None:
        """The request has ended. It may have had no grammar."""
        self._matchers.pop(request_id, None)

    def start(self, line: int, request_id: str) -> None:
        """A request runs on a line. It may have no grammar."""
        matcher = self._matchers.get(request_id)
        if matcher is not None:
            self._by_line[line] = matcher

    def stop(self, line: int) -> None:
        """The line is free again, after the end of its request or by preemption."""
        self._by_line.pop(line, None)

    def of_line(self, line: int) -> Follower | None:
        """What follows a running row, None if it may have any token."""
        return self._by_line.get(line)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        return self._compiler.result().compile(grammar)
