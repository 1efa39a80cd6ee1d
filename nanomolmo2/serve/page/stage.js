// The pictures of a chat with the points of one answer on them: which picture, how large, which
// moment of a video, which point is chosen, and where the model looked.

import { colouring, nameOf } from "./answer.js";
import { byId, counted, drawing, element, icon, short } from "./dom.js";
import { Player } from "./player.js";

const MOST_ENLARGED = 4; // a small picture that fills a screen is only blur
const GAP = 16; // pixels between pictures that are shown side by side

export class Stage {
  /** `on`: {select(index), hover(index), remove(number), why(index)}; null as index means none. */
  constructor(on) {
    this.on = on;
    this.media = [];
    this.points = [];
    this.given = null; // the list that the points came in
    this.markers = [];
    this.frames = [];
    this.frameTimes = null;
    this.chosen = null; // the picture that is shown alone; null: all of them
    this.selected = null;
    this.player = null;
    this.seen = null; // where the model looked
    this.canvas = byId("canvas");
    byId("zoom").addEventListener("change", () => this.resize());
    byId("play").addEventListener("click", () => this.player?.toggle());
    byId("scrubber").addEventListener("input", ({ target }) =>
      this.player?.seek(Number(target.value)),
    );
    byId("why").addEventListener("click", () => this.on.why(this.selected));
    new ResizeObserver(() => this.resize()).observe(this.canvas);
  }

  // ---- pictures ----

  /** Shows these media. Those from number `removable` on can be taken away again. */
  show(media, removable) {
    const same =
      media.length === this.media.length && media.every((one, i) => one === this.media[i]);
    this.removable = removable;
    if (!same) {
      this.media = [...media];
      this.chosen = null; // what is new is seen
      this.build();
    }
    this.drawStrip();
  }

  build() {
    this.player?.pause();
    this.player = null;
    this.frames = this.media.map((medium, number) => this.frameOf(medium, number));
    this.canvas.replaceChildren(
      element("div", { class: "frames" }, ...this.frames.map(({ box }) => box)),
    );
    byId("player").hidden = !this.player;
    byId("inspector").hidden = !this.media.length;
    if (this.player) {
      byId("scrubber").max = this.player.duration;
      this.timeChanged(0);
    }
    this.setPoints([]);
    this.choose(this.chosen);
  }

  frameOf(medium, number) {
    const box = element("figure", { class: "frame" });
    let shown;
    if (medium.kind === "video" && (medium.width || !medium.blob)) {
      this.player = new Player(medium, {
        onTime: (time) => this.timeChanged(time),
        onPlay: (playing) => {
          byId("play").setAttribute("aria-label", playing ? "Pause" : "Play");
          byId("play").replaceChildren(icon(playing ? "pause" : "play"));
        },
      });
      shown = this.player.node;
      shown.setAttribute("aria-label", `Video: ${medium.name}`);
      if (medium.frames) shown.setAttribute("role", "img");
    } else if (medium.width) {
      shown = element("img", {
        src: medium.url,
        alt: `Picture ${number + 1}: ${medium.name}`,
        draggable: "false",
      });
    } else {
      const what = medium.kind === "video" ? "video" : "picture";
      shown = element(
        "div",
        { class: "unseen" },
        `This browser cannot show ${medium.name}. You can ask about the ${what} all the same.`,
      );
    }
    shown.classList.add("shown");
    const trails = drawing("svg", {
      class: "trails",
      viewBox: "0 0 1 1",
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    });
    const layer = element("div", { class: "layer" });
    box.append(shown, trails, layer);
    return { box, shown, trails, layer, medium };
  }

  /** Shows one picture alone, by its number from 0, or all of them (null). */
  choose(number) {
    this.chosen = number;
    for (const [i, { box }] of this.frames.entries()) box.hidden = number !== null && i !== number;
    this.drawStrip();
    this.resize();
  }

  drawStrip() {
    const several = this.media.length > 1;
    const items = this.media.map((medium, i) => this.stripItem(medium, i, several));
    if (several) items.unshift(this.stripButton(null, "All pictures", "All"));
    byId("strip").replaceChildren(...items);
  }

  /** A small picture to choose, or of a single one its name; with a button to take it away. */
  stripItem(medium, i, several) {
    const item = element("span", { class: several ? "pic-item" : "pic-name" });
    if (several) {
      const picture = medium.thumb ? element("img", { src: medium.thumb, alt: "" }) : icon("image");
      const name = `${medium.kind === "video" ? "Video" : "Picture"} ${i + 1}: ${medium.name}`;
      item.append(
        this.stripButton(i, name, picture),
        element("span", { class: "pic-number", "aria-hidden": "true" }, String(i + 1)),
      );
    } else {
      const size = medium.width ? `${medium.width} × ${medium.height}` : "";
      item.append(element("b", {}, medium.name), element("small", {}, size));
    }
    if (i >= this.removable) {
      const remove = {
        type: "button",
        class: "pic-remove",
        "aria-label": `Remove ${medium.name}`,
        title: "Remove",
      };
      item.append(
        element("button", { ...remove, on: { click: () => this.on.remove(i) } }, icon("close")),
      );
    }
    return item;
  }

  stripButton(number, label, content) {
    const pressed = String(this.chosen === number);
    const attributes = {
      type: "button",
      class: "pic",
      "aria-pressed": pressed,
      "aria-label": label,
      title: label,
    };
    return element("button", { ...attributes, on: { click: () => this.choose(number) } }, content);
  }

  /** The pixels that the page has for each picture; the rest is told by CSS and shares of sides. */
  resize() {
    const shown = this.frames.filter((_, i) => this.chosen === null || this.chosen === i);
    const zoom = byId("zoom").value;
    const style = getComputedStyle(this.canvas);
    const room = {
      width:
        this.canvas.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight),
      height:
        this.canvas.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom),
    };
    if (room.width <= 0 || !shown.length) return;
    const columns = bestColumns(shown.length, room);
    const rows = Math.ceil(shown.length / columns);
    const cell = {
      width: (room.width - (columns - 1) * GAP) / columns,
      height: Math.max(120, (room.height - (rows - 1) * GAP) / rows),
    };
    for (const { box, medium } of shown) {
      const [width, height] = medium.width
        ? [medium.width, medium.height]
        : (medium.unseenSize ?? [640, 480]);
      const fit = Math.min(cell.width / width, cell.height / height, MOST_ENLARGED);
      const scale = zoom === "fit" ? fit : Number(zoom);
      box.style.width = `${width * scale}px`;
      box.style.height = `${height * scale}px`;
    }
    this.canvas.firstChild.style.gridTemplateColumns = `repeat(${columns}, max-content)`;
  }

  // ---- points ----

  /** The points of an answer, all of them each time; markers that are there already stay. */
  setPoints(points, frameTimes = null) {
    if (points === this.given && frameTimes === this.frameTimes) return;
    this.given = points;
    const grows =
      points.length >= this.points.length && this.points.every((one, i) => same(one, points[i]));
    this.frameTimes = frameTimes;
    if (!grows) {
      for (const { marker } of this.markers) marker.remove();
      this.markers = [];
      this.select(null);
    }
    this.points = [...points];
    const colour = colouring(points);
    for (let i = 0; i < points.length; i++) {
      this.markers[i] ??= this.addMarker(i);
      const { fill, ink } = colour(points[i]);
      Object.assign(this.markers[i].marker.style, { backgroundColor: fill, color: ink });
    }
    this.drawTrails(colour);
    this.drawTicks();
    this.drawLegend(colour);
    if (this.player) this.timeChanged(this.player.time);
    this.setTabStop();
  }

  addMarker(index) {
    const point = this.points[index];
    const number = point.time == null ? (point.image ?? 1) - 1 : 0;
    const marker = element(
      "button",
      {
        type: "button",
        class: "marker",
        "data-point": index,
        "aria-label": nameOf(this.points, index, this.media.length > 1),
        on: {
          click: () => this.on.select(this.selected === index ? null : index),
          mouseenter: () => this.on.hover(index),
          mouseleave: () => this.on.hover(null),
          focus: () => this.on.hover(index),
          blur: () => this.on.hover(null),
          keydown: (event) => this.moveFocus(event, index),
        },
      },
      String(point.id ?? index + 1),
    );
    // Points of a video come and go with its moments: only those of pictures arrive with a movement.
    if (point.time == null) marker.classList.add("fresh");
    marker.onanimationend = () => marker.classList.remove("fresh");
    marker.style.left = `${100 * point.x_share}%`;
    marker.style.top = `${100 * point.y_share}%`;
    this.frames[number]?.layer.append(marker);
    return { marker, number };
  }

  /** Arrow keys go from point to point, also to another picture or moment. */
  moveFocus(event, index) {
    const last = this.points.length - 1;
    const steps = {
      ArrowRight: index + 1,
      ArrowDown: index + 1,
      ArrowLeft: index - 1,
      ArrowUp: index - 1,
      Home: 0,
      End: last,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.focus(Math.min(last, Math.max(0, steps[event.key])));
  }

  focus(index) {
    this.bring(index);
    this.setTabStop(index);
    this.markers[index].marker.focus({ preventScroll: false });
  }

  /** Makes a point's picture, or its moment, the one that is shown. */
  bring(index) {
    const { number } = this.markers[index];
    if (this.chosen !== null && this.chosen !== number) this.choose(number);
    const { time } = this.points[index];
    if (time != null && this.player) {
      this.player.pause();
      this.player.seek(time);
      this.timeChanged(time);
    }
  }

  /** One of the markers can be reached with the Tab key; arrow keys reach the others. */
  setTabStop(index = null) {
    const visible = (i) => this.markers[i] && !this.markers[i].marker.hidden;
    const stop =
      index ??
      (visible(this.selected) ? this.selected : this.markers.findIndex((_, i) => visible(i)));
    for (const [i, { marker }] of this.markers.entries()) marker.tabIndex = i === stop ? 0 : -1;
  }

  highlight(index) {
    this.canvas.classList.toggle("pointing", index !== null);
    for (const [i, { marker }] of this.markers.entries())
      marker.classList.toggle("near", i === index);
  }

  select(index) {
    this.selected = index;
    for (const [i, { marker }] of this.markers.entries()) {
      marker.classList.toggle("chosen", i === index);
      marker.setAttribute("aria-pressed", String(i === index));
    }
    this.heat(null);
    byId("detail").hidden = index === null;
    byId("legend").hidden = index !== null;
    if (index === null) return;
    this.bring(index);
    byId("detail-text").textContent = this.describe(index);
    this.setTabStop();
  }

  describe(index) {
    const point = this.points[index];
    const facts = [];
    if (point.time != null) facts.push(`at ${point.time.toFixed(1)}\u00a0s`);
    else if (this.media.length > 1) facts.push(`picture\u00a0${point.image}`);
    facts.push(`x\u00a0${short(point.x)}, y\u00a0${short(point.y)}\u00a0pixels`);
    if (point.confidence != null) facts.push(`confidence ${Math.round(100 * point.confidence)} %`);
    return `Point ${point.id ?? index + 1}${point.label ? `, ${point.label}` : ""}: ${facts.join(" · ")}`;
  }

  drawLegend(colour) {
    const groups = new Map();
    for (const point of this.points) {
      const label = point.label || "point";
      const key = point.time == null ? label : `${label} ${point.id}`;
      if (!groups.has(key)) groups.set(key, { label, point, number: 0 });
      groups.get(key).number++;
    }
    const items = [...groups.values()].map(({ label, point, number }) => {
      const dot = element("span", { class: "dot", "aria-hidden": "true" });
      dot.style.backgroundColor = colour(point).fill;
      const amount = point.time == null ? String(number) : counted(number, "moment");
      return element("li", {}, dot, element("span", {}, label), element("b", {}, amount));
    });
    byId("legend").replaceChildren(...items);
    byId("hint").hidden = items.length > 0;
  }

  // ---- moments of a video ----

  timeChanged(time) {
    if (!this.player) return;
    byId("scrubber").value = time;
    byId("scrubber").setAttribute(
      "aria-valuetext",
      `${time.toFixed(1)} of ${this.player.duration.toFixed(1)} seconds`,
    );
    byId("clock").textContent = `${time.toFixed(1)} s`;
    const now = this.momentAt(time);
    if (this.seen) this.drawHeat();
    for (const [i, { marker }] of this.markers.entries()) {
      const { time: own } = this.points[i];
      marker.hidden = own != null && (now === null || Math.abs(own - now) > 0.051);
    }
    if (!this.markers.some(({ marker }) => marker === document.activeElement)) this.setTabStop();
  }

  /** The moment that the model saw last: points are shown until it saw the next one. */
  momentAt(time) {
    const seen = this.frameTimes?.length ? this.frameTimes : this.moments();
    return seen.findLast((moment) => moment <= time + 0.02) ?? null;
  }

  moments() {
    const times = this.points.map((point) => point.time).filter((time) => time != null);
    return [...new Set(times)].sort((a, b) => a - b);
  }

  drawTicks() {
    const ticks = this.player ? this.moments() : [];
    byId("ticks").replaceChildren(
      ...ticks.map((time) => {
        const tick = element("i");
        tick.style.left = `${(100 * time) / Math.max(this.player.duration, 0.001)}%`;
        return tick;
      }),
    );
  }

  /** The way of each thing through a video, as a line. */
  drawTrails(colour) {
    for (const { trails } of this.frames) trails.replaceChildren();
    if (!this.player) return;
    const ways = Map.groupBy(this.points, (point) => `${point.label} ${point.id}`);
    for (const way of ways.values()) {
      if (way.length < 2) continue;
      const line = {
        points: way.map((p) => `${p.x_share},${p.y_share}`).join(" "),
        stroke: colour(way[0]).fill,
      };
      this.frames[0].trails.append(
        drawing("polyline", { ...line, class: "under" }),
        drawing("polyline", line),
      );
    }
  }

  // ---- where the model looked ----

  /** Draws the weights of /v1/attention over the pictures: {images, note}; null takes them away. */
  heat(seen) {
    this.seen = seen;
    byId("why").setAttribute("aria-pressed", String(seen !== null));
    byId("why").textContent = seen ? "Hide" : "Why there?";
    byId("evidence").hidden = seen === null;
    byId("evidence").textContent = seen?.note ?? "";
    this.drawHeat();
  }

  /** Of a video there is a map a frame: that of the moment which is shown. */
  drawHeat() {
    for (const { box } of this.frames) box.querySelector(".heat")?.remove();
    if (!this.seen) return;
    const maps = this.seen.images;
    const now = this.player && maps.findLast(({ time }) => time <= this.player.time + 0.02);
    for (const [i, map] of (this.player ? [now ?? maps[0]] : maps).entries()) {
      this.frames[i]?.shown.after(heatMap(map));
    }
  }

  /** What is shown of picture number `i`, to be drawn elsewhere, and its points. */
  snapshot(i) {
    const { shown, medium } = this.frames[i];
    const visible = this.points.filter(
      (_, k) => this.markers[k].number === i && !this.markers[k].marker.hidden,
    );
    return {
      source: shown,
      width: medium.width,
      height: medium.height,
      name: medium.name,
      points: visible,
    };
  }
}

/** The number of columns in which pictures of equal sides come out largest. */
function bestColumns(count, room) {
  let best = 1;
  let largest = 0;
  for (let columns = 1; columns <= count; columns++) {
    const side = Math.min(room.width / columns, room.height / Math.ceil(count / columns));
    if (side > largest + 1) [best, largest] = [columns, side];
  }
  return best;
}

/** Weights as a small canvas that CSS stretches over its picture. */
function heatMap({ rows, cols, weights }) {
  const canvas = element("canvas", {
    class: "heat",
    width: cols,
    height: rows,
    "aria-hidden": "true",
  });
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(cols, rows);
  const all = weights.flat();
  const most = Math.max(...all);
  const least = Math.min(...all);
  for (const [i, weight] of all.entries()) {
    const share = most > least ? (weight - least) / (most - least) : 0;
    // What was not looked at falls into the dark, what was looked at stays as it is.
    pixels.data.set([0, 0, 0, Math.round(200 * (1 - share) ** 1.5)], 4 * i);
  }
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

function same(a, b) {
  return (
    a.x_share === b.x_share &&
    a.y_share === b.y_share &&
    a.id === b.id &&
    a.image === b.image &&
    a.time === b.time
  );
}
