"""Rendered conversations equal those of transformers; every failure is a ValueError."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.text.template import chat_template, sandbox
from server.text.template.chat_template import ChatTemplate
from server.text.template.sandbox import Watch
from server.text.tokens.tokenizer import Tokenizer

USER = [{"role": "user", "content": "How are you?"}]
CONVERSATIONS = [
    USER,
    [{"role": "system", "content": "Be brief.\n"}, *USER],
    [*USER, {"role": "assistant", "content": "<b>Fine</b> & 'well' \"日本\" 😀"}, *USER],
    [{"role": "user", "content": ""}, *USER],
]
EACH = "{% for m in messages %}"
END = "{% endfor %}"
TEMPLATES = {
    "whitespace": EACH + "\n    {%- if m.role %}  \n  {{ m.content }}\n{% endif %}\n" + END + "\n",
    "special tokens": "{{ bos_token }}" + EACH + "{{ m.content }}{{ eos_token }}" + END,
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "continue": EACH + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}" + END,
    "break": EACH + "{{ m.content }}{% if loop.index > 1 %}{% break %}{% endif %}" + END,
    "namespace": "{% set n = namespace(count=0) %}"
    + (EACH + "{% set n.count = n.count + 1 %}" + END)
    + "{{ n.count }}",
    "generation": EACH + "{% generation %}{{ m.content }}{% endgeneration %}|" + END,
    "no tools": "{% if tools is not none %}tools{% endif %}{{ 'none' if documents is none }}"
    "{{ 'defined' if tools is defined }}",
    "further variables": "{{ 'thinking' if enable_thinking else 'quick' }} {{ nested.a[0] }}",
    "filters": "{{ messages | map(attribute='content') | join('|') | trim | upper }}",
    "slices": "{% for m in messages[1:] %}{{ m['content'].strip().split(' ')[-1] }}" + END,
    "undefined": "{{ nothing }}{% if nothing is defined %}x{% endif %}{{ nothing | default('y') }}",
}
DOUBLE = (
    "{{% set n = namespace(t='x') %}}{{% for i in range(40) %}}{{% set n.t = {} %}}{{% endfor %}}"
)
MOST = 200_000  # characters, in place of MAX_OUTPUT
FURTHER = {"enable_thinking": True, "nested": {"a": ["b"]}}


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)  # type: ignore[no-any-return]


def render(source: str, further: dict[str, Any] | None = None) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(USER, True, **(further or {})).text


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
def test_the_models_own_template_renders_as_transformers_renders_it(
    tiny: Tokenizer,
    oracle: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
) -> None:
    template = ChatTemplate(tiny.chat_template, tiny.special_tokens)
    expected = oracle.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert template.render(messages, add_generation_prompt).text == expected


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_feature_renders_as_in_transformers(
    tiny: Tokenizer, oracle: PreTrainedTokenizerBase, name: str, messages: list[dict[str, str]]
) -> None:
    source = TEMPLATES[name]
    expected = oracle.apply_chat_template(
        messages, tokenize=False, chat_template=source, add_generation_prompt=True, **FURTHER
    )
    template = ChatTemplate(source, tiny.special_tokens)
    assert template.render(messages, True, **FURTHER).text == expected


def test_the_bundled_template_adds_its_system_message(bundled: Tokenizer) -> None:
    template = ChatTemplate(bundled.chat_template, bundled.special_tokens)
    assert template.render(USER).text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_client_may_replace_special_tokens_as_in_transformers() -> None:
    assert render("{{ bos_token }}") == "<s>"
    assert render("{{ bos_token }}", {"bos_token": "<x>"}) == "<x>"


def test_a_model_without_a_template_fails_only_when_one_is_needed() -> None:
    template = ChatTemplate(None, {})
    with pytest.raises(ValueError, match="chat template: this model has no chat template"):
        template.render(USER)


def test_a_template_of_invalid_jinja_fails_at_once() -> None:
    with pytest.raises(ValueError, match="chat template: "):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt"])
def test_reserved_names_cannot_be_set(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot be set by chat_template_kwargs"):
        render("{{ messages }}", {name: []})


@pytest.mark.parametrize("name", ["self", "template", "source", "range", "further"])
def test_other_names_are_for_the_client_to_choose(name: str) -> None:
    render("{{ messages }}", {name: "x"})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{{ messages | tojson(separators=1) }}", "chat template: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_template_that_fails_is_a_value_error_with_its_reason(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^chat template: ") as failure:
        render(source)
    assert reason in str(failure.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * " + str(MOST + 1) + " }}",
        "{% for i in range(90000) %}{% for j in range(90000) %}"
        + "x" * 500
        + "{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{% set k = messages | tojson(indent=999) %}{% endfor %}",
        "{{ 'x' * 99999 * 99999 }}",
        DOUBLE.format("n.t ~ n.t"),
        DOUBLE.format("n.t + n.t"),
        DOUBLE.format("n.t | replace('x', 'xx')"),
        DOUBLE.format("n.t.replace('x', 'xx')"),
    ],
    ids=["at once", "in a loop", "as JSON", "by *", "by ~", "by +", "by a filter", "by a call"],
)
def test_the_output_of_a_template_is_bounded(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    for module in (chat_template, sandbox):
        monkeypatch.setattr(module, "MAX_OUTPUT", MOST)
    with pytest.raises(ValueError, match=f"writes more than {MOST} characters"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ range(1000000) }}",
        "{{ raise_exception.__globals__.x }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_or_change_the_messages(source: str) -> None:
    with pytest.raises(ValueError, match=r"unsafe|Range too big"):
        render(source)
    assert USER == [{"role": "user", "content": "How are you?"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    ],
    ids=["loops", "calls"],
)
def test_a_template_that_does_not_end_is_stopped(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(chat_template, "PROBE_TIMEOUT", 0.02)
    monkeypatch.setattr(chat_template, "Watch", lambda _=0: Watch(0.02))
    with pytest.raises(ValueError, match=r"takes more than 0\.02 seconds"):
        render(source)


def test_only_time_of_the_processor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still, or has other work, makes no template wrong."""
    hours = itertools.count(0.0, 3600.0).__next__
    clock = SimpleNamespace(monotonic=hours, perf_counter=hours, time=hours, thread_time=lambda: 0)
    monkeypatch.setattr(sandbox, "time", clock)
    assert render("{% for i in range(9999) %}{% endfor %}done") == "done"


def test_json_of_nested_values_is_bounded_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "MAX_OUTPUT", 100_000)
    nested: Any = [0] * 10_000
    for _ in range(50):
        nested = [nested]
    with pytest.raises(ValueError, match="writes more than 100000 characters"):
        render("{{ tools | tojson(indent=4) | length }}", {"tools": nested})


PARTS = EACH + "{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %};" + END
SELECTED = (
    EACH + "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ p['text'] | trim }}{% endfor %}" + END
)
EITHER = (
    EACH + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}" + END
)
ONLY_USERS = (
    EACH + "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}" + END
)


@pytest.mark.parametrize(
    ("source", "wants_parts"),
    [
        (PARTS, {"user", "system", "assistant", "tool"}),
        (SELECTED, {"user", "system", "assistant", "tool"}),
        (EITHER, set()),
        (ONLY_USERS, {"user"}),
        ("{{ messages[0].content }}", set()),
        ("{{ raise_exception('never') }}", set()),
    ],
)
def test_text_and_text_parts_render_alike(source: str, wants_parts: set[str]) -> None:
    """vllm-project/vllm#9294: a message of the other form vanished."""
    template = ChatTemplate(source, {})
    assert template.part_roles == wants_parts
    if "raise" in source:
        return
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in USER]
    assert template.render(parts) == template.render(USER)
    assert "How are you?" in template.render(parts).text
