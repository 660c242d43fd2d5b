"""The page in a headless Chromium, around an engine that plays back scripts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any

import pytest

from engine.messages import DraftNodes, DraftSource, EngineStats, Round
from engine.request import FinishReason
from server.text.tokens.tokenizer import Tokenizer
from tests.support.browser import IN_A_BROWSER, chromium, playwright
from tests.support.engines.scripted_engine import Script, finished, say, steps, tokens
from tests.support.servers.http_server import Server
from tests.support.servers.web_thread import WebThread
from tests.support.waiting import DEADLINE

pytestmark = IN_A_BROWSER
EOS = 2
EXPECTED = re.compile(r"Failed to load resource: .*(401|429|500|503)")  # said by Chromium itself


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class Visit:
    """A page that somebody has opened, and the server of it."""

    def __init__(self, web: WebThread, page: Any) -> None:
        self.web, self.page = web, page
        self.server, self.engine = web.server, web.server.engine

    def ask(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Enter")

    def wait_answer(self) -> None:
        self.page.wait_for_selector("#stop", state="hidden")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """For what happens in the server after an answer."""
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end
            self.page.wait_for_timeout(10)  # in which the browser goes on

    def see(self, selector: str, text: str | re.Pattern[str]) -> None:
        playwright.expect(self.page.locator(selector).last).to_contain_text(text)


Open = Callable[..., Visit]


@pytest.fixture
def visit(tokenizer: Tokenizer, browser: Any) -> Iterator[Open]:
    """Opens pages: `visit(script, width=..., **limits of the server)`. None may log an error."""
    problems: list[str] = []
    with ExitStack() as stack:

        def go(
            script: Script | None = None, width: int = 1300, ready: bool = True, **options: Any
        ) -> Visit:
            server = Server(tokenizer, script, max_model_len=4096, **options)
            web = stack.enter_context(WebThread(server))
            context = browser.new_context(
                viewport={"width": width, "height": 800}, bypass_csp=False
            )
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(1000 * DEADLINE)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("dialog", lambda dialog: problems.append(dialog.message))
            page.on("console", lambda said: said.type == "error" and problems.append(said.text))
            page.clock.install()
            page.goto(web.url)
            if ready:
                page.wait_for_selector(".state.ready")
                playwright.expect(page.locator("#model")).to_contain_text("tiny")
            return Visit(web, page)

        yield go
        assert [text for text in problems if not EXPECTED.search(text)] == []


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def speech(tokenizer: Tokenizer) -> Script:
    """Letters are tokens: "so **it** goes", in part drafted and looked up."""
    tree = Round(
        DraftSource.HEAD, DraftNodes(tuple(ids(tokenizer, "x **q")), (0, 0, 2, 3, 3)), (2, 3, 4)
    )
    found = Round(DraftSource.LOOKUP, DraftNodes(tuple(ids(tokenizer, "t*")), (0, 1)), (1, 2))
    plain = Round()
    return steps(
        (ids(tokenizer, "s"), plain),
        (ids(tokenizer, "o"), plain),
        (ids(tokenizer, " **i"), tree),
        (ids(tokenizer, "t**"), found),
        *((ids(tokenizer, letter), plain) for letter in " goes"),
        ([EOS], plain),
    )


def test_an_answer_is_streamed_tinted_drawn_and_kept(visit: Open, speech: Script) -> None:
    here = visit(speech)
    here.ask("how is it?")
    here.wait_answer()
    here.see(".prose", "so it goes")
    page = here.page
    assert page.locator(".prose strong").inner_text() == "it"
    tints = page.locator("#messages .tok").evaluate_all(
        "all => all.map(e => [e.textContent, e.className])"
    )
    assert ["t", "tok lookup"] in tints
    assert [" ", "tok draft d1"] in tints
    assert ["i", "tok bonus"] in tints
    here.see("#tree-text", "2 tokens drafted by lookup, 2 accepted")
    page.locator("#messages .tok.draft").first.click()
    here.see("#tree-text", "5 tokens drafted by the draft head, 3 accepted")
    assert page.locator("#tree svg g").count() == 7  # root, five nodes, bonus
    here.see("#tip", "drafted at depth 1, and accepted")
    here.see(".facts", "15 tokens")
    page.reload()
    here.see(".message.user", "how is it?")
    here.see(".prose", "so it goes")


TINT = """async (content) => {
  const { tint } = await import("./page/tint.js");
  const { rendered } = await import("./page/markdown.js");
  const root = rendered(content);
  tint(root, content, [...content].map((text) => ({ text, origin: "draft", depth: 1 })));
  const spans = [...root.querySelectorAll("[data-token]")];
  return spans.map((span) => [Number(span.dataset.token), span.textContent]);
}"""


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("1. ab c: d.\n\n2. de f.\n\n3. b", "ab c: d.de f.b"),
        ("- ab\n  - c *d* **e**\n- f\n\nend", "ab\nc d efend"),
        ("> ab\n> c\n\n| x | y |\n|---|---|\n| b | a |", "ab\ncxyba"),
        ("so\n\n```python\nif a:\n    b()\n```\n\n# a\n`b`", "soif a:\n    b()\nab"),
    ],
)
def test_each_token_is_found_in_what_markdown_makes_of_it(
    visit: Open, content: str, shown: str
) -> None:
    """Letters are tokens."""
    found = visit().page.evaluate(TINT, content)
    assert "".join(text for _, text in found) == shown
    assert [text for _, text in found] == [content[at] for at, _ in found]
    assert [at for at, _ in found] == sorted({at for at, _ in found})


def test_an_answer_can_be_stopped_written_again_and_its_question_changed(
    visit: Open, tokenizer: Tokenizer
) -> None:
    here = visit(say(ids(tokenizer, "on and on "), ends=False))
    page = here.page
    here.ask("go on")
    here.see(".prose", "on and on")
    page.click("#stop")
    here.wait_answer()
    here.see(".facts", "stopped")
    request = here.engine.submitted[0]

    def is_aborted() -> bool:
        """The server notices at its next write that nobody reads."""
        if not here.engine.aborted:
            here.web.feed(tokens(request, ids(tokenizer, "on")))
        return bool(here.engine.aborted)

    here.wait_until(is_aborted)
    here.engine.script = say([*ids(tokenizer, "the end"), EOS])
    page.get_by_role("button", name="Regenerate the answer").click()
    here.see(".prose", "the end")
    here.wait_answer()
    first, again = here.engine.submitted
    assert first.prompt_ids == again.prompt_ids
    assert first.params.seed != again.params.seed
    page.get_by_role("button", name="Edit this message").click()
    page.get_by_role("textbox", name="Edit the message").fill("something else")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".message.user")).to_have_text(re.compile("something else"))
    here.wait_answer()
    assert here.engine.submitted[-1].prompt_ids != first.prompt_ids


def test_both_ways_of_decoding_answer_the_same_request(visit: Open, speech: Script) -> None:
    here = visit(speech)
    here.page.check("#compare")
    here.ask("twice")
    here.see(".verdict", "The same text")
    with_drafts, without = here.engine.submitted
    assert with_drafts.prompt_ids == without.prompt_ids
    assert with_drafts.params == without.params
    assert (with_drafts.max_draft_nodes, without.max_draft_nodes) == (None, 0)
    assert (with_drafts.min_draft_nodes, without.min_draft_nodes) == (3, 0)
    assert here.page.locator(".pair .answer").count() == 2


def test_parameters_are_sent_and_kept(visit: Open) -> None:
    here = visit()
    page = here.page
    page.locator("#parameters-section summary").click()
    for name, value in (
        ("temperature", "0.3"),
        ("max_tokens", "7"),
        ("seed", "5"),
        ("max_nodes", "2"),
    ):
        page.fill(f"#set-{name}", value)
    page.fill("#system", "be brief")
    here.ask("hi")
    here.wait_answer()
    (request,) = here.engine.submitted
    params = request.params
    assert (params.temperature, params.max_tokens, params.seed) == (0.3, 7, 5)
    assert (request.min_draft_nodes, request.max_draft_nodes) == (2, 2)  # not 3, the page's wish
    assert "be brief" in here.server.tokenizer.decode(request.prompt_ids)
    page.reload()
    assert page.input_value("#set-temperature") == "0.3"


def test_a_busy_server_is_told(visit: Open, tokenizer: Tokenizer) -> None:
    here = visit(lambda request: [], max_queued_requests=1, retry_after=3)
    here.ask("first")
    here.wait_until(lambda: bool(here.engine.submitted))  # the page says so before it has sent it
    other = here.page.context.new_page()
    other.goto(here.web.url)
    other.wait_for_selector(".state.ready")
    other.fill("#prompt", "second")
    playwright.expect(other.locator("#model")).to_contain_text("tiny")
    other.keyboard.press("Enter")
    problem = other.locator(".problem")
    playwright.expect(problem).to_contain_text("The server is busy.")
    playwright.expect(problem).to_contain_text("Try again in 3 s.")


def test_when_the_engine_dies_the_text_so_far_stays(visit: Open, tokenizer: Tokenizer) -> None:
    here = visit(lambda request: [tokens(request, ids(tokenizer, "so far"))])
    here.ask("tell me")
    here.see(".prose", "so far")
    (request,) = here.engine.submitted
    here.web.feed(finished(request, FinishReason.ERROR, 6, "gone"))
    here.see(".problem", "The engine failed to finish this request; it can be sent again")
    here.see(".prose", "so far")


HOSTILE = (
    "<img src=x onerror=alert(1)> <script>alert(2)</script> [a](javascript:alert(3)) "
    "![b](http://127.0.0.1:1/c.png) <a href='javascript:alert(4)'>d</a> [fine](https://example.com/)"
)


def test_a_text_of_the_model_can_do_nothing(visit: Open, tokenizer: Tokenizer) -> None:
    here = visit(say([*ids(tokenizer, HOSTILE), EOS], step=9))
    here.ask("attack")
    here.wait_answer()
    prose = here.page.locator(".prose").last
    playwright.expect(prose).to_contain_text("<img src=x onerror=alert(1)>")
    assert prose.locator("img, script, [onerror]").count() == 0
    links = prose.locator("a[href]").evaluate_all("all => all.map(e => e.href)")
    # What was to be an image is a link: nothing is fetched before somebody asks for it.
    assert links == ["http://127.0.0.1:1/c.png", "https://example.com/"]


def test_a_key_is_asked_for_and_stays_in_the_tab(visit: Open) -> None:
    here = visit(ready=False, api_keys=("secret",))
    page = here.page
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    here.see("#key-error", "Incorrect API key")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    here.see("#model", "tiny")
    here.ask("hi")
    here.wait_answer()
    here.see(".prose", "hello there")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    assert "secret" in page.evaluate("JSON.stringify(sessionStorage)")


def test_the_page_works_under_a_root_path(visit: Open) -> None:
    here = visit(root_path="/llm")
    here.ask("hi")
    here.see(".prose", "hello there")


STATS: dict[str, Any] = {
    "num_waiting": 2,
    "kv_usage": 0.25,
    "prefix_queries": 0,
    "prefix_hits": 0,
    "num_preemptions": 0,
    "num_steps": 0,
    "last_step_tokens": 0,
}


def test_the_charts_follow_the_metrics(visit: Open) -> None:
    """Those of a server whose counts grow, with 3.00 tokens per draft since each look before; all
    that it ever counted would be fewer."""
    here = visit()
    page = here.page
    numbers = count(1)

    def value(name: str) -> Any:
        return page.locator(".chart", has_text=name).locator(".value")

    def shows_what_has_come() -> bool:
        number = next(numbers)
        here.engine.stats = EngineStats(
            num_running=3,
            **STATS,
            num_drafts=1_000_000 + number,
            num_accepted_tokens=2 * number,
            steps_by_tree={"chain3": number},
        )
        page.clock.run_for(100)
        return bool(value("Acceptance length").inner_text() == "3.00")

    here.wait_until(shows_what_has_come)
    playwright.expect(page.locator(".chart .name").first).to_have_text("Tokens per second")
    playwright.expect(value("Running requests")).to_have_text("3")
    playwright.expect(value("KV cache in use")).to_have_text("25.0 %")
    playwright.expect(page.locator(".bars")).to_contain_text("chain3")
    line = page.locator(".chart", has_text="Running requests").locator("path")
    assert "M" in line.get_attribute("d")


def test_tokens_are_reached_and_told_by_the_keyboard(visit: Open, speech: Script) -> None:
    here = visit(speech)
    page = here.page
    here.ask("hi")
    here.wait_answer()
    page.locator(".prose").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    here.see("#tip", "drafted at depth 1, and accepted")
    here.see("#announce", "drafted at depth 1")
    page.keyboard.press("ArrowLeft")
    here.see("#tip", "the model's own token")


def test_what_is_told_of_a_token_stays_while_the_keyboard_scrolls(
    visit: Open, tokenizer: Tokenizer
) -> None:
    words = ["so ", *(f"{number}\n\n" for number in range(60)), "end"]
    here = visit(steps(*((ids(tokenizer, word), Round()) for word in words), ([EOS], Round())))
    page = here.page
    here.ask("hi")
    here.wait_answer()
    top = "document.getElementById('messages').scrollTop"
    page.locator(".prose").focus()
    before = page.evaluate(f"{top} = document.getElementById('messages').scrollHeight, {top}")
    page.evaluate(  # not for the jump to the end, of which the browser may tell a frame later
        "document.getElementById('messages').addEventListener('scroll', "
        f"() => {{ window.moved ||= {top} < {before} }})"
    )
    page.keyboard.press("ArrowRight")
    here.wait_until(lambda: page.evaluate("Boolean(window.moved)"))
    assert page.evaluate(top) < before
    playwright.expect(page.locator("#tip")).to_be_visible()


def test_an_answer_that_has_ended_is_all_there(visit: Open, speech: Script) -> None:
    """With the button that stops it go the last tokens, not a frame later."""
    here = visit(speech)
    page = here.page
    page.evaluate(
        """() => new MutationObserver(() => {
          if (!document.getElementById("stop").hidden || window.seen) return;
          window.seen = [...document.querySelectorAll(".prose")].at(-1).tabIndex;
        }).observe(document.getElementById("stop"), { attributes: true })"""
    )
    here.ask("hi")
    here.wait_answer()
    here.wait_until(lambda: page.evaluate("window.seen !== undefined"))
    assert page.evaluate("window.seen") == 0


@pytest.mark.parametrize(("width", "theme"), [(1300, "light"), (1300, "dark"), (360, "light")])
def test_nothing_keeps_people_from_using_it(
    visit: Open, speech: Script, width: int, theme: str
) -> None:
    """As far as axe-core can tell; and nothing is wider than the window."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    here = visit(speech, width)
    page = here.page
    page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    here.ask("hi")
    here.wait_answer()
    here.see(".prose", "so it goes")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (each["id"], [node["html"] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == [], json.dumps(serious, indent=1)
