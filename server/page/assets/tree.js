// Draws the draft tree of a step: depth from left to right, the accepted path in colour.

import { draw, shown } from "./dom.js";

const LETTER = 7.3, EDGE = 8, GAP = 22, HEIGHT = 22, STEP = 28; // sizes of nodes, and between them
const LETTERS = 14;
const SOURCES = { draft: "the draft head", lookup: "lookup", grammar: "the grammar" };

/** Where each node is: column by depth, row by leaf. Node 0 is the root; the last one is the bonus
 * token, below the last accepted node. */
const placed = (round) => {
  const nodes = [{ parent: null }, ...round.nodes.map(({ token, parent }) => ({ token, parent }))];
  const last = round.accepted.at(-1) ?? 0;
  nodes.push({ parent: last, bonus: true });
  const children = nodes.map(() => []);
  nodes.forEach(({ parent }, at) => { if (parent !== null && parent >= 0) children[parent].push(at); });
  const onPath = new Set([0, ...round.accepted, nodes.length - 1]);
  let row = 0;
  const place = (at, depth) => {
    const node = nodes[at];
    node.depth = depth;
    node.on = onPath.has(at);
    // The text goes straight on: its nodes come first.
    const below = children[at].sort((one, other) => onPath.has(other) - onPath.has(one));
    node.row = row;
    below.forEach((child, index) => {
      if (index) row += 1;
      place(child, depth + 1);
    });
  };
  place(0, 0);
  return { nodes: nodes.filter((node) => node.depth !== undefined), all: nodes, rows: row + 1 };
};

const fitted = (text) => {
  const letters = [...shown(text)];
  return letters.length > LETTERS ? `${letters.slice(0, LETTERS - 1).join("")}…` : letters.join("");
};

/** Where each column begins, and how wide it is: as its longest text. */
const columns = (nodes) => {
  const widths = [];
  for (const { depth, label } of nodes) {
    widths[depth] = Math.max(widths[depth] ?? 30, [...label].length * LETTER + 2 * EDGE);
  }
  let begin = 2;
  return widths.map((width) => {
    const column = { begin, width };
    begin += width + GAP;
    return column;
  });
};

const top = (node) => node.row * STEP + 3;

const edge = (from, to, at) => {
  const [x1, x2] = [at[from.depth].begin + at[from.depth].width, at[to.depth].begin];
  const [y1, y2] = [top(from) + HEIGHT / 2, top(to) + HEIGHT / 2];
  const middle = (x1 + x2) / 2;
  return draw("path", { d: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`, class: to.on ? "on" : "" });
};

const box = (node, { begin, width }) => {
  const kind = node.depth === 0 ? "root" : node.bonus ? "bonus" : node.on ? "on" : "off";
  const text = draw("text", { x: width / 2, y: HEIGHT / 2 + 4, "text-anchor": "middle" }, node.label);
  const frame = draw("rect", { width, height: HEIGHT, rx: 6 });
  return draw("g", { class: kind, transform: `translate(${begin} ${top(node)})` }, frame, text, draw("title", {}, node.token));
};

/** What a step did, in words. */
export const inWords = (round, number, count) => {
  const step = `Step ${number + 1} of ${count}: `;
  if (!round.nodes.length) return `${step}nothing drafted, one token of the model's own`;
  const nodes = `${round.nodes.length} token${round.nodes.length > 1 ? "s" : ""} drafted by ${SOURCES[round.source]}`;
  return `${step}${nodes}, ${round.accepted.length} accepted, and the bonus token`;
};

/** The drawing of round `number` of an answer. */
export const tree = (answer, number) => {
  const round = answer.rounds[number];
  const { before, emitted } = answer.tokensOf(number);
  const { nodes, all, rows } = placed(round);
  all[0].token = before?.text ?? "start";
  all.at(-1).token = emitted[round.accepted.length]?.text ?? "end";
  for (const node of nodes) node.label = fitted(node.token);
  const at = columns(nodes);
  const [width, height] = [at.at(-1).begin + at.at(-1).width + 2, rows * STEP + 2];
  const picture = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  picture.setAttribute("aria-label", inWords(round, number, answer.rounds.length));
  const edges = nodes.filter((node) => node.depth > 0).sort((one, other) => one.on - other.on);
  const boxes = nodes.map((node) => box(node, at[node.depth]));
  picture.append(...edges.map((node) => edge(all[node.parent], node, at)), ...boxes);
  return picture;
};
