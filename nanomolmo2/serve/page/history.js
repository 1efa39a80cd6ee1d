// Past chats, in this browser only. Pictures are kept as small copies: enough to see what the points
// meant, too little to ask on.

import { byId, counted, element, icon } from "./dom.js";

const KEY = "nanomolmo2.history";
const MOST = 40; // chats

/** All past chats, newest first. */
function pastChats() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

/** Keeps a chat, in place of what was kept of it before. */
export function keepChat(chat) {
  const turns = chat.turns.filter((turn) => turn.answer);
  if (!turns.length) return forgetChat(chat.id);
  const kept = {
    id: chat.id,
    when: Date.now(),
    title: turns[0].question,
    turns: turns.map(({ question, answer, media, model }) => ({
      question,
      answer,
      model,
      media: media.map(({ kind, name, width, height, thumb, duration }) => ({
        kind,
        name,
        width,
        height,
        thumb,
        duration,
      })),
    })),
  };
  store([kept, ...pastChats().filter((one) => one.id !== chat.id)].slice(0, MOST));
}

function forgetChat(id) {
  store(pastChats().filter((one) => one.id !== id));
}

function clearHistory() {
  localStorage.removeItem(KEY);
}

/** A kept chat as the page shows it. */
export function reopened(kept) {
  return {
    id: kept.id,
    readOnly: true,
    suggestions: [],
    turns: kept.turns.map((turn) => ({
      ...turn,
      state: "done",
      text: turn.answer.text,
      points: turn.answer.points,
      media: turn.media.map((medium) => ({ ...medium, url: medium.thumb, frames: null })),
    })),
    waiting: [],
  };
}

/** Oldest chats go first where the browser has no more room. */
function store(chats) {
  for (let count = chats.length; count >= 0; count--) {
    try {
      localStorage.setItem(KEY, JSON.stringify(chats.slice(0, count)));
      return;
    } catch {
      // full, or not allowed at all
    }
  }
}

// ---- the dialog ----

/** Wires the dialog; `onOpen` gets the kept chat that a person chooses. */
export function listenForHistory(onOpen) {
  byId("open-history").addEventListener("click", () => {
    showPast(onOpen);
    byId("history").showModal();
  });
  byId("clear-history").addEventListener("click", () => {
    clearHistory();
    showPast(onOpen);
  });
}

function showPast(onOpen) {
  const past = pastChats();
  const items = past.map((kept) => pastItem(kept, onOpen));
  if (!items.length) {
    const nothing = "Nothing yet: answered questions show up here.";
    items.push(element("li", { class: "fine" }, nothing));
  }
  byId("past").replaceChildren(...items);
  byId("clear-history").hidden = !past.length;
}

function pastItem(kept, onOpen) {
  const medium = kept.turns.flatMap(({ media }) => media)[0];
  const picture = medium?.thumb ? element("img", { src: medium.thumb, alt: "" }) : icon("image");
  const when = new Date(kept.when).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const about = `${counted(kept.turns.length, "question")} · ${when}`;
  const words = element("span", {}, element("b", {}, kept.title), element("small", {}, about));
  const open = element("button", { type: "button", class: "past-chat" }, picture, words);
  open.addEventListener("click", () => {
    byId("history").close();
    onOpen(kept);
  });
  const name = { "aria-label": `Delete ${kept.title}`, title: "Delete" };
  const remove = element("button", { type: "button", class: "tool", ...name }, icon("close"));
  remove.addEventListener("click", () => {
    forgetChat(kept.id);
    showPast(onOpen);
  });
  return element("li", {}, open, remove);
}
