// What is known of a token, where the pointer or the arrow keys are.

import { announce, byId, make, shown } from "./dom.js";

const ORIGINS = {
  bonus: () => "the model's own token",
  draft: (depth) => `drafted at depth ${depth}, and accepted`,
  lookup: (depth) => `looked up in the text before, at depth ${depth}, and accepted`,
  grammar: (depth) => `forced by the grammar, at depth ${depth}`,
};

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 || value === 0 ? `${value.toFixed(1)} %` : "< 0.1 %";
};

const alternatives = (token) => {
  const rows = token.top.flatMap(({ token: text, logprob }) => {
    const part = make("meter", { min: 0, max: 1, value: Math.exp(logprob), aria: { hidden: "true" } });
    return [make("span", {}, shown(text)), part, make("span", {}, percent(logprob))];
  });
  return make("div", { className: "alternatives" }, ...rows);
};

const place = (tip, element) => {
  const at = element.getClientRects()[0];
  if (!at) return;
  const { offsetWidth: width, offsetHeight: height } = tip;
  const below = at.bottom + 8 + height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - height - 8)}px`;
};

let told = null; // the element of the token that the tip tells of

export const showTip = (element, token) => {
  const tip = byId("tip");
  told = element;
  const origin = ORIGINS[token.origin](token.depth);
  const parts = [make("b", {}, shown(token.text)), make("div", {}, origin)];
  if (token.logprob !== null) parts.push(make("div", {}, `probability ${percent(token.logprob)}`));
  if (token.top.length) parts.push(alternatives(token));
  tip.replaceChildren(...parts);
  tip.hidden = false;
  place(tip, element);
};

export const hideTip = () => { byId("tip").hidden = true; };

/** Move with the token when `frame` is scrolled, also by the arrow keys; hide when it is out of sight. */
export const followToken = (frame) => {
  const tip = byId("tip");
  if (tip.hidden) return;
  const [at, seen] = [told.getClientRects()[0], frame.getBoundingClientRect()];
  if (!at || at.bottom < seen.top || at.top > seen.bottom) hideTip();
  else place(tip, told);
};

/** The same for those who hear it. */
export const sayToken = (token) => {
  const chance = token.logprob === null ? "" : `, probability ${percent(token.logprob)}`;
  announce(`${token.text.trim() || shown(token.text)}: ${ORIGINS[token.origin](token.depth)}${chance}`);
};
