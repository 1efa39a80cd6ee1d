// What an answer says: its text cut into words and lists of points.
//
//   Counting the <points coords="1 1 250 750 2 500 700">sunflower</points> shows a total of 2.
//
// The server reads the points (they come as events and in the answer); this file only finds where
// in the text they stand, so that each can be shown there as a chip. What it cannot read stays text.

const TAG = /<(points?|tracks)(?=[\s>/]|$)/gi;
const ATTRIBUTE = /([a-z]\w*)\s*=\s*(?:"([^"]*)("|$)|'([^']*)('|$))/gi;
const SELECTED = / ?<POINT_\d*>?/g; // what models write that select instead of naming coordinates
const SCALE = 1000; // coordinates are thousandths of the picture's sides
const NEAR = 0.0016; // shares of a side: rounding to thousandths, and a little

/**
 * A text in parts, in order: {kind: "text", text} and {kind: "points", label, marks, open}.
 *
 * A mark is {place, id, x, y, start} with x and y as shares of the sides; `place` is the number of
 * the picture or, in a video, the time in seconds, `start` where y begins in the text. `open`: the
 * tag has not ended yet.
 */
export function segments(text) {
  const parts = [];
  const say = (words) => {
    const shown = words.replace(SELECTED, "");
    if (shown) parts.push({ kind: "text", text: shown });
  };
  let at = 0;
  for (const found of text.matchAll(TAG)) {
    if (found.index < at) continue;
    say(text.slice(at, found.index));
    const tag = readTag(text, found.index + found[0].length);
    parts.push({ kind: "points", label: tag.label, marks: tag.marks, open: tag.open });
    at = tag.end;
  }
  // An answer that is still being written may end in the first letters of a tag.
  say(text.slice(at).replace(/<\/?[a-z]{0,6}$/i, ""));
  return parts;
}

/** The rest of a tag whose name ends at `from`. */
function readTag(text, from) {
  const attributes = {};
  const unfinished = new Set();
  let end = from;
  for (;;) {
    const gap = /[\s\\]*/y;
    gap.lastIndex = end;
    const start = end + gap.exec(text)[0].length;
    ATTRIBUTE.lastIndex = start;
    const found = ATTRIBUTE.exec(text);
    if (found?.index !== start) break;
    const name = found[1].toLowerCase();
    attributes[name] = found[2] ?? found[4] ?? "";
    const quote = found[3] ?? found[5];
    if (quote === "") unfinished.add(name);
    end = start + found[0].length;
    if (name === "coords") attributes.coordsAt = end - quote.length - attributes.coords.length;
  }
  const close = text.indexOf(">", end);
  const marks = readMarks(attributes, unfinished);
  if (close < 0) return { label: attributes.alt ?? "", marks, open: true, end: text.length };
  if (text[close - 1] === "/") {
    return { label: attributes.alt ?? "", marks, open: false, end: close + 1 };
  }
  const after = /([^<]*)(<\/(?:points?|tracks)>|<\/?[a-z]{0,6}$)?/iy;
  after.lastIndex = close + 1;
  const [whole, label, ending] = after.exec(text);
  const open = !ending?.endsWith(">");
  return {
    label: (label || attributes.alt || "").trim(),
    marks,
    open: open && close + 1 + whole.length === text.length,
    end: close + 1 + whole.length,
  };
}

function readMarks(attributes, unfinished) {
  if ("coords" in attributes) {
    return readCoords(attributes.coords, unfinished.has("coords"), attributes.coordsAt);
  }
  // Molmo 1 wrote percent: x="10.5" y="20", or x1, y1, x2, y2, ...
  const marks = [];
  for (let id = 1; ; id++) {
    const suffix = `x${id}` in attributes ? id : id === 1 ? "" : null;
    const [x, y] = suffix === null ? [] : [attributes[`x${suffix}`], attributes[`y${suffix}`]];
    if (x === undefined || y === undefined || unfinished.has(`y${suffix}`)) return marks;
    marks.push({ place: 1, id, x: Number(x) / 100, y: Number(y) / 100 });
  }
}

/** `1 1 210 455 2 640 480;2 3 100 042`: groups of a place and triples of id, x and y. */
function readCoords(value, cut, offset) {
  const marks = [];
  // The last number of a list that is still being written may get more digits.
  const sure = cut ? value.replace(/[^\s;]*$/, "") : value;
  for (const group of sure.matchAll(/[^;\t]+/g)) {
    const words = [...group[0].matchAll(/\S+/g)];
    for (let i = 1; i + 2 < words.length; i += 3) {
      const [id, x, y] = words.slice(i, i + 3).map((word) => Number(word[0]));
      if (![id, x, y].every(Number.isFinite)) continue;
      const start = offset + group.index + words[i + 2].index;
      marks.push({ place: seconds(words[0][0]), id, x: x / SCALE, y: y / SCALE, start });
    }
  }
  return marks;
}

/** `12.5`, `1:05` or `0:01:05.5` as a number. */
function seconds(key) {
  return key.split(":").reduce((sum, part) => 60 * sum + Number(part), 0);
}

/**
 * Gives the points of an answer their places in its text: each list of points gets `indices`, the
 * numbers of its points in `points`. Points that no list names go to the list of their label or to
 * the last one, so that none is lost (what models select, they name by numbers of their own); marks
 * that are no point of the answer (the server left them out) get no chip.
 */
export function placePoints(parts, points) {
  const free = new Set(points.keys());
  const lists = parts.filter((part) => part.kind === "points");
  for (const list of lists) {
    list.indices = [];
    for (const mark of list.marks) {
      for (const index of free) {
        if (!isAt(points[index], mark)) continue;
        free.delete(index);
        list.indices.push(index);
        break;
      }
    }
  }
  if (free.size) {
    if (!lists.length) {
      lists.push({ kind: "points", label: "", marks: [], open: false, indices: [] });
      parts.push(lists[0]);
    }
    for (const index of free) {
      const own = lists.find((list) => list.label && list.label === points[index].label);
      (own ?? lists.at(-1)).indices.push(index);
    }
  }
  return parts;
}

function isAt(point, mark) {
  const place = point.time ?? point.image ?? 1;
  const near = Math.abs(place - mark.place) < 0.051;
  return near && Math.abs(point.x_share - mark.x) < NEAR && Math.abs(point.y_share - mark.y) < NEAR;
}

/**
 * An answer up to the first digit of y of its point number `index`; null where it does not stand
 * there. That is the token which looks most at the place itself: `tiny` looks at the surroundings of
 * its points 2.2 times as much there as anywhere, 1.5 times with the first digit of x (43 points).
 */
export function textUpTo(text, points, index) {
  for (const list of segments(text).filter((part) => part.kind === "points")) {
    const mark = list.marks.find((one) => isAt(points[index], one));
    if (mark?.start !== undefined) return text.slice(0, mark.start + 1);
  }
  return null;
}

/** What a person reads of an answer, without coordinates: for screen readers and titles. */
export function spoken(text) {
  return segments(text)
    .map((part) => (part.kind === "text" ? part.text : part.label))
    .join("")
    .trim();
}

// Told apart by people with colour-blindness too (after Okabe and Ito), each with its text colour:
// the same as of the pictures that the command line draws.
const COLOURS = [
  ["#d6006c", "#fff"],
  ["#0072b2", "#fff"],
  ["#f0c800", "#000"],
  ["#007a5a", "#fff"],
  ["#e66a00", "#000"],
  ["#56b4e9", "#000"],
  ["#6a3d9a", "#fff"],
  ["#b8e000", "#000"],
];

/** A function from a point to its {fill, ink}: one colour a label, in a video one a thing. */
export function colouring(points) {
  const key = (point) => (point.time == null ? (point.label ?? "") : `${point.label} ${point.id}`);
  const keys = [...new Set(points.map(key))];
  return (point) => {
    const [fill, ink] = COLOURS[Math.max(0, keys.indexOf(key(point))) % COLOURS.length];
    return { fill, ink };
  };
}

/** What a chip or a marker is called: "Point 2, sunflower, in picture 1". */
export function nameOf(points, index, several) {
  const point = points[index];
  const label = point.label ? `, ${point.label}` : "";
  const picture = several ? `, in picture ${point.image}` : "";
  const place = point.time == null ? picture : `, at ${point.time.toFixed(1)} seconds`;
  return `Point ${point.id ?? index + 1}${label}${place}`;
}
