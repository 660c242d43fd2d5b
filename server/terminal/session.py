"""The conversation: what was said, the settings, and the commands that begin with /."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from server.terminal.answer import Answer, Piece
from server.terminal.remote import Json, Remote, RemoteError
from server.terminal.screen import harmless

Messages = list[dict[str, str]]

STYLES = {
    "lookup": "black on #ffd08a",
    "grammar": "black on #dcbcf7",
    "reasoning": "dim",
}
NAMES = {"lookup": "looked up", "grammar": "forced by the grammar"}
DEPTHS = ("#cfe2ff", "#a9caff", "#86b3fb", "#6ea2f2", "#5c93e6")  # of drafted tokens
MODES: dict[str, Json] = {  # of speculation: fields of the request
    "on": {"min_nodes": 3},  # this program is there to show drafts
    "off": {"enabled": False},
    "auto": {},
}
CALM = 0.3  # temperature at first: at 1, small models soon lose the thread
HELP = """\
/system TEXT         set the system prompt; without TEXT, none
/temperature NUMBER  0 is greedy; 0.3 at first; without NUMBER, the server's
/seed NUMBER         the same text each time; without NUMBER, a random seed
/max NUMBER          most tokens of an answer; without NUMBER, the server's
/speculation MODE    on: draft in every step; off: never; auto: where it pays;
                     the text is the same
/again               answer the last message again
/new                 begin a new conversation
/save FILE           write the conversation to FILE, as JSON messages
/quit                leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(slots=True)
class Session:
    """One conversation with one model of a server."""

    remote: Remote
    model: str
    console: Console
    # Fields of the request
    settings: Json = field(default_factory=lambda: {"temperature": CALM})
    speculation: Json = field(default_factory=lambda: MODES["on"])
    traces: bool = True  # until the server refuses the field
    knows_colours: bool = False  # whether the user was told what they mean
    system: str = ""
    messages: Messages = field(default_factory=list)

    def run(self, read: Callable[[], str]) -> None:
        """Answer lines until their end, or /quit."""
        while True:
            try:
                line = read().strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/quit", "/exit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """A message, or a command."""
        if not line.startswith("/"):
            self.answer([*self.messages, {"role": "user", "content": line}])
            return
        name, _, argument = line[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            self.tell(f"/{name} is unknown:\n{HELP}")
            return
        try:
            command(self, argument.strip())
        except (ValueError, OSError) as error:
            self.tell(f"/{name}: {error}")

    def tell(self, text: str) -> None:
        """A line of the program's own."""
        self.console.print(Text(harmless(text), style="dim"))

    def answer(self, said: Messages) -> None:
        """Stream an answer to the last of these messages, and keep both. Ctrl-C stops it; what
        has come is kept. If an error or Ctrl-C came first, the conversation is as before."""
        answer = Answer()
        is_whole = False
        try:
            self._stream(said, answer)
            is_whole = True
        except KeyboardInterrupt:
            self.console.print()
            self.tell("stopped")
        except RemoteError as error:
            self.console.print()
            self.console.print(Text(harmless(str(error)), style="red"))
        if is_whole or answer.first_at is not None:  # also reasoning alone, cut by the limit
            self.messages = [*said, {"role": "assistant", "content": answer.text}]
            self.tell(answer.facts())
            if answer.drafts and not self.knows_colours:
                self.tell_colours()

    def _stream(self, said: Messages, answer: Answer) -> None:
        try:
            self._show(said, answer)
        except RemoteError as error:
            if error.status != 400 or not self.traces or "speculation" not in str(error):
                raise
            self.traces = False  # another kind of server, some of which refuse a temperature, too
            if self.settings.get("temperature") == CALM:
                self._set("temperature", "", float)
            self._show(said, answer)

    def _show(self, said: Messages, answer: Answer) -> None:
        with closing(self.remote.chunks(self.body(said))) as chunks:
            for chunk in chunks:
                for piece in answer.take(chunk):
                    self.console.print(tinted(piece), end="", soft_wrap=True)
        self.console.print()

    def body(self, said: Messages) -> Json:
        """The request for an answer to the last of these messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *said],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": self.traces},
            **self.settings,
        }
        if self.traces:
            body["speculation"] = {**self.speculation, "trace": True}
        else:
            del body["stream_options"]["continuous_usage_stats"]
        return body

    def set_system(self, argument: str) -> None:
        self.system = argument

    def set_temperature(self, argument: str) -> None:
        self._set("temperature", argument, float)

    def set_seed(self, argument: str) -> None:
        self._set("seed", argument, int)

    def set_max(self, argument: str) -> None:
        self._set("max_tokens", argument, int)

    def _set(self, name: str, argument: str, kind: Callable[[str], float]) -> None:
        if argument:
            self.settings[name] = kind(argument)
        else:
            self.settings.pop(name, None)

    def set_speculation(self, argument: str) -> None:
        if argument not in MODES:
            raise ValueError(f"{argument!r} must be one of {', '.join(MODES)}")
        self.speculation = MODES[argument]

    def again(self) -> None:
        if not self.messages:
            raise ValueError("nothing was said yet")
        self.answer(self.messages[:-1])  # the last one is the answer

    def begin(self) -> None:
        self.messages = []

    def save(self, argument: str) -> None:
        if not argument:
            raise ValueError("name a file")
        said = {"model": self.model, "system": self.system, "messages": self.messages}
        text = json.dumps(said, ensure_ascii=False, indent=1)
        Path(argument).expanduser().write_text(text + "\n", encoding="utf-8")
        self.tell(f"written to {argument}")

    def help(self) -> None:
        self.tell(HELP)
        self.tell_colours()

    def tell_colours(self) -> None:
        """What the colours of tokens mean."""
        self.knows_colours = True
        depths = [tinted(Piece(f" {at} ", "draft", at)) for at in range(1, len(DEPTHS) + 1)]
        found = [tinted(Piece(f" {name} ", origin)) for origin, name in NAMES.items()]
        words = Text("drafted, by depth: ", style="dim").append_text(Text("").join(depths))
        self.console.print(Text("  ").join([words, *found]))


def tinted(piece: Piece) -> Text:
    """The piece in the colour of its origin."""
    text = harmless(piece.text)
    if piece.origin == "draft":
        shade = DEPTHS[min(piece.depth, len(DEPTHS)) - 1]
        return Text(text, style=f"black on {shade}")
    return Text(text, style=STYLES.get(piece.origin, ""))


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "system": Session.set_system,
    "temperature": Session.set_temperature,
    "seed": Session.set_seed,
    "max": Session.set_max,
    "speculation": Session.set_speculation,
    "again": lambda session, _: session.again(),
    "new": lambda session, _: session.begin(),
    "save": Session.save,
    "help": lambda session, _: session.help(),
}
