// One answer while it is written: its text, its tokens with their origins, its speed.

import { chat } from "./api.js";

export class Answer {
  constructor(speculates, seed) {
    this.speculates = speculates;
    this.seed = seed;
    this.content = "";
    this.reasoning = "";
    this.tokens = []; // {text, origin, depth, logprob, top}
    this.rounds = []; // as the server sends them
    this.ends = []; // tokens up to and including each round
    this.numTokens = 0;
    this.finish = null;
    this.problem = null;
    this.stopped = false;
    this.running = true;
    this.firstAt = this.lastAt = null;
    this.numFirst = 0;
    this.bytes = new TextDecoder();
  }

  take(chunk, now) {
    const choice = chunk.choices?.[0];
    if (chunk.usage) this.numTokens = chunk.usage.completion_tokens;
    if (!choice) return;
    this.content += choice.delta.content ?? "";
    this.reasoning += choice.delta.reasoning_content ?? "";
    this.finish = choice.finish_reason ?? this.finish;
    if (choice.trace) this.takeTrace(choice.trace, choice.logprobs?.content ?? []);
    if (chunk.usage && this.numTokens) this.time(now);
  }

  takeTrace(trace, scores) {
    trace.tokens.forEach((token, at) => {
      const score = scores[at];
      this.tokens.push({
        text: this.bytes.decode(new Uint8Array(token.bytes), { stream: true }),
        origin: token.origin,
        depth: token.depth,
        logprob: score?.logprob ?? null,
        top: score?.top_logprobs ?? [],
      });
    });
    for (const round of trace.rounds) {
      this.rounds.push(round);
      this.ends.push((this.ends.at(-1) ?? 0) + round.accepted.length + 1);
    }
  }

  time(now) {
    if (this.firstAt === null) {
      this.firstAt = now;
      this.numFirst = this.numTokens;
    }
    this.lastAt = now;
  }

  /** Tokens per second after the first; null before there is one. */
  get speed() {
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return seconds > 0 ? (this.numTokens - this.numFirst) / seconds : null;
  }

  /** Tokens per step with a draft. */
  get acceptance() {
    const drafted = this.rounds.filter((round) => round.nodes.length);
    if (!drafted.length) return null;
    return 1 + drafted.reduce((sum, round) => sum + round.accepted.length, 0) / drafted.length;
  }

  roundOf(token) {
    const found = this.ends.findIndex((end) => end > token);
    return found < 0 ? this.rounds.length - 1 : found;
  }

  /** What a round emitted, and the token before it. */
  tokensOf(round) {
    const begin = round ? this.ends[round - 1] : 0;
    return { before: this.tokens[begin - 1], emitted: this.tokens.slice(begin, this.ends[round]) };
  }
}

/** Write an answer; `changed` is called after each chunk. Errors become its `problem`. */
export const write = async (answer, body, signal, changed) => {
  const asked = {
    ...body,
    seed: answer.seed,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    speculation: answer.speculates ? { ...body.speculation, trace: true } : { enabled: false, trace: true },
  };
  try {
    for await (const chunk of chat(asked, signal)) {
      answer.take(chunk, performance.now());
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") answer.stopped = true;
    else answer.problem = error;
  } finally {
    answer.running = false;
    changed();
  }
};
