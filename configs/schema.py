"""The configuration schema: frozen, every key checked, nothing accepted and ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from configs.roles import role_counts

REDACTED = "***"  # stands for a secret that is not shown


def _refuse_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


# Python takes true for 1, but `threads: true` is a mistake.
Integer = Annotated[int, Field(strict=True)]
Positive = Annotated[Integer, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_refuse_truth)]


def _refuse_redacted(keys: tuple[str, ...]) -> tuple[str, ...]:
    if REDACTED in keys:
        raise ValueError(f"{REDACTED} stands for a key that was not shown: write the key itself")
    return keys


Secrets = Annotated[tuple[str, ...], AfterValidator(_refuse_redacted)]


WeightForm = Literal["stored", "plain", "q8", "q4"]  # how weights are kept
UnknownFields = Literal["refuse", "warn"]  # what becomes of fields that the API does not know
ExpertCut = Literal["tensor", "expert"]  # what ranks share: widths of experts, or whole ones


def _say_allowed_layers(value: object, check: ValidatorFunctionWrapHandler) -> object:
    try:
        return check(value)
    except ValidationError as error:
        raise ValueError(
            "write 'auto', 'outputs', 'boundaries', or numbers of layers as [2, 16, 29]"
        ) from error


# Which hidden states of the target an EAGLE-3 head reads
AuxLayers = Annotated[
    Literal["auto", "outputs", "boundaries"] | tuple[Annotated[Integer, Field(ge=0)], ...],
    WrapValidator(_say_allowed_layers),
]


def _check_roles(text: str) -> str:
    role_counts(text)
    return text


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """Which model, and how it is kept in memory."""

    source: str = Field(
        "smollm2-135m-instruct",
        description="bundled alias, Hugging Face directory, .gguf file, or hub id",
    )
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    served_name: str | None = Field(None, description="name in the API; default: `source`")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="type of weights that are not quantised and, unless cache.dtype says "
        "otherwise, of the KV cache; on a CPU activations are float32",
    )
    weights: WeightForm = Field(
        "stored",
        description="stored: weights that are quantised on disk stay so where the kernels read "
        "them, which is fastest; plain: all become numbers of `dtype`; q8, q4: all are rounded to "
        "8 or 4 bits in groups of 32, on CPUs with native kernels; q4 on CUDA devices, too",
    )
    input_bits: Literal[8, 16] | None = Field(
        None,
        description="to how many bits native products with quantised weights round their inputs, "
        "with one scale for 32 of them. 8 (default): as llama.cpp does; 16: up to twice the time, "
        "and the texts of float32",
    )
    max_model_len: Positive | None = Field(
        None, description="prompt + output tokens; default: the model's own context length"
    )
    chat_template: Path | None = Field(None, description="Jinja file that replaces the model's own")
    special_tokens_in_content: Literal["text", "tokens"] = Field(
        "text",
        description="special tokens written in chat messages and chat_template_kwargs: text (they "
        "are letters, so that no client can begin or end a turn) or tokens; prompts of text "
        "completions may always contain them",
    )
    tool_parser: Literal["auto", "none", "hermes", "llama3_json", "llama4_pythonic"] = Field(
        "auto",
        description="how the model writes calls of tools; auto: as its chat template says, or as "
        "Hermes models do where it says nothing; none: requests with tools are refused",
    )
    reasoning_parser: Literal["auto", "none", "think"] = Field(
        "auto",
        description="think: text from <think> to </think> at the start of an answer is its "
        "`reasoning_content`; none: it is content; auto: think where the chat template has these "
        "marks",
    )
    pooling: Literal["last", "mean"] = Field(
        "last",
        description="which final hidden state is the embedding of a text: that of its last token, "
        "or the mean over all; a request may say otherwise",
    )
    generation_config: Literal["model", "none"] = Field(
        "model",
        description="sampling parameters of requests that do not name them: those of the model's "
        "generation_config.json, or none of these",
    )


class CacheConfig(Section):
    """The paged key/value cache."""

    block_size: Literal[16] = Field(16, description="tokens per block")
    dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="type of the target's keys and values; auto: model.dtype; fp8 (e4m3): half the "
        "memory of bfloat16, with the checkpoint's scales if it has some. A draft head's stay in "
        "model.dtype",
    )
    num_blocks: Positive | None = Field(None, description="default: sized from memory_fraction")
    memory_fraction: Number = Field(
        0.3, gt=0, le=0.95, description="share of the free memory, used when num_blocks is unset"
    )
    prefix_caching: StrictBool = True
    share_between_clients: StrictBool = Field(
        False,
        description="requests find the cached prompts of other API keys, too: faster where keys "
        "share prompts, but `cached_tokens` and the time to the first token tell one key what "
        "another has sent",
    )


class SchedulerConfig(Section):
    """Limits of one step."""

    max_num_seqs: Positive = Field(64, description="sequences in one step")
    max_num_batched_tokens: Positive = Field(512, description="tokens in one step")
    token_time: Number | None = Field(
        0.2,
        gt=0,
        description="seconds: goal for the time from token to token of running streams while "
        "prompts are computed beside them. Measured step times say how many prompt tokens that "
        "allows; prompts get at least half of the time. null: max_num_batched_tokens alone decides",
    )
    run_ahead: StrictBool | None = Field(
        None,
        description="launch a step before the result of the previous one is known, so that the "
        "device does not wait for the host; default: true where steps are CUDA graphs. Needs a "
        "CUDA device",
    )


class SpeculationConfig(Section):
    """Drafting. It changes only the speed, never the text."""

    draft: str | None = Field(
        "auto",
        description="draft head: auto (the one that ships for the model, if there is one), a "
        "shipped name, a directory or a hub id; null: no drafting",
    )
    draft_weights: Literal["auto", "plain", "q8", "q4", "q4_mlp"] = Field(
        "auto",
        description="how the head is kept, as in model.weights; auto: q8 where the kernels read "
        "quantised weights, else plain; q4_mlp: its feed-forward in 4 bits (arXiv:2508.08192), the "
        "rest as with auto",
    )
    aux_layers: AuxLayers = Field(
        "auto",
        description="which hidden states of the target an EAGLE-3 head reads. The ids in its "
        "config.json mean outputs of layers to some programs, and boundaries (state after so many "
        "layers, 0: the embedding) to others: outputs, boundaries, or auto (by their place in the "
        "file). A list gives the boundaries themselves. A wrong choice costs acceptance only: "
        "`aerie eval-draft --compare-aux` says which is right",
    )
    tree: str = Field(
        "auto", description="auto, root, or one tree for every step: a name or file of configs/tree"
    )
    candidates: tuple[str, ...] = Field(
        ("chain1", "chain2", "chain3", "chain5"),
        description="trees that auto chooses from, the cheapest first; the first and the last are "
        "measured at the first start",
    )
    lookup: StrictBool | None = Field(
        None,
        description="prompt lookup: draft the tokens that followed an earlier occurrence of the "
        "newest tokens, or that the client predicted, where that promises more than the head; "
        "needs no head; default: true",
    )
    draft_parallel: Literal["sharded", "replicated"] = Field(
        "sharded",
        description="with several ranks, each runs a part of every layer of the head (sharded, "
        "faster: each reads fewer weights), or whole layers (replicated); the vocabulary is cut "
        "either way, and the text is the same",
    )
    shared_noise: StrictBool = Field(
        True, description="rank drafts of sampled requests with the noise the target draws with"
    )
    load_timeout: Number = Field(
        600.0, gt=0, description="seconds that a head named by POST /admin/draft may take to load"
    )
    window: Positive | None = Field(
        None, description="the head attends only to so many of the newest positions; default: all"
    )
    learn: StrictBool = Field(
        False,
        description="train the head on captured sequences while no request runs, and draft with it "
        "once it is better on sequences held out; needs capture.dir, an EAGLE-3 head and a CPU",
    )
    learn_tokens: Positive = Field(
        50_000, description="learn: captured tokens after which a round of training begins"
    )
    learn_steps: Positive = Field(100, description="learn: optimizer steps of a round")
    learn_gain: Number = Field(
        0.01, ge=0, description="learn: by what share a new head must accept more held-out tokens"
    )
    learn_trial: Positive = Field(
        2000,
        description="learn: draft trees of live requests after which a new head is judged; the one "
        "before it returns if fewer tokens are accepted",
    )

    @property
    def looks_up(self) -> bool:
        """Whether prompt lookup is on."""
        return self.lookup is not False


class ParallelConfig(Section):
    """Ranks that share the target, one process each; on GPUs, one device each."""

    tensor: Integer = Field(1, ge=1, le=64, description="ranks")
    experts: ExpertCut = Field(
        "tensor",
        description="how the experts of Llama 4 are spread over ranks: tensor: each rank holds a "
        "part of every expert's width; expert: whole experts, in equal numbers",
    )
    timeout: Number = Field(
        10.0,
        gt=0,
        description="seconds a step may take before its ranks count as lost and the engine "
        "restarts; idle ranks are not monitored",
    )
    start_timeout: Number = Field(
        1800.0, gt=0, description="most seconds to load the model and measure trees"
    )
    check_every: Integer = Field(
        0, ge=0, description="steps between checks that all ranks did the same; 0: never"
    )
    roles: Annotated[str, AfterValidator(_check_roles)] | None = Field(
        None,
        description="separate engines for prompts and for decoding, as prefill:1,decode:1, so that "
        "long prompts do not slow running streams down. Each has its own copy of the model and an "
        "equal share of kernels.threads and of cache.memory_fraction. Default: one engine for both",
    )
    transfer: Literal["shared_memory", "nixl"] = Field(
        "shared_memory",
        description="how pages of the cache go from engine to engine with parallel.roles; nixl: "
        "through NIXL and UCX, which need the extra `nixl`, within parallel.timeout",
    )

    @model_validator(mode="after")
    def _one_rank_per_role(self) -> ParallelConfig:
        if self.roles is not None and self.tensor != 1:
            raise ValueError(
                f"parallel.roles = {self.roles}: its engines have one rank each, but "
                f"parallel.tensor is {self.tensor}; only 1 is possible"
            )
        return self


class KernelsConfig(Section):
    """Which implementation runs each operation."""

    backend: Literal["auto", "reference", "native", "triton"] = Field(
        "auto",
        description="native: C++ for CPUs; triton: for CUDA devices; reference: plain torch; "
        "auto: the fastest for the device",
    )
    threads: Positive | None = Field(None, description="CPU threads; default: all cores")
    graphs: Literal["auto", "off"] = Field(
        "auto", description="auto: steps are CUDA graphs on CUDA devices; off: eager"
    )
    overlap: StrictBool = Field(
        True,
        description="CUDA devices of capability 9.0 or more: a Triton kernel is made ready while "
        "the one before it runs",
    )
    fused_drafting: StrictBool = Field(
        True,
        description="true: on CUDA devices, few kernels run between the forwards of a draft head; "
        "false: many of torch's, for the same drafts",
    )


class ServerConfig(Section):
    """The HTTP front end and its limits."""

    host: str = "127.0.0.1"
    port: Integer = Field(8000, ge=0, le=65535, description="0 picks a free port")
    socket: Path | None = Field(
        None, description="path of a Unix socket to listen on instead of host and port"
    )
    root_path: str = Field(
        "",
        description="prefix of all paths, such as /llm, under which a proxy serves this server",
    )
    page: StrictBool = Field(True, description="serve the chat page at /")
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Host headers to accept, without port; * accepts all. Default: the names of "
        "loopback addresses if the server listens on one and needs no key, else all",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="origins whose web pages may send requests, such as https://chat.example; "
        "* means all",
    )
    metrics_prefixes: tuple[Literal["aerie", "vllm"], ...] = Field(
        ("aerie", "vllm"),
        min_length=1,
        description="names of the metrics: aerie: for all of them, vllm: for those that vLLM has, "
        "with its labels",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="where to send an OpenTelemetry span for each request, as OTLP over HTTP, such "
        "as http://collector:4318; needs the extra [otel]; null: no spans",
    )
    tls_certificate: Path | None = Field(
        None, description="certificate chain in PEM; with tls_key the server speaks HTTPS"
    )
    tls_key: Path | None = Field(None, description="private key of tls_certificate, in PEM")
    api_keys: Secrets = Field((), description="accepted bearer tokens; empty: no check")
    api_key_file: Path | None = Field(None, description="one key per line, # for comments")
    admin_keys: Secrets = Field(
        (), description="bearer tokens of POST /admin/...; empty: no admin routes"
    )
    admin_key_file: Path | None = Field(None, description="one key per line, # for comments")
    least_priority: Integer = Field(
        0, description="most urgent priority that a request may ask for; lower runs first"
    )
    priority_keys: Secrets = Field(
        (), description="API keys whose requests may ask for any priority"
    )
    max_queued_requests: Positive = Field(256, description="requests without a first token")
    max_queued_choices: Positive = Field(
        4096, description="choices (n x prompts) of these requests without a first token"
    )
    max_waiting_tokens: Positive = Field(
        262_144, description="prompt tokens not yet started; the choices of a prompt share it"
    )
    max_connections: Positive | None = Field(
        None,
        description="client connections that may be open; above it 503, but for probes; default: "
        "what the limit of open files allows",
    )
    max_body_bytes: Positive = Field(4_194_304, description="of one request, after decoding")
    max_pending_body_bytes: Positive = Field(
        67_108_864,
        description="bodies of all requests without an answer so far; above it they get 429",
    )
    body_timeout: Number = Field(
        60.0, gt=0, description="seconds in which a whole request body must arrive"
    )
    write_timeout: Number = Field(
        30.0,
        gt=0,
        description="seconds after which a client that does not read its answer (less than 1 KiB "
        "per second) is disconnected",
    )
    max_choices: Positive = Field(128, description="largest n x prompts of one request")
    max_embeddings: Positive = Field(2048, description="inputs of one request for embeddings")
    max_stored_responses: Integer = Field(
        1024,
        ge=0,
        description="responses of /v1/responses kept in memory for later requests; 0: none",
    )
    max_stored_response_bytes: Positive = Field(
        67_108_864, description="of these responses and what they were asked with, as JSON"
    )
    max_background_responses: Positive = Field(
        64, description="responses made without a connection at the same time"
    )
    unknown_fields: UnknownFields = Field(
        "refuse",
        description="fields and query parameters that the API does not know: a 400, or ignored "
        "with a warning in the header x-aerie-warning and in the log",
    )
    retry_after: Positive = Field(1, description="seconds, sent with 429 and 503")
    drain_timeout: Number = Field(30.0, ge=0, description="seconds for open requests on SIGTERM")
    restart_engine: StrictBool = Field(
        True, description="start the engine, or the HTTP process, again when it dies"
    )
    max_restarts: Positive | None = Field(
        20,
        description="such starts in a row, after pauses from 0.5 to 30 s, before the server ends "
        "with exit code 1; a row ends when a process has served for 20 s; null: no limit",
    )
    refuse_suspects: Number = Field(
        3600.0,
        ge=0,
        description="seconds for which a request is refused after it was running at two deaths of "
        "the engine in a row; 0: none is refused",
    )
    engine_timeout: Number = Field(
        300.0,
        gt=0,
        description="seconds without a sign of life from an engine that has work, until it is "
        "killed and restarted; more than the longest step takes, compilation included. While it "
        "loads, processor time is such a sign",
    )


class FleetConfig(Section):
    """Several engines with one API: `aerie deploy ray`."""

    replicas: Positive = Field(1, description="engines at the start, and the fewest")
    max_replicas: Positive | None = Field(
        None, description="most engines, started as the load needs them; default: `replicas`"
    )
    fronts: Positive = Field(1, description="processes with the API and the tokenizer")
    cpus: Number | None = Field(
        None,
        gt=0,
        description="cores that Ray reserves for an engine, which sets kernels.threads if that is "
        "open; default: kernels.threads, else an equal share of this machine's",
    )
    gpus: Literal["auto", "none"] = Field(
        "auto", description="auto: a GPU for each rank if the cluster has GPUs; none: only CPUs"
    )
    routing: Literal["prefix", "round_robin"] = Field(
        "prefix",
        description="prefix: to the engine of the session (prompt_cache_key), else to the one that "
        "has computed most of the prompt before; round_robin: to one after the other",
    )
    load_bound: Number = Field(
        1.5, ge=1, description="engines with more than this times the mean load are passed over"
    )
    prefix_blocks: Positive = Field(
        100_000, description="newest blocks of prompts that routing remembers for each engine"
    )
    waiting_target: Number = Field(
        8.0, gt=0, description="waiting requests for which another engine starts"
    )
    use_target: Number = Field(
        0.8,
        gt=0,
        le=1,
        description="share of blocks and rows in use at which there are enough engines",
    )
    scale_up_delay: Number = Field(
        30.0, ge=0, description="seconds of too much load before engines start"
    )
    scale_down_delay: Number = Field(
        600.0, ge=0, description="seconds of too little load before engines drain and end"
    )
    load_window: Number = Field(30.0, gt=10, description="seconds over which the load is averaged")

    @model_validator(mode="after")
    def _limits_have_an_order(self) -> FleetConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"fleet.max_replicas is {self.max_replicas}: not less than fleet.replicas, "
                f"{self.replicas}"
            )
        return self


class CaptureConfig(Section):
    """Storage of live sequences as token ids, for training; ids can be turned back into text."""

    dir: Path | None = Field(None, description="folder of the shards; null: no capture")
    consent: StrictBool = Field(
        False, description="you may store what clients send; required when dir is set"
    )
    sample_rate: Number = Field(0.1, ge=0, le=1, description="share of the sequences")
    max_bytes: Positive = Field(268_435_456, description="total of the shards; then capture stops")
    shard_tokens: Positive = Field(1_000_000, description="tokens after which a shard is complete")

    @model_validator(mode="after")
    def _needs_consent(self) -> CaptureConfig:
        if self.dir is not None and not self.consent:
            raise ValueError(
                f"capture.dir is {str(self.dir)!r}, but capture.consent is not true: captured "
                "token ids can be turned back into what clients sent and got; set "
                "capture.consent=true (--capture-consent) if you may store that"
            )
        return self


class LogConfig(Section):
    """The server's log."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    prompts: StrictBool = Field(False, description="write prompt and output text into the log")
    configuration: StrictBool = Field(
        False, description="print the whole configuration at start, not a summary (--verbose)"
    )


class CacheDirConfig(Section):
    """Cache of files made once per machine: tokenizers, compiled kernels, costs of steps."""

    dir: Path | None = Field(None, description="default: $XDG_CACHE_HOME/aerie or ~/.cache/aerie")


class Config(Section):
    """All settings of `aerie serve` and `aerie deploy`."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    server: ServerConfig = ServerConfig()
    fleet: FleetConfig = FleetConfig()
    capture: CaptureConfig = CaptureConfig()
    log: LogConfig = LogConfig()
    files: CacheDirConfig = CacheDirConfig()

    @model_validator(mode="after")
    def _learns_from_something(self) -> Config:
        if self.speculation.learn and self.capture.dir is None:
            raise ValueError(
                "speculation.learn is true, but capture.dir is not set: the head learns from "
                "captured sequences, so set capture.dir and capture.consent"
            )
        if self.speculation.learn and self.speculation.draft is None:
            raise ValueError(
                "speculation.learn is true, but speculation.draft is null: there is no head to "
                "train; name one, or 'auto'"
            )
        return self

    @model_validator(mode="after")
    def _roles_fit(self) -> Config:
        roles = self.parallel.roles
        if roles is None:
            return self
        if self.speculation.learn:
            raise ValueError(
                f"parallel.roles = {roles}, but speculation.learn is true: with roles the draft "
                "head cannot change while the server runs; only false is possible"
            )
        if self.capture.dir is not None and role_counts(roles).decode != 1:
            raise ValueError(
                f"parallel.roles = {roles}: only one engine can write to capture.dir, so decode:1 "
                "is needed with it"
            )
        return self
