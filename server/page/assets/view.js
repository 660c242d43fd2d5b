// How messages look.

import { make } from "./dom.js";
import { rendered } from "./markdown.js";
import { tint } from "./tint.js";

const number = (value, digits) => value.toFixed(digits);

/** Speed, tokens per step and seed of an answer. */
export const factsOf = (answer) => {
  const facts = [`${answer.numTokens} tokens`];
  if (answer.speed !== null) facts.push(`${number(answer.speed, 0)} tokens/s`);
  if (answer.acceptance !== null) facts.push(`${number(answer.acceptance, 2)} tokens per drafted step`);
  facts.push(`seed ${answer.seed}`);
  if (answer.finish === "length") facts.push("cut by the limit");
  if (answer.stopped) facts.push("stopped");
  return facts.join(" · ");
};

const problemText = (error) => {
  if (error.status !== 429) return error.message;
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  return `The server is busy. ${error.message}${wait}`;
};

/** The text of an answer, or of a message from an earlier visit: `{content, reasoning}`. */
export class AnswerView {
  constructor(answer) {
    this.answer = answer;
    this.thinking = make("div");
    this.thought = make("details", { className: "thinking", hidden: true }, make("summary", {}, "Reasoning"), this.thinking);
    this.prose = make("div", { className: "prose" });
    this.problem = make("p", { className: "problem", hidden: true, role: "alert" });
    this.element = make("div", { className: "answer" }, this.thought, this.prose, this.problem);
  }

  render() {
    const { content, reasoning, tokens = [], running, problem } = this.answer;
    this.thought.hidden = !reasoning;
    this.thinking.textContent = reasoning ?? "";
    const fragment = rendered(content);
    if (tokens.length) tint(fragment, content, tokens);
    this.prose.replaceChildren(fragment);
    this.prose.classList.toggle("waiting", Boolean(running));
    if (tokens.length && !running) {
      this.prose.tabIndex = 0;
      this.prose.setAttribute("role", "group");
      this.prose.setAttribute("aria-label", "Answer. Arrow keys go from token to token.");
    }
    this.problem.hidden = !problem;
    if (problem) this.problem.textContent = problemText(problem);
  }
}

/** Two answers to one prompt, and how they compare. */
export class PairView {
  constructor(first, second) {
    this.views = [first, second].map((answer) => new AnswerView(answer));
    this.speeds = this.views.map(() => make("span", { className: "speed" }));
    const names = ["With speculation", "Without"];
    this.views.forEach((view, at) => view.element.prepend(make("h3", {}, names[at], this.speeds[at])));
    this.verdict = make("p", { className: "verdict", role: "status" });
    const pair = make("div", { className: "pair" }, ...this.views.map((view) => view.element));
    this.element = make("div", {}, pair, this.verdict);
  }

  render() {
    this.views.forEach((view, at) => {
      const { speed } = view.answer;
      this.speeds[at].textContent = speed === null ? "" : `${number(speed, 0)} tokens/s`;
      view.render();
    });
    const [first, second] = this.views.map((view) => view.answer);
    if (second.running || first.problem || second.problem || first.stopped || second.stopped) return;
    const same = first.content === second.content;
    const times = first.speed && second.speed ? ` ${number(first.speed / second.speed, 2)} times the speed.` : "";
    this.verdict.textContent = same ? `The same text, ${times.trim() || "twice."}` : `The texts differ.${times}`;
    this.verdict.classList.toggle("same", same);
  }
}
