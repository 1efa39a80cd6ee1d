// What finding draws on the pictures: things with their numbers, examples and counter-examples, and
// a cross by which the keyboard shows a place.

import { announce, element } from "./dom.js";

const STEP = 8; // pixels of the screen that an arrow key moves the cross; with Shift one
const [SMALLEST, LARGEST] = [14, 26]; // of a mark, pixels of the screen
const ROOMY = 25; // so many marks tell their confidence without being asked

export class Marks {
  /** `on`: {place(medium, x, y), toggle(mark), hover(number or null)}. */
  constructor(on) {
    this.on = on;
    this.frames = [];
    this.buttons = new Map(); // place -> its mark and its button
    this.sizes = new ResizeObserver(() => this.fit());
  }

  /** Draws marks as `arrange` of find.js makes them; buttons at places that stay are kept. */
  draw(frames, marks, reference) {
    for (const frame of this.frames) if (!frames.includes(frame)) this.leave(frame);
    this.frames = [...frames];
    for (const frame of frames) this.enter(frame, frame.medium === reference);
    const drawn = new Map();
    for (const mark of marks) {
      const frame = frames.find(({ medium }) => medium === mark.medium);
      const key = `${frames.indexOf(frame)} ${mark.x.toFixed(4)} ${mark.y.toFixed(4)}`;
      if (!frame || drawn.has(key)) continue;
      const kept = this.buttons.get(key) ?? { button: this.buttonOf(key), frame };
      drawn.set(key, { ...kept, mark });
    }
    const focused = [...this.buttons].find(([, one]) => one.button === document.activeElement);
    for (const [key, { button }] of this.buttons) if (!drawn.has(key)) button.remove();
    this.buttons = drawn;
    for (const one of drawn.values()) this.tell(one);
    this.setTabStop();
    if (focused && !drawn.has(focused[0])) focused[1].frame.pad?.focus();
    this.fit();
  }

  remove() {
    this.draw([], [], null);
  }

  enter(frame, isReference) {
    if (!frame.pad) {
      frame.cross = element("div", { class: "cross", "aria-hidden": "true" });
      frame.pad = element("div", {
        class: "pad",
        tabindex: 0,
        role: "application",
        "aria-describedby": "pad-help",
        on: {
          click: (event) => this.clicked(event, frame),
          keydown: (event) => this.pressed(event, frame),
        },
      });
      frame.place = { x: 0.5, y: 0.5 };
      this.moveCross(frame, 0, 0);
      frame.layer.before(frame.pad);
      frame.layer.after(frame.cross); // over the marks
      this.sizes.observe(frame.box);
    }
    const what = isReference ? "Reference" : "Picture";
    frame.pad.setAttribute("aria-label", `${what} ${frame.medium.name}: show an example`);
  }

  leave(frame) {
    this.sizes.unobserve(frame.box);
    frame.pad?.remove();
    frame.cross?.remove();
    frame.pad = null;
  }

  // ---- showing a place ----

  clicked(event, frame) {
    const { left, top, width, height } = frame.pad.getBoundingClientRect();
    frame.place = { x: (event.clientX - left) / width, y: (event.clientY - top) / height };
    this.moveCross(frame, 0, 0);
    this.on.place(frame.medium, frame.place.x, frame.place.y);
  }

  pressed(event, frame) {
    const step = event.shiftKey ? 1 : STEP;
    const ways = {
      ArrowLeft: [-step, 0],
      ArrowRight: [step, 0],
      ArrowUp: [0, -step],
      ArrowDown: [0, step],
    };
    if (event.key in ways) {
      const { x, y } = this.moveCross(frame, ...ways[event.key]);
      frame.cross.scrollIntoView({ block: "nearest", inline: "nearest" });
      const { width, height } = frame.medium;
      announce(`x ${Math.round(x * width)}, y ${Math.round(y * height)}`);
    } else if (event.key === "Enter" || event.key === " ") {
      this.on.place(frame.medium, frame.place.x, frame.place.y);
    } else return;
    event.preventDefault();
  }

  /** Moves the cross by pixels of the screen. Returns its place. */
  moveCross(frame, right, down) {
    const { width, height } = frame.box.getBoundingClientRect();
    const within = (share) => Math.min(1, Math.max(0, share));
    frame.place = {
      x: within(frame.place.x + right / (width || 1)),
      y: within(frame.place.y + down / (height || 1)),
    };
    frame.cross.style.left = `${100 * frame.place.x}%`;
    frame.cross.style.top = `${100 * frame.place.y}%`;
    return frame.place;
  }

  // ---- marks ----

  buttonOf(key) {
    return element("button", {
      type: "button",
      on: {
        click: () => this.on.toggle(this.buttons.get(key).mark),
        mouseenter: () => this.on.hover(this.numberOf(key)),
        mouseleave: () => this.on.hover(null),
        focus: () => this.on.hover(this.numberOf(key)),
        blur: () => this.on.hover(null),
        keydown: (event) => this.moveFocus(event, key),
      },
    });
  }

  numberOf(key) {
    return this.buttons.get(key)?.mark.thing?.id ?? null;
  }

  tell({ mark, button, frame }) {
    const { thing, example, counter } = mark;
    const kind = counter ? "wrong" : example ? "meant" : "thing";
    const sure = thing ? `${Math.round(100 * thing.confidence)} %` : "";
    const said = {
      thing: `Thing ${thing?.id}, confidence ${sure}. Not meant? Click it away`,
      meant: thing
        ? `Thing ${thing.id}, your example, confidence ${sure}. Click takes the example back`
        : "Your example. Click takes it back",
      wrong: "Not meant. Click takes this back",
    }[kind];
    const look = `marker find ${kind}`;
    if (button.className !== look) button.className = look;
    button.setAttribute("aria-label", said);
    button.title = said;
    button.style.left = `${100 * mark.x}%`;
    button.style.top = `${100 * mark.y}%`;
    const text = counter ? "×" : thing ? String(thing.id) : "+";
    button.replaceChildren(text, element("span", { class: "sure", "aria-hidden": "true" }, sure));
    if (button.parentNode !== frame.layer) frame.layer.append(button);
  }

  /** One mark can be reached with the Tab key; arrow keys reach the others. */
  setTabStop(stop = null) {
    const all = [...this.buttons.values()].map(({ button }) => button);
    const chosen = stop ?? (all.includes(document.activeElement) ? document.activeElement : all[0]);
    for (const button of all) button.tabIndex = button === chosen ? 0 : -1;
  }

  moveFocus(event, key) {
    const keys = [...this.buttons.keys()];
    const at = keys.indexOf(key);
    const steps = {
      ArrowRight: at + 1,
      ArrowDown: at + 1,
      ArrowLeft: at - 1,
      ArrowUp: at - 1,
      Home: 0,
      End: keys.length - 1,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const to = keys[Math.min(keys.length - 1, Math.max(0, steps[event.key]))];
    this.focusButton(this.buttons.get(to).button);
  }

  /** Goes to the mark of a thing's number. */
  focus(number) {
    const one = [...this.buttons.values()].find(({ mark }) => mark.thing?.id === number);
    if (one) this.focusButton(one.button);
  }

  focusButton(button) {
    this.setTabStop(button);
    button.focus();
  }

  highlight(number) {
    for (const { button, mark } of this.buttons.values())
      button.classList.toggle("near", number !== null && mark.thing?.id === number);
  }

  // ---- room ----

  /** Marks become smaller where they would lie over each other. */
  fit() {
    const roomy = this.buttons.size <= ROOMY;
    for (const frame of this.frames) {
      const own = [...this.buttons.values()].filter((one) => one.frame === frame);
      const { width, height } = frame.box.getBoundingClientRect();
      const places = own.map(({ mark }) => ({ x_share: mark.x, y_share: mark.y }));
      const room = 0.9 * this.spacing(places, width, height);
      const size = Math.min(LARGEST, Math.max(SMALLEST, room));
      frame.layer.style.setProperty("--mark", `${size}px`);
      frame.layer.classList.toggle("roomy", roomy && room > LARGEST);
    }
  }

  /** The smallest distance between two of these, in pixels of a picture of this size. */
  spacing(points, width, height) {
    let least = Infinity;
    for (const [i, a] of points.entries()) {
      for (const b of points.slice(i + 1)) {
        const apart = [(a.x_share - b.x_share) * width, (a.y_share - b.y_share) * height];
        least = Math.min(least, Math.hypot(...apart));
      }
    }
    return least;
  }
}
