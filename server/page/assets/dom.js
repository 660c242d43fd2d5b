// Elements, without strings of HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; `dataset`, `aria` and `on` are objects of their own. */
export const make = (name, { aria = {}, on = {}, dataset = {}, ...properties } = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  Object.assign(element.dataset, dataset);
  for (const [key, value] of Object.entries(aria)) element.setAttribute(`aria-${key}`, value);
  for (const [event, act] of Object.entries(on)) element.addEventListener(event, act);
  element.append(...children);
  return element;
};

/** The same of SVG, whose properties are attributes. */
export const draw = (name, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

/** For readers of the screen: said once, when the present speech ends. */
export const announce = (text) => { byId("announce").textContent = text; };

/** A token as people can see it. */
export const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
