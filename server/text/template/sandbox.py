"""The Jinja environment of chat templates: sandboxed as in transformers, and with limits on steps,
time and output, so that no template and no request can keep a thread busy or fill the memory."""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_OUTPUT = 16_000_000  # characters
TIMEOUT = 5.0  # seconds of computing of one rendering
CLOCK_EVERY = 256  # steps between looks at the clock
# Names that no template can write.
WATCH, LETTERS, TURN = "aerie watch", "aerie letters", "aerie turn"


class Watch:
    """The limits of one rendering, on this thread. Its time is that of the processor: others may
    keep the machine busy."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self._end = time.thread_time() + timeout
        self._timeout = timeout
        self._steps = 0
        self._written = 0  # characters of JSON

    def step(self) -> None:
        """Count a turn of a loop or a call. ValueError once the time is over."""
        self._steps += 1
        if self._steps % CLOCK_EVERY == 0 and time.thread_time() > self._end:
            raise ValueError(f"it takes more than {self._timeout:g} seconds")

    def write(self, length: int) -> None:
        """Count characters that were made. ValueError when there are too many."""
        self._written += length
        if self._written > MAX_OUTPUT:
            raise _too_long()


class GenerationBlock(Extension):
    """`{% generation %}` marks text to train on; rendering outputs its content unchanged."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Limits(Extension):
    """Changes a template so that every turn of a loop counts as a step, and every `~` is a call,
    which `SandboxedTemplates.call` counts and bounds."""

    def joined(self, *values: Any) -> str:
        """What `~` means."""
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > MAX_OUTPUT:
            raise _too_long()
        return "".join(texts)

    def add_to(self, tree: nodes.Template) -> None:
        """Change a template."""
        _Joins(self).visit(tree)
        for loop in tree.find_all(nodes.For):
            turn = nodes.Filter(nodes.Const(None), TURN, [], [], None, None)  # the cheapest call
            loop.body.insert(0, nodes.ExprStmt(turn).set_lineno(loop.lineno))


class _Joins(NodeTransformer):
    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._limits.call_method("joined", node.nodes, lineno=node.lineno)


class SandboxedTemplates(ImmutableSandboxedEnvironment):
    """Compiles templates. A rendering passes its `Watch` as the variable WATCH."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, Limits, loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded_filter(call) for name, call in self.filters.items()}
        self.filters[TURN] = _turn
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def limited(self, source: str) -> nodes.Template:
        """The tree of a template, with limits. TemplateError if it is invalid."""
        tree = self.parse(source)
        limits = next(each for each in self.extensions.values() if isinstance(each, Limits))
        limits.add_to(tree)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __context.parent[WATCH].step()
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # nearly all of them
            if len(left) + len(right) > MAX_OUTPUT:
                raise _too_long()
            return left + right
        if _size_of_result(operator, left, right) > MAX_OUTPUT:
            raise _too_long()
        return super().call_binop(context, operator, left, right)


def _watch(context: Context) -> Watch:
    watch = context.parent[WATCH]
    assert isinstance(watch, Watch)
    return watch


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # also what says that Jinja must pass the context
    def call(*args: Any, **kwargs: Any) -> Any:
        return _checked(function(*args, **kwargs))

    return call


def _checked(result: Any) -> Any:
    if isinstance(result, str) and len(result) > MAX_OUTPUT:
        raise _too_long()
    return result


def _too_long() -> ValueError:
    return ValueError(f"it writes more than {MAX_OUTPUT} characters")


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    """Elements of a text or list, or bits of a number, that an operator makes at most."""
    if operator == "**":
        whole = isinstance(left, int) and isinstance(right, int)
        return left.bit_length() * max(right, 0) if whole else 0
    if operator == "+":
        return _length(left) + _length(right)
    if isinstance(left, int):
        left, right = right, left
    return _length(left) * right if isinstance(right, int) else 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


@pass_context
def _turn(context: Context, _: None) -> None:
    context.parent[WATCH].step()


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: not escaped for HTML, unlike Jinja's own filter."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    watch, pieces = _watch(context), []
    # Without indentation the encoder's one call writes at most some times its input.
    for piece in encoder.iterencode(value) if indent is not None else (encoder.encode(value),):
        watch.step()
        watch.write(len(piece))
        pieces.append(piece)
    return _with_letters("".join(pieces), context.parent.get(LETTERS, {}))


def _with_letters(text: str, letters: Mapping[str, str]) -> str:
    """JSON in which the stand-ins of letters are not escaped."""
    for letter in letters:
        text = text.replace(f"\\u{ord(letter):04x}", letter)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
