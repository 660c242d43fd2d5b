"""Checks clients' grammars before the engine gets them: they may take long to compile, or fail."""

from __future__ import annotations

import threading
from collections import OrderedDict

import msgspec

from engine.messages import EngineInfo
from engine.request import Grammar
from server.text.grammar_process import TIMEOUT, Checked, Setup
from server.text.tokens.tokenizer import Tokenizer
from server.text.worker_processes import Child, Children

NUM_PROCESSES = 2
KEPT = 1024  # grammars that were checked
KEPT_CHARACTERS = 2**14  # of the longest grammar that is kept
TOO_COMPLEX = f"it takes more than {TIMEOUT:g} s or too much memory to compile"


class GrammarChecker:
    """Checks grammars for many threads. Processes start when they are first needed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._info: EngineInfo | None = None
        self._children = Children(self._start, NUM_PROCESSES)
        self._lock = threading.Lock()
        self._known: OrderedDict[Grammar, Grammar] = OrderedDict()  # asked -> for the engine

    def check(self, grammar: Grammar, info: EngineInfo) -> Grammar:
        """The grammar for the engine. It may wait for a process.

        Raises:
            ValueError: with the reason why the grammar cannot be used.
        """
        known = self.known(grammar)
        if known is not None:
            return known
        self._info = info
        answer = self._asked(grammar)
        if answer.grammar is None:
            raise ValueError(answer.error)
        self._keep(grammar, answer.grammar)
        return answer.grammar

    def known(self, grammar: Grammar) -> Grammar | None:
        """The grammar for the engine, if it was checked before."""
        with self._lock:
            found = self._known.get(grammar)
            if found is not None:
                self._known.move_to_end(grammar)
            return found

    def close(self) -> None:
        """End all processes, and with them what they check."""
        self._children.close()

    def _keep(self, asked: Grammar, checked: Grammar) -> None:
        if len(asked.text) > KEPT_CHARACTERS:
            return
        with self._lock:
            self._known[asked] = checked
            if len(self._known) > KEPT:
                self._known.popitem(last=False)

    def _asked(self, grammar: Grammar) -> Checked:
        try:
            return msgspec.msgpack.decode(self._children.ask(grammar), type=Checked)
        except UnicodeError as error:
            raise ValueError("it is not valid Unicode (a lone surrogate?)") from error
        except (EOFError, BrokenPipeError):
            return Checked(error=TOO_COMPLEX)

    def _start(self) -> Child:
        info = self._info
        assert info is not None
        setup = Setup(self._tokenizer.to_json(), info.vocab_size, list(info.eos_token_ids))
        return Child(f"{__package__}.grammar_process", setup)
