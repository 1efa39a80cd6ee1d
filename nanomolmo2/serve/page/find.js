// Finding by example: a person shows one of the things, and all that is like it lights up. This file
// holds what is shown and what was found; find-marks.js draws it, find-panel.js tells of it.
//
// A place is {medium, x, y}, x and y as shares of the medium's sides. The server is asked with a low
// confidence, and what is shown of its answer is decided here: the slider asks nothing.

import { findLike } from "./api.js";
import { announce, byId, counted, toast } from "./dom.js";
import { Marks } from "./find-marks.js";
import { Panel } from "./find-panel.js";
import { dataURL, readMedium, release } from "./media.js";
import { asCSV, download, overlay } from "./save.js";

const LEAST = 0.05; // confidence that the server is asked with
const USUAL = 0.5;
const USUAL_SIZE = 0.03; // of a thing whose size is unknown, as a share of the picture's longer side
const COLUMNS = ["picture", "id", "x", "y", "x_share", "y_share", "confidence"];

export class Finder {
  /** `on`: {answered(), locked()}: an answer came; the server asks for a key. */
  constructor(stage, settings, on) {
    this.stage = stage;
    this.settings = settings;
    this.on = on;
    this.least = USUAL;
    this.own = []; // media that no chat holds
    this.carries = false; // the next picture is searched by the examples of this one
    this.clear();
    this.marks = new Marks({
      place: (medium, x, y) => this.change(() => this.like.push({ medium, x, y })),
      toggle: (mark) => this.toggle(mark),
      hover: (number) => this.panel.highlight(number),
    });
    this.panel = new Panel({
      least: (value) => {
        this.least = value;
        this.draw();
      },
      image: (number) => this.choose(this.offered[number]),
      reference: (file) => this.takeReference(file),
      leave: () => this.leaveReference(),
      next: (carries) => (this.carries = carries),
      undo: () => this.undo(),
      again: () => this.change(() => (this.like = this.unlike = [])),
      ask: () => this.ask(),
      save: (kind) => this.save(kind),
      hover: (number) => this.marks.highlight(number),
      go: (number) => this.marks.focus(number),
    });
  }

  clear() {
    this.stop();
    this.own.forEach(release);
    this.own = [];
    this.image = this.reference = null;
    this.forget();
  }

  /** Forgets examples and answers; the pictures stay. */
  forget() {
    this.like = [];
    this.unlike = [];
    this.before = []; // earlier examples, for undo
    this.answer = null;
    this.candidates = [];
    this.error = null;
  }

  // ---- showing ----

  /** Shows one of these media with what was found in it. */
  show(media) {
    this.media = media;
    this.offered = media.filter(({ kind, blob, width }) => kind === "picture" && blob && width);
    if (!this.offered.includes(this.image)) {
      this.image = null;
      if (this.offered.length) this.take(this.offered.at(-1));
    }
    const shown = this.image ? [this.reference, this.image].filter(Boolean) : media;
    this.stage.show(shown, shown.length);
    this.stage.setPoints([]);
    this.draw();
  }

  /** Takes everything of it off the pictures. */
  hide() {
    this.stop();
    this.marks.remove();
  }

  draw() {
    const { things, marks } = arrange(this);
    this.things = things;
    this.marks.draw(this.image ? this.stage.frames : [], marks, this.reference);
    this.panel.draw(this);
  }

  // ---- pictures ----

  /** Looks in another picture: by the examples of the reference, or from the beginning. */
  choose(medium) {
    if (medium === this.image) return;
    if (!this.offered.includes(medium)) return toast(`This browser cannot show ${medium.name}.`);
    this.take(medium);
    this.show(this.media);
    if (this.like.length) this.ask();
  }

  take(medium) {
    this.stop();
    if (this.carries && this.image && this.like.length) this.reference ??= this.image;
    if (this.reference === medium) this.reference = null;
    this.carries = false;
    this.image = medium;
    const { like, unlike, reference } = this;
    const stays = (place) => [medium, reference].includes(place.medium);
    this.forget();
    this.like = like.filter(stays);
    this.unlike = unlike.filter(stays);
  }

  async takeReference(file) {
    try {
      const medium = await readMedium(file, { animations: false });
      if (medium.kind !== "picture" || !medium.width)
        throw new Error(`${medium.name} cannot be shown here: choose another picture.`);
      this.own.push(medium);
      this.reference = medium;
      this.forget();
      this.show(this.media);
      announce("Reference added: show an example in it.");
    } catch (error) {
      toast(error.message);
    }
  }

  leaveReference() {
    const { reference } = this;
    this.reference = null;
    const here = ({ medium }) => medium !== reference;
    this.change(() => {
      this.like = this.like.filter(here);
      this.unlike = this.unlike.filter(here);
    });
    this.before = [];
    this.show(this.media);
  }

  // ---- examples ----

  /** A click on a mark: a thing becomes a counter-example, an example is taken back. */
  toggle({ thing, example, counter }) {
    const without = (list, one) => list.filter((place) => place !== one);
    this.change(() => {
      if (counter) {
        this.unlike = without(this.unlike, counter);
        this.putBack(counter.thing);
      } else if (example) this.like = without(this.like, example);
      else this.unlike.push({ medium: this.image, x: thing.x_share, y: thing.y_share, thing });
    });
  }

  /** Shows a thing again that the server left out, until its next answer says more. */
  putBack(thing) {
    if (this.candidates.some(({ x, y }) => x === thing.x && y === thing.y)) return;
    const behind = this.candidates.findIndex(({ id }) => id >= thing.id);
    const at = behind < 0 ? this.candidates.length : behind;
    this.candidates = this.candidates.toSpliced(at, 0, thing);
  }

  change(step) {
    this.before.push([this.like, this.unlike]);
    this.like = [...this.like];
    this.unlike = [...this.unlike];
    step();
    this.ask();
  }

  undo() {
    if (!this.before.length) return;
    [this.like, this.unlike] = this.before.pop();
    this.ask();
    announce("The last step was taken back.");
  }

  // ---- asking ----

  stop() {
    this.running?.abort();
    this.running = null;
  }

  /** Ends what is being looked for; what was found before stays. */
  cancel() {
    this.stop();
    this.draw();
  }

  async ask() {
    this.stop();
    this.error = null;
    if (!this.like.length) {
      this.answer = null;
      this.candidates = [];
      this.unlike = [];
      return this.draw();
    }
    const running = (this.running = new AbortController());
    this.draw();
    try {
      const answer = await findLike(await this.request(), running.signal);
      if (this.running !== running) return;
      this.answer = answer;
      this.candidates = answer.points;
      this.on.answered();
    } catch (error) {
      if (this.running !== running || error.name === "AbortError") return;
      this.error = error.message;
      if (error.status === 401) this.on.locked();
    }
    this.running = null;
    this.draw();
    const problems = this.answer?.problems.join(" ") ?? "";
    if (!this.error) announce(`${counted(this.things.length, "thing")} found. ${problems}`.trim());
  }

  async request() {
    const { image, reference } = this;
    const refers = [...this.like, ...this.unlike].some(({ medium }) => medium === reference);
    const given = ({ medium, x, y }) => {
      const place = [pixels(x, medium.width), pixels(y, medium.height)];
      return refers ? [...place, medium === reference ? 1 : 2] : place;
    };
    const { model, max_crops } = this.settings.request();
    const body = { model, image: await dataURL(image), like: this.like.map(given) };
    if (this.unlike.length) body.unlike = this.unlike.map(given);
    if (refers) body.reference = await dataURL(reference);
    if (max_crops) body.max_crops = max_crops;
    return { ...body, min_confidence: LEAST };
  }

  // ---- taking along ----

  async save(kind) {
    const { image, things } = this;
    const name = `${image.name.replace(/\.[^.]*$/, "")}-found`;
    const points = things.map(({ example, ...point }) => ({ picture: image.name, ...point }));
    if (kind === "csv") {
      download(new Blob([asCSV(points, COLUMNS)], { type: "text/csv" }), `${name}.csv`);
    } else if (kind === "json") {
      const text = JSON.stringify(this.told(points), null, 2);
      download(new Blob([text], { type: "application/json" }), `${name}.json`);
    } else {
      const { shown } = this.stage.frames.find(({ medium }) => medium === image);
      const { width, height } = image;
      const most = this.marks.spacing(things, width, height) / 2.4;
      download(await overlay(shown, width, height, points, points, most), `${name}.png`);
    }
  }

  /** What was found, and how it was asked for. */
  told(points) {
    const given = ({ medium, x, y }) => ({
      picture: medium.name,
      x: pixels(x, medium.width),
      y: pixels(y, medium.height),
    });
    const { name, width, height } = this.image;
    return {
      picture: name,
      width,
      height,
      model: this.answer?.model ?? null,
      count: points.length,
      min_confidence: this.least,
      like: this.like.map(given),
      unlike: this.unlike.map(given),
      problems: this.answer?.problems ?? [],
      points: points.map(({ picture, ...point }) => point),
    };
  }
}

/** Pixels of a share of a side, to tenths. */
function pixels(share, side) {
  return Math.min(side, Math.max(0, Math.round(10 * share * side) / 10));
}

/**
 * What is shown: {things, marks}. Things are the candidates of at least that confidence which nobody
 * clicked away, numbered from 1 on; a thing that an example stands on knows its `example`. Marks are
 * {medium, x, y} with `thing`, `example` or `counter`.
 */
export function arrange({ image, candidates, like, unlike, least }) {
  const free = new Set(candidates);
  const takeNearest = (place, share) => {
    if (place.medium !== image) return null;
    const near = [...free].map((point) => [distance(point, place), point]);
    const [best] = near.sort(([a], [b]) => a - b);
    if (!best || best[0] > share * sizeOf(best[1], image)) return null;
    free.delete(best[1]);
    return best[1];
  };
  // A counter-example stands where a thing was: only that thing is away, not its neighbour.
  const away = new Set(unlike.map((place) => takeNearest(place, 0.2)));
  const meant = new Map(like.map((example) => [takeNearest(example, 0.6), example]));
  const things = candidates
    .filter((point) => !away.has(point) && point.confidence >= least)
    .map((point, i) => ({ ...point, id: i + 1, example: meant.get(point) ?? null }));
  const stands = new Set(things.map(({ example }) => example));
  const marks = things.map((thing) => {
    return { medium: image, x: thing.x_share, y: thing.y_share, thing, example: thing.example };
  });
  for (const example of like) if (!stands.has(example)) marks.push({ ...example, example });
  for (const counter of unlike) marks.push({ ...counter, counter });
  return { things, marks };
}

function distance(point, { medium, x, y }) {
  return Math.hypot((point.x_share - x) * medium.width, (point.y_share - y) * medium.height);
}

/** The longer side of a thing in pixels, as the model guesses it. */
function sizeOf({ size }, { width, height }) {
  return size ?? USUAL_SIZE * Math.max(width, height);
}
