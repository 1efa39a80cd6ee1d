// Small helpers to build and find elements. Text is only ever set as text, never as HTML: what a
// model writes and what files are called cannot become part of the page.

export const byId = (id) => document.getElementById(id);

/** A new element. Attributes whose value is null or false are left out; `on` holds listeners. */
export function element(tag, { on = {}, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  for (const [event, listener] of Object.entries(on)) made.addEventListener(event, listener);
  made.append(...children.filter((child) => child !== null));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element of SVG with its attributes. */
export function drawing(tag, attributes = {}) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** One of the icons at the end of index.html. */
export function icon(name) {
  const made = drawing("svg", { "aria-hidden": "true" });
  made.append(drawing("use", { href: `#i-${name}` }));
  return made;
}

/** Read by screen readers, seen by nobody. */
export function announce(text) {
  byId("announcer").textContent = text;
}

let hiding = 0;

/** One sentence at the foot of the page for a while, with at most one thing to do about it. */
export function toast(text, action = null) {
  clearTimeout(hiding);
  const box = byId("toast");
  const button = byId("toast-action");
  byId("toast-text").textContent = text;
  button.hidden = action === null;
  button.textContent = action?.label ?? "";
  button.onclick = () => {
    box.hidden = true;
    action.run();
  };
  box.hidden = false;
  hiding = setTimeout(() => (box.hidden = true), action ? 12000 : 6000);
}

/** "1 point", "2 points". */
export function counted(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** A number with at most so many decimals, without zeros at its end. */
export function short(number, decimals = 1) {
  return String(Number(number.toFixed(decimals)));
}
