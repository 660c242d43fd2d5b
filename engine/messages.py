"""Messages between the HTTP process and the engine process: tagged msgspec unions.

Every submitted request gets exactly one `Finished`, whatever happens to it.
"""

from __future__ import annotations

import enum

import msgspec

from engine.request import FinishReason, Request


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural log of one token's probability under the model, before any sampling parameter."""

    token_id: int
    logprob: float
    # The best alternatives first, at most `logprobs` of them, then `logprob_token_ids`.
    top: list[tuple[int, float]]


class DraftNodes(msgspec.Struct, frozen=True, array_like=True):
    """The nodes of a verified tree besides its root, parents before children. Node 0 is the root;
    node i has token `tokens[i - 1]`."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()  # -1: a node that could not be accepted, see DraftTree.ending_at


class DraftSource(enum.StrEnum):
    """Who drafted a tree."""

    HEAD = "draft"  # the draft head
    LOOKUP = "lookup"  # an earlier occurrence of the newest tokens, or the client's prediction
    GRAMMAR = "grammar"  # the request's grammar, which allows nothing else


class Round(msgspec.Struct, frozen=True, array_like=True):
    """How the tokens of one step came. The tokens of the accepted nodes come first, then the one
    that the target added (the bonus token); the end of the text may cut them."""

    source: DraftSource | None = None  # None: nothing was drafted
    nodes: DraftNodes = DraftNodes()
    path: tuple[int, ...] = ()  # accepted nodes, from the root down


class OtherChoice(msgspec.Struct, frozen=True, array_like=True):
    """What distinguishes one more choice from a `Request` for the same prompt."""

    request_id: str
    seed: int
    choice: int


class Handover(msgspec.Struct, frozen=True, array_like=True):
    """Where an engine puts the pages of a prompt for the engine `peer` that will decode: those of
    block `first_block` + i of the sequence go to place `places[i]`. `endpoint`: how to reach it."""

    peer: int
    first_block: int
    places: tuple[int, ...]
    endpoint: bytes = b""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Requests for one prompt, which is sent once. `output_ids`: tokens that another engine has
    drawn for it already. With `reserve`, another engine will compute a prompt that is long enough:
    `Reserved` tells it where to; then comes `Resume`. With `handover`, the request leaves this
    engine after its first token, with `HandedOver`."""

    request: Request
    others: tuple[OtherChoice, ...] = ()
    output_ids: tuple[int, ...] = ()
    reserve: bool = False
    handover: Handover | None = None

    def requests(self) -> list[Request]:
        """One per choice, all with the same list of prompt ids."""
        first, replace = self.request, msgspec.structs.replace
        return [
            first,
            *(
                replace(
                    first,
                    request_id=other.request_id,
                    choice=other.choice,
                    params=replace(first.params, seed=other.seed),
                )
                for other in self.others
            ),
        ]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class DraftState(msgspec.Struct, frozen=True, array_like=True):
    """What a draft head knows of a sequence besides its entries: the hidden state of the newest
    token, which is at `position`, as bytes."""

    position: int
    state: bytes


class HandedOver(msgspec.Struct, frozen=True, tag="handed_over"):
    """The prompt of a request and `output_ids` are computed, and their pages were sent: the engine
    that reserved them goes on. Times are those of `Finished`."""

    request_id: str
    output_ids: tuple[int, ...]
    num_cached: int
    first_scheduled_time: float | None
    first_token_time: float | None
    draft: DraftState | None = None


class TakePages(msgspec.Struct, frozen=True, tag="take_pages"):
    """Engine `peer` has put the pages of `num_blocks` blocks of a sequence where `Reserved` said,
    from block `first_block` on."""

    request_id: str
    peer: int
    first_block: int
    num_blocks: int


class Resume(msgspec.Struct, frozen=True, tag="resume"):
    """Go on with a request that was reserved. Without `handed` the other engine is lost: what it
    has not sent is computed here, and `output_ids` are known already."""

    request_id: str
    output_ids: tuple[int, ...] = ()
    handed: HandedOver | None = None


class PeerLost(msgspec.Struct, frozen=True, tag="peer_lost"):
    """The engine `peer` has ended: requests that were to be handed over to it stay."""

    peer: int


class SwapDraft(msgspec.Struct, frozen=True, tag="swap_draft"):
    """Load the draft head in the directory `path` and use it from a later step on; None: draft
    without a head. Answered by one `DraftSwapped`."""

    request_id: str
    path: str | None


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave the loop after the current step; every open request ends with ABORT."""


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """New output tokens of one request, in order. `prompt_logprobs` are sent once, before the
    first output token: one entry per prompt token, None for the first. So is `pooled`, the state of
    the prompt that `SamplingParams.pooling` asks for: float32 numbers, [H]. `round` is sent to
    requests that ask for a trace."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    round: Round | None = None
    pooled: bytes | None = None


class Reserved(msgspec.Struct, frozen=True, tag="reserved"):
    """Blocks for a prompt are reserved; `places` are those from its block `first_block` on. What is
    before is in the cache already. `endpoint`: that of this engine's `KVTransfer`."""

    request_id: str
    first_block: int
    places: tuple[int, ...]
    endpoint: bytes = b""


class PagesSent(msgspec.Struct, frozen=True, tag="pages_sent"):
    """The pages of so many blocks of a sequence are where its `Handover` says."""

    request_id: str
    first_block: int
    num_blocks: int


class ErrorCode(enum.StrEnum):
    """Why a request ended with ERROR, in the cases that the front end treats differently."""

    CONTEXT_LENGTH = "context_length"  # it can never fit into the context
    INVALID = "invalid"  # the engine cannot carry it out, whatever its length
    STOPPING = "stopping"  # the server is stopping
    UNSOUND = "unsound"  # the model's logits are NaN or infinite
    TRANSFER = "transfer"  # its pages cannot be sent to the engine that is to decode
    REFUSED = "refused"  # requests like it may be what kills the engine


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The last event of a request. Times are seconds of time.time(), None if never reached."""

    request_id: str
    reason: FinishReason
    num_prompt: int
    num_output: int
    num_cached: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0  # trees with more nodes than the root
    num_drafted: int = 0  # draft nodes that were verified
    num_accepted: int = 0  # of these, tokens that entered the output
    num_predicted: int = 0  # of `num_drafted`, those of the request's prediction
    num_predicted_accepted: int = 0
    most_drafted: int = 0  # nodes of its largest draft
    accepted_counts: tuple[int, ...] = ()  # at [n]: trees of which n tokens were accepted
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    error: str | None = None  # for people
    error_code: ErrorCode | None = None


class DraftFacts(msgspec.Struct, frozen=True):
    """A draft head in use."""

    path: str
    kind: str
    num_layers: int
    draft_vocab_size: int
    num_parameters: int  # in its files; what it shares with the target is not counted
    # Target layers whose input the head reads; the number of layers means the final norm's output,
    # -1 the last layer's.
    tap_layers: tuple[int, ...] = ()
    max_depth: int | None = None  # tokens after a root that it can draft; None: any number


class DraftSwapped(msgspec.Struct, frozen=True, tag="draft_swapped"):
    """The answer to `SwapDraft`: the head in use from now on, or why it is still the old one."""

    request_id: str
    draft: DraftFacts | None = None
    error: str | None = None


class OperationBackend(msgspec.Struct, frozen=True):
    """The backend of an operation: `kernels.ops.Backend` for a process without torch."""

    name: str
    reason: str | None = None

    @property
    def is_fallback(self) -> bool:
        """Whether plain torch replaces a faster backend that is not available."""
        return self.name == "reference" and self.reason is not None

    def __str__(self) -> str:
        return self.name if self.reason is None else f"{self.name} ({self.reason})"


class EngineInfo(msgspec.Struct, frozen=True, tag="info"):
    """Sent once, when the engine can take requests."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    hidden_size: int  # H, of the final hidden states
    eos_token_ids: list[int]
    ops: dict[str, OperationBackend]  # by operation
    device: str
    draft: DraftFacts | None = None  # None: no draft head
    weights: dict[str, int] = {}  # bytes of the target on rank 0, by form: float32, fp8, q4, ...
    cache_dtype: str = "bfloat16"  # of the target's keys and values; or float32, fp8

    @property
    def ops_in_words(self) -> dict[str, str]:
        """The backends as text, for people."""
        return {name: str(backend) for name, backend in self.ops.items()}


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine takes no more requests, and its process ends."""


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """Current gauges, and counters since start; sent after every step, and as a sign of life while
    a draft head is loaded."""

    num_running: int
    num_waiting: int
    kv_usage: float  # 0..1
    prefix_queries: int  # tokens looked up
    prefix_hits: int  # tokens found and not computed again
    num_preemptions: int
    num_steps: int
    last_step_tokens: int
    num_drafts: int = 0  # trees with more nodes than the root
    num_draft_tokens: int = 0  # their nodes besides the roots
    num_accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()  # at [d]: trees whose path reached depth d + 1
    steps_by_tree: dict[str, int] = {}  # name of the shape -> steps
    seconds_by_part: dict[str, float] = {}  # draft, verify, commit or step -> seconds
    num_captured: int = 0  # sequences queued for capture
    num_capture_dropped: int = 0  # sequences that could not be captured
    num_draft_faults: int = 0  # trees not grown because the head's outputs were not finite
    draft_failed: bool = False  # whether the head failed and is no longer used
    num_deferred: int = 0  # of `num_waiting`, those whose grammar is not compiled yet
    num_unsound: int = 0  # requests that ended because the model's logits were NaN or infinite


TransferEvent = Reserved | PagesSent | HandedOver
RequestMessage = Submit | Abort | TakePages | Resume | PeerLost  # about single requests
ClientMessage = RequestMessage | SwapDraft | Shutdown
EngineMessage = (
    Tokens | Finished | TransferEvent | EngineInfo | EngineFailed | EngineStats | DraftSwapped
)
