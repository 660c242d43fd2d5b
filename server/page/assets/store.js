// Conversations and settings in this browser; the key in this tab.

// Servers under one origin, at other paths, have their own.
const PLACE = `aerie:${location.pathname}:`;
const KEPT = 100;
// The page is there to show drafts, so it wants some where the server would do without. At temperature
// 1, small models soon lose the thread.
const FIRST = { temperature: 0.3, max_tokens: 1024, min_nodes: 3, scored: true, tint: true, compare: false };

const read = (storage, name, otherwise) => {
  try {
    return JSON.parse(storage.getItem(PLACE + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
};

export const store = {
  conversations: read(localStorage, "conversations", []),
  settings: { ...FIRST, ...read(localStorage, "settings", {}) },

  /** False when the browser has no more room, or keeps nothing. */
  save() {
    try {
      const kept = this.conversations.filter((each) => each.messages.length).slice(0, KEPT);
      localStorage.setItem(PLACE + "conversations", JSON.stringify(kept));
      localStorage.setItem(PLACE + "settings", JSON.stringify(this.settings));
      return true;
    } catch {
      return false;
    }
  },

  get key() {
    return read(sessionStorage, "key", "");
  },

  set key(value) {
    sessionStorage.setItem(PLACE + "key", JSON.stringify(value));
  },
};

/** A conversation without messages, the first of all. */
export const begin = () => {
  const empty = store.conversations.find((each) => !each.messages.length);
  if (empty) return empty;
  const conversation = { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, messages: [] };
  store.conversations.unshift(conversation);
  return conversation;
};

export const titleOf = (conversation) => {
  const first = conversation.messages.find((message) => message.role === "user");
  return first ? first.content.trim().replace(/\s+/g, " ").slice(0, 60) || "…" : "New conversation";
};
