// Finds the tokens of a text in what Markdown made of it, and gives each an element.

const FAR = 4000; // characters of syntax, such as an address, between two that are shown
const SURE = 16; // characters by which the beginning of a piece is looked for

/** For each character of `content`, the number of its token; -1 where it is not known. */
const owners = (content, tokens) => {
  const owner = new Int32Array(content.length).fill(-1);
  let place = 0;
  tokens.forEach(({ text }, number) => {
    if (!text) return;
    let found = content.startsWith(text, place) ? place : -1;
    let shown = text;
    if (found < 0 && place === 0) { // tokenizers that begin a text with a space
      shown = text.trimStart();
      found = content.startsWith(shown) ? 0 : -1;
    }
    if (found < 0) found = content.indexOf(text, place);
    if (found < 0 || found > place + FAR) return;
    owner.fill(number, found, found + shown.length);
    place = found + shown.length;
  });
  return owner;
};

const isSpace = (letter) => letter === " " || letter === "\n" || letter === "\t";

/** The next white space, if only a little syntax is before it: it may differ from the one shown. */
const spaceAfter = (content, place) => {
  const found = content.slice(place, place + 8).search(/\s/);
  return found < 0 ? -1 : place + found;
};

const BLOCKS = "p, pre, td, th, h1, h2, h3, h4, h5, h6";

/** The text nodes, without the line breaks between blocks. */
const pieces = (root) => {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const piece = walker.currentNode;
    const isBreak = piece.data.includes("\n") && !piece.parentElement?.closest(BLOCKS);
    if (piece.data.trim() || !isBreak) found.push(piece);
  }
  return found;
};

/** Wrap the tokens inside `root` into spans with `data-token`. */
export const tint = (root, content, tokens) => {
  const owner = owners(content, tokens);
  let place = 0;
  for (const piece of pieces(root)) {
    const begin = piece.data.trim() ? content.indexOf(piece.data.slice(0, SURE), place) : -1;
    if (begin >= 0 && begin - place < FAR) place = begin;
    const numbers = [];
    for (const letter of piece.data) {
      let at = content.indexOf(letter, place);
      if (isSpace(letter)) at = spaceAfter(content, place);
      const near = at >= 0 && at - place < FAR;
      numbers.push(near ? owner[at] : (numbers.at(-1) ?? -1));
      if (near) place = at + letter.length;
    }
    piece.replaceWith(...spans(piece.data, numbers, tokens));
  }
};

/** The runs of equal numbers of a text as spans. */
const spans = (text, numbers, tokens) => {
  const letters = [...text];
  const found = [];
  for (let begin = 0; begin < letters.length; ) {
    let end = begin + 1;
    while (end < letters.length && numbers[end] === numbers[begin]) end += 1;
    const part = letters.slice(begin, end).join("");
    found.push(numbers[begin] < 0 ? document.createTextNode(part) : span(part, numbers[begin], tokens));
    begin = end;
  }
  return found;
};

const span = (text, number, tokens) => {
  const element = document.createElement("span");
  const { origin, depth } = tokens[number];
  element.className = `tok ${origin}${origin === "draft" ? ` d${Math.min(depth, 5)}` : ""}`;
  element.dataset.token = number;
  element.textContent = text;
  return element;
};
