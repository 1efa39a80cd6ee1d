// A video, or an animated picture, that can be played and stepped through in one way.

import { element } from "./dom.js";

export class Player {
  /** `onTime(seconds)` is called whenever another moment is shown, `onPlay(playing)` at starts and stops. */
  constructor(medium, { onTime, onPlay }) {
    this.medium = medium;
    this.duration = medium.duration ?? 0;
    this.onTime = onTime;
    this.onPlay = onPlay;
    this.playing = false;
    this.now = 0;
    if (medium.frames) {
      this.node = element("canvas", { width: medium.width, height: medium.height });
      this.drawFrame();
    } else if (medium.blob) {
      this.node = element("video", { src: medium.url, playsinline: true, preload: "auto" });
      this.node.muted = true;
      this.node.addEventListener("seeked", () => this.onTime(this.time));
    } else {
      this.node = element("img", { src: medium.url, alt: "" }); // from the history: one small picture
    }
  }

  get time() {
    return this.node.tagName === "VIDEO" ? this.node.currentTime : this.now;
  }

  seek(time) {
    const inside = Math.min(Math.max(0, time), this.duration);
    this.now = inside;
    if (this.node.tagName === "VIDEO") this.node.currentTime = inside;
    else {
      this.drawFrame();
      this.onTime(inside);
    }
  }

  toggle() {
    if (this.playing) return this.pause();
    if (this.time >= this.duration - 0.05) this.seek(0);
    this.playing = true;
    this.onPlay(true);
    if (this.node.tagName === "VIDEO") this.node.play().catch(() => this.pause());
    let last = performance.now();
    const step = (at) => {
      if (!this.playing) return;
      if (this.node.tagName !== "VIDEO") {
        this.now = Math.min(this.duration, this.now + Math.max(0, at - last) / 1000);
        last = at;
        this.drawFrame();
      }
      this.onTime(this.time);
      if (this.time >= this.duration - 0.01 || this.node.ended) return this.pause();
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  pause() {
    if (this.node.tagName === "VIDEO") this.node.pause();
    if (this.playing) this.onPlay(false);
    this.playing = false;
  }

  drawFrame() {
    if (!this.medium.frames) return;
    const frame = this.medium.frames.findLast(({ time }) => time <= this.now + 0.001);
    if (frame === this.drawn) return;
    this.drawn = frame;
    const pen = this.node.getContext("2d");
    pen.clearRect(0, 0, this.node.width, this.node.height);
    pen.drawImage(frame.bitmap, 0, 0);
  }
}
