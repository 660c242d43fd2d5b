"""Whether texts fit their JSON schemas, and are the same without drafts:
`python -m benchmarks.schemas`.

`--suite` is the folder `tests` of the JSON-Schema-Test-Suite: the grammars of its schemas read its
instances, without a model. `--collection` is a folder of schemas, such as `data` of
JSONSchemaBench: the model writes a text for some of them at temperature 1, with and without drafts.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from benchmarks.cases.schema_suite import Check, Counts, note, run_suite
from benchmarks.measuring import machine
from benchmarks.tables import write_results
from configs.host import host_config
from configs.resolve import HostConfig
from engine.completion import Completion
from engine.grammar.compiler import GrammarCompiler
from engine.request import FinishReason, Grammar, Request, SamplingParams
from server.assembly.offline import OfflineEngine
from server.text.chat_codec import ChatCodec, load_codec
from server.text.grammars import GrammarChecker

DRAFTS = ("draft4", "draft6", "draft7", "draft2019-09", "draft2020-12")
SHOWN = 800  # characters of a schema that its prompt shows
PROMPT = "A JSON schema:\n{schema}\n\nAn example of JSON that fits it:\n"
MOST_LISTED = 20


@dataclass(slots=True)
class Written:
    """What the model wrote for a collection of schemas."""

    chosen: int = 0
    refused: int = 0  # with a reason, as a request would be
    reasons: dict[str, int] = field(default_factory=dict)
    complete: int = 0  # texts that ended before the limit of tokens
    valid: int = 0  # of these
    equal: int = 0  # texts of both runs that are the same, complete or not
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    wrong: list[str] = field(default_factory=list)  # schemas whose text is not valid or not equal


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", show_default=False)
    ] = None,
    suite: Annotated[Path | None, typer.Option(help="The suite's folder `tests`.")] = None,
    collection: Annotated[Path | None, typer.Option(help="A folder of schemas.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Schemas of the collection.")] = 300,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a text.")] = 256,
    together: Annotated[int, typer.Option(min=1, help="Texts written at a time.")] = 32,
    output: Annotated[Path, typer.Option(help="JSON; the table is written beside it.")] = Path(
        "benchmarks/out/schemas.json"
    ),
) -> None:
    """Count valid and equal texts of JSON schemas."""
    if suite is None and collection is None:
        raise typer.BadParameter("say what to read: --suite, --collection or both")
    config = host_config(None, list(overrides or ()))
    codec = load_codec(config)
    content: dict[str, Any] = {"benchmark": "schemas", **machine.facts()}
    content["model"] = config.model.source
    if suite is not None:
        content["suite"] = {name: asdict(each) for name, each in _suite(codec, suite).items()}
    if collection is not None:
        paths = choose(collection, limit)
        content["max_tokens"] = max_tokens
        content["collection"] = asdict(_write_all(config, codec, paths, max_tokens, together))
    write_results("schemas", output, content)
    print(f"wrote {output}")


def choose(folder: Path, limit: int) -> list[Path]:
    """The schemas of a folder whose names have the smallest hashes: the same in every run.
    FileNotFoundError if there are none."""
    found = list(folder.rglob("*.json"))
    if not found:
        raise FileNotFoundError(f"{folder} has no file *.json")

    def digest(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()

    return sorted(found, key=digest)[:limit]


def _suite(codec: ChatCodec, folder: Path) -> dict[str, Counts]:
    tokenizer = codec.tokenizer
    (eos, *_) = sorted(codec.ending_ids())
    compiler = GrammarCompiler.of(tokenizer.to_json(), tokenizer.vocab_size, [eos])

    def check(text: str) -> Any:
        return compiler.compile(Grammar("json_schema", text))

    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    usable: Check = check
    return run_suite(folder, DRAFTS, usable, encode, eos)


def _write_all(
    config: HostConfig, codec: ChatCodec, paths: Sequence[Path], max_tokens: int, together: int
) -> Written:
    engine = OfflineEngine.from_config(config)
    written = Written(chosen=len(paths))
    requests: dict[str, Request] = {}
    checker = GrammarChecker(codec.tokenizer)
    try:
        for number, path in enumerate(paths):
            text = path.read_text(encoding="utf-8")
            try:
                grammar = checker.check(Grammar("json_schema", text), engine.info)
            except ValueError as error:
                written.refused += 1
                note(written.reasons, error)
                continue
            ids = codec.tokenizer.encode(PROMPT.format(schema=text[:SHOWN]))
            params = SamplingParams(max_tokens=max_tokens, seed=number, grammar=grammar)
            requests[str(path)] = Request(request_id=str(path), prompt_ids=ids, params=params)
        plain = [_plain(request) for request in requests.values()]
        runs = [_run(engine, asked, together) for asked in (list(requests.values()), plain)]
    finally:
        checker.close()
        engine.close()
    for name, request in requests.items():
        _judge(written, codec, request, runs[0][name], runs[1][f"{name} plain"])
    return written


def _plain(request: Request) -> Request:
    """The same request without drafts."""
    name = f"{request.request_id} plain"
    return msgspec.structs.replace(request, request_id=name, max_draft_nodes=0)


def _run(
    engine: OfflineEngine, requests: Sequence[Request], together: int
) -> dict[str, Completion]:
    """Write some texts at a time."""
    done: dict[str, Completion] = {}
    for begin in range(0, len(requests), together):
        done |= engine.generate(requests[begin : begin + together])
        print(f"{len(done)} of {len(requests)}", flush=True)
    return done


def _judge(
    written: Written, codec: ChatCodec, request: Request, one: Completion, other: Completion
) -> None:
    end = one.finished
    assert end is not None
    written.tokens += end.num_output
    written.drafted += end.num_drafted
    written.accepted += end.num_accepted
    equal = one.token_ids == other.token_ids
    written.equal += equal
    valid = True
    if end.reason is FinishReason.STOP:
        valid = fits(codec.decode(one.token_ids), request)
        written.complete += 1
        written.valid += valid
    if not (valid and equal) and len(written.wrong) < MOST_LISTED:
        written.wrong.append(Path(request.request_id).name)


def fits(text: str, request: Request) -> bool:
    """Whether a text is JSON that fits the schema of its request."""
    import jsonschema_rs

    grammar = request.params.grammar
    assert grammar is not None
    try:
        return bool(jsonschema_rs.is_valid(json.loads(grammar.text), json.loads(text)))
    except ValueError:  # the text is no JSON
        return False


if __name__ == "__main__":
    typer.run(main)
