// The form of sampling parameters, and the request that they make.

import { make } from "./dom.js";
import { store } from "./store.js";

// field of the API, label, properties of its input; an empty input leaves the field to the server
const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05 }],
  ["max_tokens", "Most tokens", { min: 1, step: 1 }],
  ["top_p", "Top p", { min: 0, max: 1, step: 0.05 }],
  ["top_k", "Top k", { min: 0, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }],
  ["seed", "Seed", { min: 0, step: 1, placeholder: "random" }],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1 }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, max: 10, step: 0.05 }],
  ["min_nodes", "Least drafted tokens", { min: 0, max: 63, step: 1, placeholder: "where they pay", title: "In every step, also where plain decoding may be faster" }],
  ["max_nodes", "Most drafted tokens", { min: 0, max: 63, step: 1 }],
];
const OF_SPECULATION = ["min_nodes", "max_nodes"];

export const showParameters = (form) => {
  const { settings } = store;
  const keep = (name, value) => {
    settings[name] = value;
    store.save();
  };
  const system = make("textarea", { rows: 3, value: settings.system ?? "", on: { change: () => keep("system", system.value) } });
  system.id = "system";
  form.append(make("label", { className: "whole", htmlFor: "system" }, "System prompt", system));
  for (const [name, label, limits] of NUMBERS) {
    const input = make("input", { type: "number", id: `set-${name}`, placeholder: "default", ...limits });
    input.value = settings[name] ?? "";
    input.addEventListener("change", () => {
      if (input.reportValidity()) keep(name, input.value === "" ? null : Number(input.value));
    });
    form.append(make("label", { htmlFor: input.id }, label, input));
  }
  const scored = make("input", { type: "checkbox", id: "set-scored", checked: settings.scored });
  scored.addEventListener("change", () => keep("scored", scored.checked));
  form.append(make("label", { className: "switch whole" }, scored, "Ask for probabilities"));
  form.addEventListener("submit", (event) => event.preventDefault());
};

/** A request for the messages so far, without what differs between two answers. */
export const requestFor = (model, messages) => {
  const { settings } = store;
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const said = messages.flatMap(({ role, content }) => (content ? [{ role, content }] : [])); // not failed answers
  const body = { model, messages: [...system, ...said] };
  for (const [name] of NUMBERS) {
    const value = settings[name];
    if (value === null || value === undefined || name === "seed") continue;
    if (OF_SPECULATION.includes(name)) body.speculation = { ...body.speculation, [name]: value };
    else body[name] = value;
  }
  const { min_nodes: least, max_nodes: most } = body.speculation ?? {};
  if (least > most) body.speculation.min_nodes = most;
  if (settings.scored) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return body;
};

/** The seed of the next answer: the one that is set, unless another text is wanted. */
export const nextSeed = (another = false) => {
  const set = store.settings.seed;
  const isSet = set !== null && set !== undefined;
  return isSet && !another ? set : Math.floor(Math.random() * 2 ** 32);
};
