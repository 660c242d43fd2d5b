"""Tables of results in Markdown, and their places in documents.

`python -m benchmarks.tables` writes into README.md and docs/ the tables of the files of results
that a document names between `<!-- table KIND PATH... -->` and `<!-- end -->`; with `--check`, it
only says which tables are out of date. KIND is a benchmark, or a table of `aerie eval-draft`.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(
    r"(?P<begin><!-- table (?P<kind>\w+) (?P<paths>[^>\n]+) -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
TREES = {"chain": "chain", "tree": "tree", "dynamic": "dynamic tree"}
Content = Mapping[str, Any]
Render = Callable[..., Iterable[str]]  # of one or several files


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if out of date.")] = (
        False
    ),
) -> None:
    """Write the tables of README.md and docs/ from the files of results."""
    stale = [path for path in documents(ROOT) if renew(path, ROOT, write=not check)]
    for path in stale:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(ROOT)}")
    if check and stale:
        raise typer.Exit(1)


def documents(root: Path) -> list[Path]:
    """All that may hold tables."""
    return [root / "README.md", *sorted(root.glob("docs/*.md"))]


def renew(document: Path, root: Path, *, write: bool) -> bool:
    """Whether a table of `document` differs from its results; paths are below `root`.

    Raises:
        OSError, ValueError: a named file of results is missing or has no table.
    """
    text = document.read_text(encoding="utf-8")

    def table(place: re.Match[str]) -> str:
        paths = [root / path for path in place["paths"].split()]
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return f"{place['begin']}{markdown(place['kind'], *contents)}{place['end']}"

    fresh = PLACE.sub(table, text)
    if write and fresh != text:
        document.write_text(fresh, encoding="utf-8")
    return fresh != text


def markdown(kind: str, *contents: Content) -> str:
    """What a document shows of files of results. ValueError for an unknown kind."""
    known: dict[str, Render] = {
        "compare": _compare,
        "accuracy": _accuracy,
        "schemas": _schemas,
        "head_in_vllm": _head_in_vllm,
        "ablation": _ablation,
        "serving": _serving,
        "latency": _latency,
        "acceptance": _acceptance,
        "speed": _speed,
        "planned": _planned,
        "planner": _planner,
        "fleet": _fleet,
        "routing": _routing,
    }
    if kind not in known:
        raise ValueError(f"there is no table of kind {kind!r}; there are {', '.join(known)}")
    return "\n".join(known[kind](*contents)) + "\n"


def write_results(kind: str, output: Path, content: Content) -> None:
    """Write the results of a run as JSON, and beside it as a table, which is printed, too."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = markdown(kind, content)
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def _compare(content: Content) -> Iterable[str]:
    plan, base = content["plan"], content["base"]
    yield from (_machine(content), "")
    yield (
        f"Answers of {plan['num_tokens']} tokens, median (lowest to highest) of {plan['rounds']} "
        f"rounds. TTFT: median time to the first token, ms. TTIT: median over requests of the mean "
        f"time per token after it, ms. The last column compares tokens/s with {base} in the same "
        "round."
    )
    yield ""
    head = ("streams", "server", "tokens/s", "TTFT", "TTIT", f"x {base}")
    yield from _table(head, [_compare_cells(row) for row in content["rows"]], left=(1,))
    yield from ("", _versions(content["servers"]))
    if content["agreement"]:
        yield from ("", *_agreement(content["agreement"]))
    yield from _listed([*_first_lines(content["notes"]), *_short(content["rows"])])


def _first_lines(notes: Iterable[str]) -> list[str]:
    return [note.partition("\n")[0] for note in notes]


def _listed(notes: Sequence[str]) -> Iterable[str]:
    """A list after a blank line, nothing without notes."""
    return ("", *(f"- {note}" for note in notes)) if notes else ()


def _compare_cells(row: Content) -> list[str]:
    figures = [_spread(row["tokens_per_second"]), _spread(row["ttft"], 0), _spread(row["ttit"])]
    return [str(row["streams"]), row["server"], *figures, _spread(row["ratio"], 2)]


def _short(rows: Iterable[Content]) -> list[str]:
    counted = [(row["server"], row["streams"], row["short"]) for row in rows if row["short"]]
    return [
        f"{server}, {streams} streams: {count} answers had fewer tokens than asked for"
        for server, streams, count in counted
    ]


def _versions(servers: Mapping[str, Mapping[str, str]]) -> str:
    named = [
        f"{server} ({', '.join(f'{package} {version}' for package, version in versions.items())})"
        for server, versions in servers.items()
        if versions
    ]
    return f"Versions: {', '.join(named)}." if named else "No other server was installed."


def _agreement(found: Iterable[Content]) -> Iterable[str]:
    yield "Greedy texts on the same file: tokens until the first difference."
    yield ""
    cells = [
        [
            f"{pair['first']}, {pair['second']}",
            str(pair["num_prompts"]),
            f"{pair['median']:g}",
            str(pair["shortest"]),
            str(pair["equal"]),
        ]
        for pair in found
    ]
    yield from _table(("servers", "prompts", "median", "shortest", "equal"), cells, left=(0,))


def _accuracy(content: Content) -> Iterable[str]:
    yield (
        f"{content['model']} on {content['num_scored']} tokens of {content['text']}, in windows of "
        f"{content['window']} tokens of which the second half is scored. KL: mean divergence of "
        "the next token from that of float32 weights and cache, in nats; the last column says how "
        "often the likeliest token is the same."
    )
    yield ""
    cells = [
        [
            row["name"],
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / content['rows'][0]['perplexity'] - 1:+.2%}",
            "" if row["kl"] is None else f"{row['kl']:.5f}",
            f"{row['same_best']:.1%}",
        ]
        for row in content["rows"]
    ]
    head = ("weights", "perplexity", "against float32", "KL", "same best")
    yield from _table(head, cells, left=(0,))
    yield from _listed(_first_lines(content["notes"]))


def _head_in_vllm(content: Content) -> Iterable[str]:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    yield (
        f"{content['draft']}, chain of {content['chain']}, greedy, {content['num_prompts']} "
        f"prompts of {content['prompts']}, {content['tokens']} tokens each, one at a time, "
        f"bfloat16 ({versions}). {content['same_texts']} of the answers are equal; on average "
        f"texts are equal for {content['same_tokens']} tokens. Acceptance there by that here: "
        f"{content['ratio']:.3f}."
    )
    yield ""
    cells = [
        [
            row["name"],
            str(row["num_drafts"]),
            f"{row['acceptance_length']:.3f}",
            " ".join(f"{count / row['num_drafts']:.3f}" for count in row["accepted"]),
        ]
        for row in content["rows"]
    ]
    head = ("server", "drafts", "tokens per draft", "drafts accepted to position 1, 2, ...")
    yield from _table(head, cells, left=(0, 3))


def _ablation(content: Content) -> Iterable[str]:
    settings = ", ".join(f"`{each}`" for each in content["overrides"])
    yield (
        f"Settings of {content['config']}{f' with {settings}' if settings else ''}; tokens per "
        "step of a chain on held-out examples, the best arm first."
    )
    yield ""
    cells = [
        [
            arm["name"],
            f"{arm['num_answer_tokens'] / 1000:.0f} k",
            f"{arm['cpu_seconds'] / 60:.1f}",
            f"{arm['greedy']:.3f}",
            f"{arm['sampled']:.3f}",
            f"{arm['score']:.3f}",
        ]
        for arm in content["arms"]
    ]
    head = ("arm", "answer tokens", "CPU minutes", "T 0", "T 1, shared noise", "mean")
    yield from _table(head, cells, left=(0,))


def _schemas(content: Content) -> Iterable[str]:
    if "suite" in content:
        yield from _suite_table(content["suite"])
    if "collection" in content:
        yield from _collection_lines(content)


def _suite_table(suite: Content) -> Iterable[str]:
    yield (
        "Schemas of the JSON-Schema-Test-Suite that are objects, without those of its optional "
        "tests. Refused: a request gets a 400 that says why. Of the others: valid instances that "
        "their grammar takes, and invalid ones that it takes."
    )
    yield ""
    cells = [
        [
            draft,
            str(each["schemas"]),
            str(each["refused"]),
            f"{each['valid_taken']} of {each['valid']}",
            f"{each['invalid_taken']} of {each['invalid']}",
        ]
        for draft, each in suite.items()
    ]
    head = ("draft", "schemas", "refused", "valid taken", "invalid taken")
    yield from _table(head, cells, left=(0,))


def _collection_lines(content: Content) -> Iterable[str]:
    found = content["collection"]
    written = found["chosen"] - found["refused"]
    yield ""
    yield (
        f"{content['model']} wrote a text of at most {content['max_tokens']} tokens at temperature "
        f"1 for {written} of {found['chosen']} schemas; {found['refused']} were refused. "
        f"{found['complete']} texts were complete, and {found['valid']} of these fit their schema. "
        f"{found['equal']} of {written} were the same without drafts; {found['accepted']} of "
        f"{found['drafted']} drafted tokens were accepted, for {found['tokens']} tokens of text."
    )


def _serving(content: Content) -> Iterable[str]:
    goal, plan = content["goal"], content["plan"]
    yield from (_machine(content), "")
    yield (
        f"Requests arrive at random (Poisson) for {plan['seconds']:g} s at each rate, with prompts "
        f"of {plan['prompt_words'][0]} to {plan['prompt_words'][1]} words and answers of "
        f"{plan['output_tokens'][0]} to {plan['output_tokens'][1]} tokens. Good are those with a "
        f"first token within {goal['ttft']:g} ms and {goal['ttit']:g} ms per token after it."
    )
    yield ""
    head = ("requests/s", "good/s", "good", "TTFT p50", "p99", "TTIT p50", "p99", "tokens/s")
    yield from _table(head, [_serving_cells(row) for row in content["rows"]])
    found = content["saturation"]
    end = f"{found:.2f} requests/s" if found is not None else "not reached with these rates"
    yield from ("", f"Saturation (fewer than {goal['share']:.0%} are good): {end}.")


def _serving_cells(row: Content) -> list[str]:
    times = [row[name] for name in ("ttft_p50", "ttft_p99", "ttit_p50", "ttit_p99")]
    shown = ["" if time is None else f"{time:.0f}" for time in times]
    rates = [f"{row['rate']:.2f}", f"{row['goodput']:.2f}", f"{row['good']:.0%}"]
    return [*rates, *shown, f"{row['tokens_per_second']:.0f}"]


def _fleet(content: Content) -> Iterable[str]:
    traffic, limits = content["traffic"], content["limits"]
    yield (
        f"Simulated from {content['measured']}. {content['about']} Engines of "
        f"{limits['max_rows']} rows, {limits['max_tokens']} tokens per step and "
        f"{limits['cache_tokens']} cached tokens; conversations of {traffic['turns']} questions "
        f"after one of {traffic['num_systems']} system prompts of {traffic['system_tokens']} "
        f"tokens. The highest simulated requests/s of which 99 % are good: first token within "
        f"{content['ttft']:g} s, then {content['ttit'] * 1e3:g} ms per token. Cached: share of "
        "prompt tokens that were not computed, at the highest rate that both carry."
    )
    yield ""
    head = ("engines", "by prefix", "in turns", "x", "cached by prefix", "in turns", "TTFT p99")
    numbers = dict.fromkeys(row["replicas"] for row in content["rows"])
    yield from _table(head, [_fleet_cells(content["rows"], number) for number in numbers])


def _fleet_cells(rows: Sequence[Content], number: int) -> list[str]:
    """Of fleets of this size."""
    by_routing = {
        routing: {
            row["rate"]: row
            for row in rows
            if (row["replicas"], row["routing"]) == (number, routing)
        }
        for routing in ("prefix", "round_robin")
    }
    most = {
        routing: max((rate for rate, row in found.items() if row["good"] >= 0.99), default=0.0)
        for routing, found in by_routing.items()
    }
    low = min(most.values())
    at = [found.get(low) for found in by_routing.values()]
    cached = ["" if row is None else f"{row['cached']:.0%}" for row in at]
    firsts = ["" if row is None else f"{row['ttft_p99']:.0f}" for row in at]
    ratio = f"{most['prefix'] / low:.2f}" if low else ""
    rates = [f"{rate * number:g}" for rate in most.values()]
    return [str(number), *rates, ratio, *cached, " / ".join(firsts) + " ms"]


def _routing(content: Content) -> Iterable[str]:
    yield from (_machine(content), "")
    yield (
        f"{content['model']}: {content['replicas']} engines of {content['cached_tokens']} cached "
        f"tokens, {content['conversations']} conversations of {content['turns']} questions, "
        f"{content['streams']} at a time. Times in ms."
    )
    yield ""
    head = ("routing", "prompt tokens from a cache", "TTFT p50", "p99", "seconds")
    yield from _table(head, [_routing_cells(row) for row in content["rows"]])


def _routing_cells(row: Content) -> list[str]:
    times = [f"{row[name]:.0f}" for name in ("ttft_p50", "ttft_p99")]
    return [row["routing"], f"{row['cached']:.0%}", *times, f"{row['seconds']:.1f}"]


def _latency(content: Content) -> Iterable[str]:
    head = ("batch", "server", "TTFT", "TTIT p50", "TTIT p99", "tokens/s", "x transformers")
    rows = sorted(content["rows"], key=lambda row: row["batch"])
    yield from _table(head, [_latency_cells(row) for row in rows], left=(1,))


def _latency_cells(row: Content) -> list[str]:
    middle = {name: spread["median"] for name, spread in row["metrics"].items()}
    times = (f"{middle['ttft']:.0f}", f"{middle['ttit_p50']:.1f}", f"{middle['ttit_p99']:.0f}")
    ratio = "" if row["step_ratio"] is None else f"{row['step_ratio']['median']:.2f}"
    return [str(row["batch"]), row["target"], *times, f"{middle['tokens_per_second']:.0f}", ratio]


def _acceptance(*contents: Content) -> Iterable[str]:
    """Trees that all files measured; of each file, greedy without and with lookup, then sampled."""
    head, cells = ["tree"], {}
    wanted = ((0.0, False), (0.0, True), (1.0, False))
    columns = [(_measured(content), *which) for content in contents for which in wanted]
    for content in contents:
        name = content["prompts"].removesuffix(".jsonl")
        head += [f"{name}, T 0", "with lookup", "T 1"]
    for tree in dict.fromkeys(m["tree"] for m in contents[0]["measurements"]):
        if all((tree, heat, lookup) in at for at, heat, lookup in columns):
            found = [at[tree, heat, lookup] for at, heat, lookup in columns]
            cells[tree] = ["" if _is_plain(m) else f"{m['acceptance_length']:.2f}" for m in found]
    rows = [[_tree(tree), *row] for tree, row in cells.items()]
    yield from _table(head, rows, left=(0,))


def _speed(content: Content) -> Iterable[str]:
    """Tokens per second of each way to draft."""
    heats = sorted({m["temperature"] for m in content["measurements"]})
    names = {
        (m["tree"], m["lookup"]): "plain decoding" if _is_plain(m) else _way(m)
        for m in content["measurements"]
    }
    at = _measured(content)
    rows = [[name] for name in names.values()]
    for row, (tree, lookup) in zip(rows, names, strict=True):
        for found in (at[tree, heat, lookup] for heat in heats):
            row += [f"{found['tokens_per_second']:.0f}", f"{found['speedup']:.2f}"]
    head = [part for heat in heats for part in (f"tokens/s at T {heat:g}", "against plain")]
    yield from _table(["drafts", *head], rows, left=(0,))


def _planner(content: Content) -> Iterable[str]:
    """Tokens per second relative to plain decoding: by traffic, tree, and number of streams."""
    sizes = list(dict.fromkeys(row["streams"] for row in content["rows"]))
    at = {(row["traffic"], row["tree"], row["streams"]): row["ratio"] for row in content["rows"]}
    kinds, trees = (list(dict.fromkeys(key[place] for key in at)) for place in (0, 1))
    yield (
        f"{_machine(content)} Answers of {content['tokens']} tokens; tokens/s relative to plain "
        f"decoding in the same round, median (lowest to highest) of {content['rounds']} rounds."
    )
    yield ""
    rows = []
    for kind, tree in itertools.product(kinds, trees):
        found = [at[kind, tree, size] for size in sizes]
        mean = statistics.geometric_mean(ratio["median"] for ratio in found)
        rows.append([kind, tree, *(_spread(ratio, 2) for ratio in found), f"{mean:.2f}"])
    for tree in trees:
        means = [
            statistics.geometric_mean(at[kind, tree, size]["median"] for kind in kinds)
            for size in sizes
        ]
        cells = [f"{mean:.2f}" for mean in (*means, statistics.geometric_mean(means))]
        rows.append(["mean of all", tree, *cells])
    streams = [f"{size} {'stream' if size == 1 else 'streams'}" for size in sizes]
    yield from _table(["traffic", "tree", *streams, "mean"], rows, left=(0, 1))


def _planned(content: Content) -> Iterable[str]:
    from benchmarks.planned import table  # it loads torch

    return table(content)


def _measured(content: Content) -> dict[tuple[str, float, bool], Any]:
    return {(m["tree"], m["temperature"], m["lookup"]): m for m in content["measurements"]}


def _is_plain(measured: Content) -> bool:
    return measured["tree"] == "root" and not measured["lookup"]


def _way(measured: Content) -> str:
    if measured["tree"] == "root":
        return "lookup, no head"
    head = f"head, {_tree(measured['tree'])}"
    return f"{head}{', and lookup' if measured['lookup'] else ''}"


def _tree(name: str) -> str:
    """A name of configs/tree in words."""
    if name == "root":
        return "no head"
    return re.sub(
        r"(chain|tree|dynamic)(\d+)",
        lambda found: f"{TREES[found[1]]} of {found[2]}{' nodes' if found[1] == 'tree' else ''}",
        name,
    )


def _machine(content: Content) -> str:
    load = " and ".join(f"{average[0]:g}" for average in content["load"])
    return (
        f"{content['date'][:10]}, {content['cores']} cores of {content['device']}; load average "
        f"before and after: {load}."
    )


def _spread(spread: Mapping[str, float] | None, digits: int = 1) -> str:
    if spread is None:
        return ""
    low, high = f"{spread['low']:.{digits}f}", f"{spread['high']:.{digits}f}"
    return f"{spread['median']:.{digits}f} ({low} to {high})"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = ()
) -> Iterable[str]:
    """Cells are aligned to the right, except in the columns `left`."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' if i in left else '---:' for i in range(len(head)))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    typer.run(main)
