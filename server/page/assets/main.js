// The page: conversations at the left, messages in the middle, what happens inside at the right.

import { Answer, write } from "./answer.js";
import { isReady, models } from "./api.js";
import { showCharts } from "./charts.js";
import { announce, byId, make } from "./dom.js";
import { nextSeed, requestFor, showParameters } from "./parameters.js";
import { begin, store, titleOf } from "./store.js";
import { followToken, hideTip, sayToken, showTip } from "./tip.js";
import { inWords, tree } from "./tree.js";
import { AnswerView, PairView, factsOf } from "./view.js";

const EXAMPLES = [
  "Explain in three sentences why the sky is blue.",
  "Write a Python function that checks whether a word is a palindrome.",
  "Name five rivers of Europe, as a table with the countries they cross.",
];
const WATCH = 5000; // milliseconds between looks at /ready

const state = { model: null, current: store.conversations[0] ?? begin(), running: null, shown: { answer: null, round: -1, follows: true } };
const seenAnswers = new WeakMap(); // message -> its answers, while the page is open
const views = new WeakMap(); // element of an answer's text -> its answer

// --- the server ---------------------------------------------------------------------------------

const askForKey = (problem) => {
  byId("key-error").textContent = store.key ? problem : "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
};

const connect = async () => {
  const ready = await isReady();
  byId("state").className = `state ${ready ? "ready" : "down"}`;
  byId("state").textContent = ready ? "ready" : ready === null ? "not reachable" : "not ready";
  if (!ready || state.model || byId("key-dialog").open) return;
  try {
    const [model] = await models();
    state.model = model.id;
    byId("model").textContent = `${model.id} · ${model.max_model_len ?? "?"} tokens of context`;
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
  }
};

byId("key-form").addEventListener("submit", () => {
  store.key = byId("key").value.trim();
  byId("key").value = "";
  setTimeout(connect);
});

// --- conversations ------------------------------------------------------------------------------

const save = () => {
  if (!store.save()) announce("This browser has no more room: conversations are not kept.");
};

const listConversations = () => {
  const items = store.conversations.map((conversation) => {
    const title = titleOf(conversation);
    const open = make("button", { type: "button", className: "open", title, on: { click: () => show(conversation) } }, title);
    const remove = make("button", { type: "button", className: "delete", aria: { label: `Delete: ${title}` }, on: { click: () => forget(conversation) } }, "×");
    const isCurrent = conversation === state.current;
    if (isCurrent) open.setAttribute("aria-current", "true");
    return make("li", { className: isCurrent ? "current" : "" }, open, remove);
  });
  byId("conversations").replaceChildren(...items);
};

const show = (conversation) => {
  stop();
  state.current = conversation;
  store.conversations = store.conversations.filter((each) => each.messages.length || each === conversation);
  toggle("sidebar", false);
  listConversations();
  showMessages();
  byId("prompt").focus();
};

const forget = (conversation) => {
  if (conversation === state.current) stop();
  store.conversations = store.conversations.filter((each) => each !== conversation);
  save();
  show(conversation === state.current ? (store.conversations[0] ?? begin()) : state.current);
};

// --- messages -----------------------------------------------------------------------------------

const action = (text, act, label = text) =>
  make("button", { type: "button", className: "small", aria: { label }, on: { click: act } }, text);

const copy = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
  } catch {
    announce("The browser does not allow copying here.");
  }
};

const userElement = (message, at) => {
  const text = make("div", { className: "text" }, message.content);
  const actions = make("div", { className: "actions" }, action("Edit", () => edit(element, message, at), "Edit this message"));
  const element = make("article", { className: "message user", aria: { label: "You" } }, text, actions);
  return element;
};

const edit = (element, message, at) => {
  const box = make("textarea", { value: message.content, aria: { label: "Edit the message" } });
  const cancel = () => showMessages();
  const done = (event) => {
    event.preventDefault();
    if (!box.value.trim()) return;
    stop();
    state.current.messages.splice(at);
    send(box.value);
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) done(event);
  });
  const buttons = make("div", { className: "row" }, make("span", { className: "grow" }), make("button", { type: "button", on: { click: cancel } }, "Cancel"), make("button", { className: "primary" }, "Send"));
  element.replaceChildren(make("form", { className: "edit", on: { submit: done } }, box, buttons));
  box.focus();
};

const answerElement = (message, at) => {
  const answers = seenAnswers.get(message) ?? [message];
  const view = answers.length > 1 ? new PairView(...answers) : new AnswerView(answers[0]);
  const facts = make("span", { className: "facts" });
  const actions = make("div", { className: "actions" }, facts);
  const element = make("article", { className: "message assistant", aria: { label: "Answer" } }, view.element, actions);
  const render = () => {
    view.render();
    for (const each of view.views ?? [view]) views.set(each.prose, each.answer);
    const running = answers.some((answer) => answer.running);
    const first = answers[0];
    facts.textContent = first instanceof Answer ? factsOf(first) : (message.facts ?? "");
    actions.replaceChildren(facts);
    if (!running) actions.append(action("Copy", () => copy(message.content), "Copy the answer"), action("Regenerate", () => regenerate(at), "Regenerate the answer"));
  };
  render();
  return { element, render };
};

const welcome = () => {
  const ask = (text) => make("li", {}, make("button", { type: "button", on: { click: () => send(text) } }, text));
  return make("div", { className: "welcome" }, make("h2", {}, "What would you like to know?"),
    make("p", { className: "quiet" }, "The colours of an answer show which tokens were drafted ahead of the model and accepted."),
    make("ul", {}, ...EXAMPLES.map(ask)));
};

const showMessages = () => {
  hideTip();
  const { messages } = state.current;
  const elements = messages.map((message, at) => (message.role === "user" ? userElement(message, at) : answerElement(message, at).element));
  byId("messages").replaceChildren(...(elements.length ? elements : [welcome()]));
  byId("messages").scrollTop = byId("messages").scrollHeight;
  const answers = messages.flatMap((message) => seenAnswers.get(message)?.[0] ?? []);
  showRound(answers.at(-1) ?? null);
};

// --- answers ------------------------------------------------------------------------------------

const send = (text) => {
  state.current.messages.push({ role: "user", content: text });
  const others = store.conversations.filter((each) => each !== state.current);
  store.conversations = [state.current, ...others];
  save();
  listConversations();
  respond(nextSeed());
};

const regenerate = (at) => {
  stop();
  state.current.messages.splice(at);
  respond(nextSeed(true));
};

/** Answer the last message. */
const respond = async (seed) => {
  stop();
  const { messages } = state.current;
  const body = requestFor(state.model ?? "", messages);
  const answers = byId("compare").checked ? [new Answer(true, seed), new Answer(false, seed)] : [new Answer(true, seed)];
  const message = { role: "assistant", content: "" };
  messages.push(message);
  seenAnswers.set(message, answers);
  showMessages();
  const { element, render } = answerElement(message, messages.length - 1);
  byId("messages").lastElementChild.replaceWith(element);
  const run = { controller: new AbortController() };
  state.running = run;
  state.shown = { answer: answers[0], round: -1, follows: true };
  showButtons();
  const later = whenSeen(() => {
    const atEnd = isAtEnd();
    render();
    if (atEnd) byId("messages").scrollTop = byId("messages").scrollHeight;
    if (state.shown.follows && state.shown.answer === answers[0]) showRound(answers[0]);
  });
  for (const answer of answers) { // one after the other: beside each other they would share the speed
    if (run.controller.signal.aborted) answer.running = false;
    else await write(answer, body, run.controller.signal, later);
  }
  later.now(); // whoever sees that the answer has ended finds its last tokens
  finish(message, answers, run);
};

const finish = (message, answers, run) => {
  const [answer] = answers;
  Object.assign(message, { content: answer.content, facts: factsOf(answer) });
  if (answer.reasoning) message.reasoning = answer.reasoning;
  save();
  const { problem } = answers.find((each) => each.problem) ?? {};
  if (problem?.status === 401) askForKey(problem.message);
  announce(problem ? problem.message : `The answer has ended: ${factsOf(answer)}`);
  if (state.running !== run) return;
  state.running = null;
  showButtons();
};

/** Calls `act` at most once a frame, and leaves it no more than a quarter of the time. `now` calls it
 * at once, instead of a call that is planned. */
const whenSeen = (act) => {
  let planned = false;
  let pause = 0;
  const run = () => {
    if (!planned) return;
    planned = false;
    const begun = performance.now();
    act();
    pause = 3 * (performance.now() - begun);
  };
  const later = () => {
    if (planned) return;
    planned = true;
    setTimeout(() => (document.hidden ? run() : requestAnimationFrame(run)), pause);
  };
  later.now = () => {
    planned = true;
    run();
  };
  return later;
};

const isAtEnd = () => {
  const place = byId("messages");
  return place.scrollHeight - place.scrollTop - place.clientHeight < 60;
};

const stop = () => {
  state.running?.controller.abort();
};

const showButtons = () => {
  byId("stop").hidden = !state.running;
  byId("send").hidden = Boolean(state.running);
};

// --- the draft tree -----------------------------------------------------------------------------

/** Show a step of an answer; without a number the last one that was drafted. */
const showRound = (answer, number = null) => {
  if (!answer?.rounds?.length) return;
  const last = answer.rounds.findLastIndex((round, at) => round.nodes.length && answer.tokensOf(at).emitted.length);
  const round = number ?? (last < 0 ? answer.rounds.length - 1 : last);
  state.shown = { answer, round, follows: number === null };
  if (byId("tree-section").open) byId("tree").replaceChildren(tree(answer, round));
  byId("tree-steps").hidden = false;
  byId("tree-text").textContent = inWords(answer.rounds[round], round, answer.rounds.length);
  byId("step-back").disabled = round === 0;
  byId("step-on").disabled = round === answer.rounds.length - 1;
};

const step = (by) => () => showRound(state.shown.answer, state.shown.round + by);
byId("step-back").addEventListener("click", step(-1));
byId("step-on").addEventListener("click", step(1));
byId("tree-section").addEventListener("toggle", () => showRound(state.shown.answer, state.shown.follows ? null : state.shown.round));

// --- tokens -------------------------------------------------------------------------------------

const tokenAt = (element) => {
  const answer = views.get(element.closest(".prose"));
  return answer && { answer, number: Number(element.dataset.token) };
};

const choose = (element) => {
  for (const before of document.querySelectorAll(".tok.chosen")) before.classList.remove("chosen");
  if (!element) return hideTip();
  const found = tokenAt(element);
  if (!found) return hideTip();
  element.classList.add("chosen");
  showTip(element, found.answer.tokens[found.number]);
  return found;
};

byId("messages").addEventListener("pointerover", (event) => choose(event.target.closest("[data-token]")));
byId("messages").addEventListener("pointerleave", () => choose(null));
byId("messages").addEventListener("scroll", (event) => followToken(event.target), { passive: true });
byId("messages").addEventListener("click", (event) => {
  const element = event.target.closest("[data-token]");
  const found = element && choose(element);
  if (found) showRound(found.answer, found.answer.roundOf(found.number));
});
byId("messages").addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const prose = event.target.closest(".prose");
  if (!by || prose !== event.target) return;
  const tokens = [...prose.querySelectorAll("[data-token]")];
  const at = tokens.findIndex((token) => token.classList.contains("chosen"));
  const next = tokens[Math.max(0, Math.min(at + by, tokens.length - 1))];
  if (!next) return;
  event.preventDefault();
  next.scrollIntoView({ block: "nearest" });
  const { answer, number } = choose(next);
  sayToken(answer.tokens[number]);
  showRound(answer, answer.roundOf(number));
});

// --- the frame ----------------------------------------------------------------------------------

const isNarrow = () => matchMedia("(max-width: 72rem)").matches;

const toggle = (name, open) => {
  const place = byId(name);
  const isOpen = place.classList.toggle("open", open);
  byId(`open-${name}`).setAttribute("aria-expanded", String(isOpen));
  if (isOpen) place.querySelector("button, summary").focus();
};

byId("open-sidebar").addEventListener("click", () => toggle("sidebar"));
byId("open-panel").addEventListener("click", () => {
  if (isNarrow()) toggle("panel");
  else byId("open-panel").setAttribute("aria-expanded", String(!document.body.classList.toggle("no-panel")));
});
byId("open-panel").setAttribute("aria-expanded", String(!isNarrow()));

const THEMES = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
const showTheme = () => {
  const theme = document.documentElement.dataset.theme ?? "auto";
  byId("theme").textContent = THEMES[theme][0];
  byId("theme").setAttribute("aria-label", `Colours: ${THEMES[theme][1]}`);
};
byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % names.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  localStorage.setItem("aerie:theme", next);
  showTheme();
});

for (const name of ["tint", "compare"]) {
  byId(name).checked = store.settings[name];
  byId(name).addEventListener("change", () => {
    store.settings[name] = byId(name).checked;
    save();
    showTint();
  });
}
const showTint = () => byId("messages").classList.toggle("tinted", byId("tint").checked);

const prompt = byId("prompt");
const fit = () => {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
};
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!prompt.value.trim() || state.running) return;
  const text = prompt.value;
  prompt.value = "";
  fit();
  send(text);
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", () => show(begin()));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  if (byId("panel").classList.contains("open") || byId("sidebar").classList.contains("open")) {
    toggle("panel", false);
    toggle("sidebar", false);
  } else stop();
});

showTheme();
showTint();
showParameters(byId("parameters"));
listConversations();
showMessages();
showCharts(byId("charts"), () => !document.hidden && byId("server-section").open);
connect();
setInterval(connect, WATCH);
