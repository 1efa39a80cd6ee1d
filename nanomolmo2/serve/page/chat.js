// The conversation: questions, answers with their points as chips, and what can be done with each.

import { colouring, nameOf, placePoints, segments } from "./answer.js";
import { byId, counted, element, icon } from "./dom.js";

/**
 * Shows the turns of a chat. A turn is {question, media, state, text, points, answer, error, model};
 * `state` is "writing", "done", "stopped" or "error".
 */
export class Conversation {
  /** `on`: {focus(turn), select(turn, index), hover(turn, index), copyJSON, copyCSV, save, again}. */
  constructor(on) {
    this.on = on;
    this.list = byId("turns");
    this.nodes = new Map(); // turn -> its parts
    this.active = null;
  }

  show(chat, active) {
    this.several = chat.turns.flatMap(({ media }) => media).length > 1;
    this.active = active;
    for (const [turn, { item }] of this.nodes) {
      if (chat.turns.includes(turn)) continue;
      item.remove();
      this.nodes.delete(turn);
    }
    for (const turn of chat.turns) {
      if (!this.nodes.has(turn)) this.add(turn);
      this.update(turn);
    }
  }

  add(turn) {
    const pictures = turn.media
      .filter(({ thumb }) => thumb)
      .map(({ thumb, name }) => element("img", { src: thumb, alt: name }));
    const parts = {
      text: element("p", { class: "said" }),
      error: element("p", { class: "refused", role: "alert", hidden: true }),
      meta: element("p", { class: "meta" }),
      actions: element("div", { class: "actions" }),
    };
    const question = element("div", { class: "question" }, element("p", {}, turn.question));
    if (pictures.length) question.prepend(element("div", { class: "given" }, ...pictures));
    const answer = element(
      "div",
      { class: "answer" },
      parts.text,
      parts.error,
      parts.meta,
      parts.actions,
    );
    // A click anywhere on an answer puts its points on the picture; its chips do so for the keyboard.
    answer.addEventListener("click", () => this.on.focus(turn));
    parts.item = element("li", { class: "turn" }, question, answer);
    this.nodes.set(turn, parts);
    this.list.append(parts.item);
    this.scrollToEnd();
  }

  /** Shows what is new of a turn. */
  update(turn) {
    const parts = this.nodes.get(turn);
    const atEnd = this.isAtEnd();
    parts.item.classList.toggle("active", turn === this.active);
    parts.item.classList.toggle("writing", turn.state === "writing");
    parts.text.replaceChildren(...this.wordsOf(turn));
    parts.text.hidden = turn.state === "error" && !turn.text;
    parts.text.setAttribute("aria-busy", String(turn.state === "writing"));
    parts.error.hidden = turn.state !== "error";
    parts.error.textContent = turn.error ?? "";
    parts.meta.textContent = metaOf(turn);
    this.drawActions(turn, parts);
    if (atEnd) this.scrollToEnd();
  }

  wordsOf(turn) {
    const text = turn.answer?.coordinates || turn.text;
    if (!text && turn.state === "writing")
      return [element("span", { class: "looking" }, "Looking …")];
    const colour = colouring(turn.points);
    const nodes = [];
    for (const part of placePoints(segments(text), turn.points)) {
      if (part.kind === "text") nodes.push(part.text);
      else nodes.push(this.chipsOf(turn, part, colour));
    }
    if (turn.state === "writing")
      nodes.push(element("span", { class: "caret", "aria-hidden": "true" }));
    return nodes;
  }

  chipsOf(turn, { label, indices }, colour) {
    const list = element("span", { class: "pointed" });
    if (label) list.append(element("span", { class: "label" }, label), " ");
    for (const index of indices) {
      const point = turn.points[index];
      const name =
        point.time == null ? String(point.id ?? index + 1) : `${point.time.toFixed(1)} s`;
      const chip = element(
        "button",
        {
          type: "button",
          class: point.time == null ? "chip" : "chip wide",
          "data-point": index,
          "aria-label": nameOf(turn.points, index, this.several),
          on: {
            click: (event) => {
              event.stopPropagation();
              this.on.select(turn, index);
            },
            mouseenter: () => this.on.hover(turn, index),
            mouseleave: () => this.on.hover(turn, null),
            focus: () => this.on.hover(turn, index),
            blur: () => this.on.hover(turn, null),
          },
        },
        name,
      );
      const { fill, ink } = colour(point);
      Object.assign(chip.style, { backgroundColor: fill, color: ink });
      list.append(chip);
    }
    return list;
  }

  drawActions(turn, parts) {
    if (parts.drawnFor === turn.state) return;
    parts.drawnFor = turn.state;
    const button = (label, name, action, hint = label) =>
      element(
        "button",
        {
          type: "button",
          class: "tool",
          title: hint,
          on: {
            click: (event) => {
              event.stopPropagation();
              action(turn);
            },
          },
        },
        icon(name),
        element("span", {}, label),
      );
    const buttons = [];
    if (turn.state === "done") {
      buttons.push(button("JSON", "copy", this.on.copyJSON, "Copy the answer as JSON"));
      if (turn.points.length) {
        buttons.push(button("CSV", "copy", this.on.copyCSV, "Copy the points as CSV"));
        buttons.push(
          button("Picture", "download", this.on.save, "Download the picture with its points"),
        );
      }
    }
    if (turn.state === "error" || turn.state === "stopped") {
      buttons.push(button("Ask again", "again", this.on.again));
    }
    parts.actions.replaceChildren(...buttons);
  }

  /** Marks the chips of a point, or none (null). */
  highlight(turn, index) {
    for (const chip of this.list.querySelectorAll(".chip.near")) chip.classList.remove("near");
    if (index !== null) this.chip(turn, index)?.classList.add("near");
  }

  select(turn, index) {
    for (const chip of this.list.querySelectorAll(".chip[aria-pressed]"))
      chip.removeAttribute("aria-pressed");
    if (index !== null) this.chip(turn, index)?.setAttribute("aria-pressed", "true");
  }

  chip(turn, index) {
    return this.nodes.get(turn)?.text.querySelector(`.chip[data-point="${index}"]`);
  }

  isAtEnd() {
    const { scrollTop, clientHeight, scrollHeight } = this.list;
    return scrollTop + clientHeight > scrollHeight - 60;
  }

  scrollToEnd() {
    this.list.scrollTop = this.list.scrollHeight;
  }
}

/** "3 points · count 3 · 42 tokens · 0.6 s" */
function metaOf(turn) {
  const { answer, points, state } = turn;
  if (state === "stopped") return "Stopped.";
  if (!answer) return "";
  const facts = [];
  if (points.length) facts.push(counted(points.length, "point"));
  if (answer.count !== null && answer.count !== undefined) facts.push(`count ${answer.count}`);
  const tokens = answer.output_tokens ?? answer.usage?.completion_tokens;
  if (tokens) facts.push(counted(tokens, "token"));
  if (answer.timings?.generate) facts.push(`${answer.timings.generate.toFixed(1)} s`);
  if (answer.finish_reason === "length") facts.push("cut off at the longest answer");
  if (answer.problems?.length) facts.push(counted(answer.problems.length, "unreadable place"));
  return facts.join(" · ");
}
