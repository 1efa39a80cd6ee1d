// The panel beside the picture while things are found: how many, how sure, by which examples, and
// what can be done with them.

import { byId, counted, element } from "./dom.js";

export class Panel {
  /** `on`: {least, image, reference, leave, next, undo, again, ask, save, hover, go}. */
  constructor(on) {
    this.on = on;
    const listen = (id, event, action) => byId(id).addEventListener(event, action);
    listen("find-least", "input", ({ target }) => on.least(Number(target.value) / 100));
    listen("find-image", "change", ({ target }) => on.image(Number(target.value)));
    listen("pick-reference", "click", () => byId("reference-file").click());
    listen("reference-file", "change", ({ target }) => {
      if (target.files[0]) on.reference(target.files[0]);
      target.value = ""; // the same file can be chosen again
    });
    listen("leave-reference", "click", on.leave);
    listen("find-next", "click", () => {
      on.next(true);
      byId("files").click();
    });
    listen("files", "cancel", () => on.next(false));
    listen("find-undo", "click", on.undo);
    listen("find-again", "click", on.again);
    listen("find-retry", "click", on.ask);
    for (const kind of ["csv", "json", "png"])
      listen(`save-${kind}`, "click", () => on.save(kind));
  }

  draw(finder) {
    const { image, reference, like, unlike, answer, running, error, things, offered } = finder;
    const looks = Boolean(running);
    byId("find-count").textContent = answer ? String(things.length) : "";
    byId("find-noun").textContent = answer
      ? things.length === 1
        ? "thing found"
        : "things found"
      : hintOf(finder);
    byId("find-result").setAttribute("aria-busy", String(looks));
    byId("find-state").textContent = looks ? "Looking …" : stateOf(finder);
    byId("find-error").hidden = !error;
    byId("find-error-text").textContent = error ?? "";
    byId("find-problems").replaceChildren(
      ...(answer?.problems ?? []).map((one) => element("li", {}, one)),
    );
    this.drawLeast(finder);
    this.drawPictures(finder);
    this.drawFound(things);
    byId("find-tools").hidden = !image;
    byId("find-undo").disabled = !finder.before.length;
    byId("find-again").disabled = !like.length && !unlike.length;
    byId("find-next").disabled = !answer;
    for (const kind of ["csv", "json", "png"]) byId(`save-${kind}`).disabled = !answer;
    byId("reference-row").hidden = !reference;
    byId("find-image-row").hidden = offered.length < 2;
  }

  drawLeast({ least }) {
    const percent = `${Math.round(100 * least)} %`;
    byId("find-least").value = Math.round(100 * least);
    byId("find-least").setAttribute("aria-valuetext", percent);
    byId("least-value").textContent = percent;
  }

  drawPictures({ image, reference, offered }) {
    const options = offered.map(({ name }, i) =>
      element("option", { value: i }, `${i + 1}: ${name}`),
    );
    byId("find-image").replaceChildren(...options);
    byId("find-image").value = offered.indexOf(image);
    byId("reference-name").textContent = reference?.name ?? "";
  }

  /** A chip for each thing: its number and how sure it is. */
  drawFound(things) {
    const chips = things.map(({ id, confidence, example }) => {
      const sure = `${Math.round(100 * confidence)} %`;
      const chip = element(
        "button",
        {
          type: "button",
          class: example ? "found-chip meant" : "found-chip",
          "data-thing": id,
          "aria-label": `Thing ${id}, confidence ${sure}: show it on the picture`,
          tabindex: id === 1 ? 0 : -1,
          on: {
            click: () => this.on.go(id),
            mouseenter: () => this.on.hover(id),
            mouseleave: () => this.on.hover(null),
            focus: () => this.on.hover(id),
            blur: () => this.on.hover(null),
            keydown: (event) => this.moveFocus(event, id, things.length),
          },
        },
        element("b", {}, String(id)),
        ` ${sure}`,
      );
      return element("li", {}, chip);
    });
    byId("found").replaceChildren(...chips);
  }

  moveFocus(event, id, last) {
    const steps = {
      ArrowRight: id + 1,
      ArrowDown: id + 1,
      ArrowLeft: id - 1,
      ArrowUp: id - 1,
      Home: 1,
      End: last,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.chip(Math.min(last, Math.max(1, steps[event.key])))?.focus();
  }

  chip(number) {
    return byId("found").querySelector(`[data-thing="${number}"]`);
  }

  highlight(number) {
    for (const chip of byId("found").querySelectorAll(".near")) chip.classList.remove("near");
    if (number !== null) this.chip(number)?.classList.add("near");
  }
}

function hintOf({ image, reference, media }) {
  if (!media?.length) return "Show it a picture first";
  if (!image) return "Things are found in pictures that this browser can show";
  return reference ? "Click one of the things in the reference" : "Click one of the things";
}

/** "2 examples · 1 counter-example · 3 below the confidence · 0.4 s" */
function stateOf({ like, unlike, answer, candidates, things }) {
  const facts = [];
  if (like.length) facts.push(counted(like.length, "example"));
  if (unlike.length) facts.push(counted(unlike.length, "counter-example"));
  const below = candidates.length - things.length;
  if (answer && below > 0) facts.push(`${below} not shown`);
  const { prepare = 0, generate = 0 } = answer?.timings ?? {};
  if (prepare + generate) facts.push(`${(prepare + generate).toFixed(1)} s`);
  return facts.join(" · ");
}
