"""What a client asked for, and the scheduler's record of its progress."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

import msgspec

GrammarKind = Literal["json_schema", "regex", "lark", "llguidance"]
Pooling = Literal["last", "mean"]


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the text of a request must match, whole. `text` is a JSON schema, a regular expression,
    a grammar in llguidance's Lark, or several grammars as JSON: `{"grammars": [...]}`."""

    kind: GrammarKind
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens of one request are drawn. The front end validates them.

    `seed` is always set: the front end draws one when the client gave none, so the text of a
    request is a function of (model, prompt, parameters, seed).
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 64 bits, unsigned
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives per output token; None: no logprobs at all
    # Tokens whose log-probabilities are wanted at every output token, after the best alternatives.
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None  # alternatives per prompt token (completions with `echo`)
    grammar: Grammar | None = None  # only tokens that it allows are drawn
    allowed_token_ids: tuple[int, ...] = ()  # only these are drawn; (): all
    # Sequences of output tokens: the last of one is not drawn after the others.
    bad_words: tuple[tuple[int, ...], ...] = ()
    # The final hidden state of the prompt's last token, or the mean of all its tokens, is wanted.
    pooling: Pooling | None = None

    @property
    def has_token_rules(self) -> bool:
        return bool(self.allowed_token_ids or self.bad_words)

    @property
    def is_masked(self) -> bool:
        """Whether the host says at each node which tokens may follow."""
        return self.grammar is not None or self.has_token_rules


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sequence to generate. `n` choices of one HTTP request are `n` requests."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    choice: int = 0  # its number among the sequences of one HTTP request
    priority: int = 0  # lower runs first
    client: str = ""  # opaque label of who pays; work is shared fairly between clients
    cache_salt: str = ""  # prefixes are shared only between requests with the same salt
    session: str = ""  # where there are several engines, requests of one session go to the same one
    prediction: list[int] = msgspec.field(default_factory=list)  # tokens that the client expects
    max_draft_nodes: int | None = None  # limit for this request's draft trees; None: no limit
    min_draft_nodes: int = 0  # nodes of the head that it wants even where they do not pay
    trace: bool = False  # report the verified trees with the tokens
    arrival_time: float = 0.0  # seconds, time.time()


class Status(enum.Enum):
    """The state of a sequence. A preempted sequence is WAITING again."""

    WAITING = "waiting"
    RESERVED = "reserved"  # has blocks and a line; another engine computes its prompt
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a sequence ended. ABORT and ERROR never reach an OpenAI client as a finish_reason."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


Rank = tuple[int, int, int]  # smaller is more important: priority, turn, number of its submission


@dataclass(slots=True, eq=False)
class Sequence:
    """The progress of one request. Only the scheduler (and its KV manager) changes it.

    `num_computed` counts the leading tokens whose keys and values are in the cache. When the
    sequence is ready to decode, `num_computed == len(token_ids) - 1`: the newest token is the
    root of the next draft tree and its KV is not in the cache yet.
    """

    request: Request
    token_ids: list[int]  # prompt + output; until it first runs, the prompt of its request itself
    rank: Rank = (0, 0, 0)
    num_computed: int = 0
    # Hashes of its full blocks, each made once: those of the prompt, which all choices share, then
    # those of blocks that end in the output.
    prompt_hashes: list[bytes] = field(default_factory=list)
    output_hashes: list[bytes] = field(default_factory=list)
    num_matched_blocks: int = 0  # found in the prefix cache when it was last looked up
    num_lacking_blocks: int = 0  # free ones, when it was last refused its first blocks
    num_published_blocks: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_planned_blocks: int = 0  # how many leading `block_ids` plans have sent to the executor
    line: int = -1  # its number in plans while it runs
    status: Status = Status.WAITING
    num_cached: int = 0  # prompt tokens taken from the prefix cache at first admission
    num_preemptions: int = 0
    num_drafts: int = 0  # trees with more nodes than the root
    num_drafted: int = 0  # draft nodes that were verified
    num_accepted: int = 0  # of these, tokens that entered the output
    num_predicted: int = 0  # of `num_drafted`, those of the request's prediction
    num_predicted_accepted: int = 0
    most_drafted: int = 0  # nodes of its largest draft
    accepted_counts: list[int] = field(default_factory=list)  # at [n]: trees with n accepted
    first_scheduled_time: float | None = None
    first_token_time: float | None = None

    @classmethod
    def from_request(cls, request: Request) -> Sequence:
        """Its record at the start. A prompt is not copied while it waits: see `own_tokens`."""
        return cls(request=request, token_ids=request.prompt_ids)

    def own_tokens(self) -> None:
        """Copy the prompt, so that tokens can be added to it."""
        if self.token_ids is self.request.prompt_ids:
            self.token_ids = list(self.token_ids)

    @property
    def uses_prefix_cache(self) -> bool:
        """Whether cached tokens help: scores of prompt tokens, and the mean of their states, need
        every one of them computed."""
        params = self.request.params
        return params.prompt_logprobs is None and params.pooling != "mean"

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)
