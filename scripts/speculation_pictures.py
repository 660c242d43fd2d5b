"""The pictures of docs/speculation.md, from an answer of a running server.

aerie serve speculation.tree=dynamic16
python scripts/speculation_pictures.py http://127.0.0.1:8000
"""

from __future__ import annotations

import html
import json
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
QUESTION = "How do plants make food from light? Explain it to a child."
SHADES = ("#dbeafe", "#bfdbfe", "#93c5fd", "#60a5fa", "#3b82f6")  # by depth
LOOKED_UP, OWN = "#fed7aa", "none"
LETTER, LINE, WIDTH = 7.3, 24, 720
STYLE = "font-family:ui-monospace,monospace;font-size:12px"
Json = Mapping[str, Any]


def main(url: str) -> None:
    choice = asked(url)
    tokens, rounds = choice["trace"]["tokens"], choice["trace"]["rounds"]
    write("tinted-answer.svg", tinted(tokens))
    grown = [each for each in rounds if each["source"] == "draft"]
    best = max(grown, key=lambda each: (len(each["accepted"]), len(each["nodes"])))
    write("draft-tree.svg", tree(best))
    drafted = sum(token["origin"] != "bonus" for token in tokens)
    print(f"{len(tokens)} tokens in {len(rounds)} steps; {drafted} were drafted or looked up")


def asked(url: str) -> Json:
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 80,
        "speculation": {"trace": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as response:
        found: Json = json.load(response)["choices"][0]
    return found


def write(name: str, svg: str) -> None:
    (FOLDER / name).write_text(svg + "\n", encoding="utf-8")
    print(f"wrote docs/images/{name}")


def frame(width: float, height: float, content: Sequence[str], title: str) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" role="img" style="{STYLE};background:#fff">'
    )
    return "\n".join([head, f"<title>{html.escape(title)}</title>", *content, "</svg>"])


def colour(token: Json) -> str:
    if token["origin"] == "draft":
        return SHADES[min(token["depth"], len(SHADES)) - 1]
    return LOOKED_UP if token["origin"] == "lookup" else OWN


def box(x: float, y: float, text: str, fill: str, border: str = "none", weight: str = "400") -> str:
    width = LETTER * len(text) + 4
    shown = html.escape(text)
    return (
        f'<rect x="{x:.1f}" y="{y - 14:.1f}" width="{width:.1f}" height="19" rx="3" fill="{fill}" '
        f'stroke="{border}"/><text x="{x + 2:.1f}" y="{y:.1f}" fill="#111" font-weight="{weight}" '
        f'xml:space="preserve">{shown}</text>'
    )


def tinted(tokens: Sequence[Json]) -> str:
    """The answer, each token with the colour of its origin, and a legend."""
    found, x, y = [], 8.0, 24.0
    for token in tokens:
        for number, text in enumerate(token["token"].split("\n")):
            if number or x + LETTER * len(text) > WIDTH - 8:
                x, y = 8.0, y + LINE
            if text:
                found.append(box(x, y, text, colour(token)))
                x += LETTER * len(text)
    legend = [("the model's own", OWN), ("looked up", LOOKED_UP)]
    legend += [(f"drafted, depth {depth + 1}", shade) for depth, shade in enumerate(SHADES)]
    x, y = 8.0, y + 2 * LINE
    for text, fill in legend:
        if x + LETTER * len(text) > WIDTH - 8:
            x, y = 8.0, y + LINE
        found.append(box(x, y, text, fill, "#cbd5e1"))
        x += LETTER * len(text) + 16
    return frame(WIDTH, y + 16, found, "An answer, tinted by the origin of its tokens")


def tree(step: Json) -> str:
    """The drafted tree of one step; the accepted path is bold."""
    nodes, accepted = step["nodes"], set(step["accepted"]) | {0}
    children: dict[int, list[int]] = {}
    for number, node in enumerate(nodes, 1):
        children.setdefault(node["parent"], []).append(number)
    places: dict[int, tuple[int, float]] = {}
    row = 0.0

    def place(node: int, depth: int) -> float:
        """The node's row: the middle of its children, or the next free one."""
        nonlocal row
        below = [place(child, depth + 1) for child in children.get(node, ())]
        mine = (below[0] + below[-1]) / 2 if below else row
        row += 0.0 if below else 1.0
        places[node] = depth, mine
        return mine

    place(0, 0)
    column = 1 + max(len(node["token"]) for node in nodes) * LETTER + 40
    spot = {n: (16 + depth * column, 28 + mine * 30) for n, (depth, mine) in places.items()}
    found = []
    for number, node in enumerate(nodes, 1):
        if node["parent"] in spot:
            (x1, y1), (x2, y2) = spot[node["parent"]], spot[number]
            text = "root" if not node["parent"] else nodes[node["parent"] - 1]["token"]
            stroke, width = ("#1d4ed8", 2.5) if number in accepted else ("#94a3b8", 1)
            found.append(
                f'<path d="M{x1 + LETTER * len(text) + 4:.1f} {y1 - 4:.1f} L{x2:.1f} {y2 - 4:.1f}" '
                f'stroke="{stroke}" stroke-width="{width}" fill="none"/>'
            )
    for number, (x, y) in spot.items():
        text = "root" if not number else nodes[number - 1]["token"].replace("\n", "\u21b5")
        taken = number in accepted
        fill, border = ("#bfdbfe", "#1d4ed8") if taken else ("#f8fafc", "#94a3b8")
        found.append(box(x, y, text, fill, border, "700" if taken else "400"))
    width = max(x for x, _ in spot.values()) + column
    return frame(width, 28 + row * 30, found, "The draft tree of one step and its accepted path")


if __name__ == "__main__":
    main(sys.argv[1])
