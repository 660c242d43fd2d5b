"""Large conversations are rendered by processes that can be ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from server.text.template.chat_template import ChatTemplate
from server.text.template.render_process import Conversation
from server.text.template.rendering import FAILED, SMALL, Renderer, is_small
from tests.support.models.tiny_llama import CHAT_TEMPLATE, SPECIALS
from tests.support.waiting import DEADLINE

Make = Callable[[str], Renderer]
LARGE = [{"role": "user", "content": "x" * SMALL}]


@pytest.fixture
def make() -> Iterator[Make]:
    renderers = []

    def build(source: str) -> Renderer:
        renderers.append(Renderer(ChatTemplate(source, {"bos_token": "<s>"}, SPECIALS)))
        return renderers[-1]

    yield build
    for renderer in renderers:
        renderer.close()


def test_a_process_renders_as_the_template_does(make: Make) -> None:
    source = "{{ bos_token }}{{ more | tojson }}{{ further }}" + CHAT_TEMPLATE
    kwargs = {"more": [{"a": None, "b": [1, 2.5, True]}], "further": "é😀"}
    renderer = make(source)
    template = ChatTemplate(source, {"bos_token": "<s>"}, SPECIALS)
    for content in (LARGE[0]["content"], LARGE[0]["content"] + SPECIALS[1]):
        messages = [{"role": "user", "content": content}]
        assert renderer.render(messages, True, kwargs) == template.render(messages, True, **kwargs)
    assert len(renderer._children._running) == 1
    with pytest.raises(ValueError, match="chat template: numbers may have at most 64 bits"):
        renderer.render(LARGE, True, {"n": 2**70})


def test_small_conversations_need_no_process(make: Make) -> None:
    renderer = make(CHAT_TEMPLATE)
    assert "hi" in renderer.render([{"role": "user", "content": "hi"}], True, {"a": [1]}).text
    assert renderer._children._running == set()
    assert is_small([{"role": "user", "content": "hi"}], {"enable_thinking": False})
    assert not is_small([], {"tools": [[]] * SMALL})


def test_a_failure_in_a_process_is_that_of_the_template(make: Make) -> None:
    renderer = make("{{ raise_exception('roles must alternate') if messages | length > 2 }}")
    with pytest.raises(ValueError, match=r"^chat template: roles must alternate$"):
        renderer.render(LARGE * 3, True, {})
    assert renderer.render(LARGE, True, {}).text == ""


def test_a_process_that_needs_too_much_memory_fails_alone(make: Make) -> None:
    renderer = make("{{ ([messages[0].content] * 70000) | join | length }}")
    with pytest.raises(ValueError, match="chat template: "):
        renderer.render(LARGE, True, {})


def test_a_process_that_another_thread_ends_is_at_its_end(make: Make) -> None:
    """Whatever this one was about to do with its pipes."""
    renderer = make(CHAT_TEMPLATE)
    with renderer._children.one() as process:
        process.end()
        with pytest.raises(EOFError):
            process.ask(Conversation(LARGE, True, {}))
    renderer._children.close()
    with pytest.raises(ValueError, match="shutting down"):
        renderer.render(LARGE, True, {})


@pytest.mark.parametrize("at_close", [False, True])
def test_a_process_that_does_not_end_can_be_ended(make: Make, at_close: bool) -> None:
    """Also inside one long call. Afterwards there is another process, until the end."""
    renderer = make("{{ messages | length }}")
    with renderer._children.one() as process:
        process._process.send_signal(signal.SIGSTOP)  # as if it were busy for ever
    failures, asked, send = [], threading.Event(), process._send

    def known_send(message: msgspec.Struct) -> None:
        send(message)
        asked.set()

    process._send = known_send  # type: ignore[method-assign]

    def render() -> None:
        with pytest.raises(ValueError) as failure:
            renderer.render(LARGE, True, {})
        failures.append(str(failure.value))

    thread = threading.Thread(target=render)
    thread.start()
    assert asked.wait(DEADLINE)
    if at_close:
        renderer.close()
    else:
        process._process.send_signal(signal.SIGALRM)  # as its own alarm
        process._process.send_signal(signal.SIGCONT)
    thread.join(DEADLINE)
    assert failures == ["the server is shutting down" if at_close else FAILED]
    if at_close:
        with pytest.raises(ValueError, match="shutting down"):
            renderer.render(LARGE, True, {})
    else:
        assert renderer.render(LARGE, True, {}).text == "1"
