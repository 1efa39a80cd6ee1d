// Answers for other programs: JSON, CSV, and pictures with their points.

import { colouring } from "./answer.js";

const COLUMNS = ["id", "label", "image", "time", "x", "y", "x_share", "y_share", "confidence"];

export function asJSON(turn) {
  const { question, model, answer } = turn;
  return JSON.stringify({ question, model, ...answer }, null, 2);
}

/** One line a point under a line of names, after RFC 4180. */
export function asCSV(points, columns = COLUMNS) {
  const cell = (value) => {
    const text = String(value ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const rows = points.map((point) => columns.map((name) => cell(point[name])).join(","));
  return [columns.join(","), ...rows].join("\r\n") + "\r\n";
}

/** Puts a text on the clipboard. Throws where the browser does not allow it. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Addresses without https have no clipboard of the new kind.
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  if (!done) throw new Error("the browser does not allow it");
}

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/**
 * A PNG of what can be drawn, in its own pixels, with points on it. Sizes follow the picture's, as
 * of those that the command line draws; `most` pixels from the middle of a disc to its edge.
 */
export async function overlay(source, width, height, points, all, most = Infinity) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d");
  pen.drawImage(source, 0, 0, width, height);
  const radius = Math.max(5, Math.min(most, Math.max(7, Math.sqrt(width * height) / 40)));
  const colour = colouring(all);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `600 ${1.15 * radius}px system-ui, sans-serif`;
  for (const point of points) {
    const [x, y] = [point.x_share * width, point.y_share * height];
    const { fill, ink } = colour(point);
    const rings = [
      [1.3, "#000"],
      [1.18, "#fff"],
      [1, fill],
    ];
    for (const [share, shade] of rings) {
      pen.beginPath();
      pen.arc(x, y, share * radius, 0, 2 * Math.PI);
      pen.fillStyle = shade;
      pen.fill();
    }
    pen.fillStyle = ink;
    pen.fillText(String(point.id ?? ""), x, y + 0.06 * radius);
  }
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
