"""The site of docs/ (`make docs`) in a headless Chromium."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT
from tests.support.browser import IN_A_BROWSER, chromium, playwright
from tests.support.waiting import DEADLINE

pytest.importorskip("material", reason="mkdocs-material is not installed")
pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(build, cwd=ROOT, timeout=DEADLINE, check=True)
    return folder


@pytest.mark.parametrize("page", ["tutorial.html", "internals/step.html"])
def test_the_search_works_from_a_folder_and_nothing_is_loaded_from_elsewhere(
    site: Path, page: str
) -> None:
    asked: list[str] = []
    with chromium() as browser:
        opened = browser.new_page()
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto((site / page).as_uri())
        opened.locator(".md-search__input").click()
        opened.keyboard.type("preemption")
        found = opened.locator(".md-search-result__link").first
        inside = re.compile(f"^{re.escape(site.as_uri())}/")
        playwright.expect(found).to_have_attribute("href", inside)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
