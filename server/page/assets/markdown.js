// Markdown of a model, which nobody should trust, as elements that can do nothing.

import { DOMPurify, MarkdownIt, hljs } from "./vendor.js";

const colours = (code, language) => {
  if (!hljs.getLanguage(language)) return "";
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
};

const reader = new MarkdownIt({ html: false, linkify: false, highlight: colours });
reader.disable("image"); // an address in a text could tell others what was said

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
    "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

/** A fragment. */
export const rendered = (text) => {
  const fragment = DOMPurify.sanitize(reader.render(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
  }
  for (const block of fragment.querySelectorAll("pre")) block.tabIndex = 0; // it may scroll
  return fragment;
};
