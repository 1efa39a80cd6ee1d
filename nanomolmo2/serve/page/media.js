// Pictures and videos that people give: read, measured, and made small for the history.
//
// A medium is {kind: "picture" | "video", name, blob, url, width, height, thumb, frames, duration}.
// `frames`, of animated pictures, are [{bitmap, time}]. `width` is 0 where this browser cannot read
// the file: the server may still, and its answer brings the size.

const THUMB = 240; // pixels of the longer side of what the history keeps
const MAX_FRAMES = 240;
const MAX_FRAME_PIXELS = 120e6; // of all frames of an animation together: about half a gigabyte
const ANIMATED = ["image/gif", "image/webp", "image/png", "image/apng", "image/avif"];

/**
 * Reads a file. Throws an Error with a sentence for people if it is neither picture nor video.
 * `animations`: take animated pictures as videos, for models that see videos.
 */
export async function readMedium(file, { animations }) {
  const name = file.name || "picture";
  if (!/^(image|video)\//.test(file.type)) {
    throw new Error(`${name} is neither a picture nor a video.`);
  }
  if (!file.size) throw new Error(`${name} is empty.`);
  const url = URL.createObjectURL(file);
  const medium = {
    kind: "picture",
    name,
    blob: file,
    url,
    width: 0,
    height: 0,
    thumb: null,
    frames: null,
  };
  if (file.type.startsWith("video/")) return readVideo(medium);
  const moving = animations && ANIMATED.includes(file.type);
  const animation = moving ? await readAnimation(file).catch(() => null) : null;
  if (animation) {
    const { bitmap } = animation.frames[0];
    Object.assign(medium, animation, { kind: "video", width: bitmap.width, height: bitmap.height });
    medium.thumb = shrunk(bitmap, bitmap.width, bitmap.height);
    return medium;
  }
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    return medium;
  }
  medium.width = image.naturalWidth;
  medium.height = image.naturalHeight;
  medium.thumb = shrunk(image, medium.width, medium.height);
  return medium;
}

async function readVideo(medium) {
  medium.kind = "video";
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  video.src = medium.url;
  try {
    await new Promise((resolve, reject) => {
      video.onloadeddata = resolve;
      video.onerror = reject;
    });
  } catch {
    return medium;
  }
  medium.width = video.videoWidth;
  medium.height = video.videoHeight;
  medium.duration = await lengthOf(video);
  medium.thumb = shrunk(video, medium.width, medium.height);
  return medium;
}

/** Seconds of a video. Recordings of browsers do not say: their end is looked for. */
async function lengthOf(video) {
  if (Number.isFinite(video.duration)) return video.duration;
  const known = new Promise((resolve) => {
    video.ondurationchange = () => Number.isFinite(video.duration) && resolve();
    setTimeout(resolve, 2000);
  });
  video.currentTime = 1e7;
  await known;
  const length = Number.isFinite(video.duration) ? video.duration : video.currentTime;
  const back = new Promise((resolve) => (video.onseeked = resolve));
  video.currentTime = 0;
  await back;
  return length;
}

/** {frames, duration} of an animated picture; null for a still one. */
async function readAnimation(file) {
  if (!("ImageDecoder" in window)) return null;
  const decoder = new ImageDecoder({ data: await file.arrayBuffer(), type: file.type });
  try {
    await decoder.tracks.ready;
    const count = decoder.tracks.selectedTrack?.frameCount ?? 1;
    if (count < 2 || count > MAX_FRAMES) return null;
    const frames = [];
    let time = 0;
    for (let frameIndex = 0; frameIndex < count; frameIndex++) {
      const { image } = await decoder.decode({ frameIndex });
      if (count * image.displayWidth * image.displayHeight > MAX_FRAME_PIXELS) return null;
      frames.push({ bitmap: await createImageBitmap(image), time });
      const lasts = image.duration ?? 0; // microseconds; 10 ms or less means the usual 100
      time += lasts > 10_000 ? lasts / 1e6 : 0.1;
      image.close();
    }
    return { frames, duration: time };
  } finally {
    decoder.close();
  }
}

/** A small JPEG of what can be drawn, as a data URL. */
function shrunk(source, width, height) {
  const scale = Math.min(1, THUMB / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // JPEG knows nothing transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.75);
}

/** The whole file as a data URL, as requests hold it; made once. */
export function dataURL(medium) {
  medium.data ??= new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${medium.name} cannot be read any more.`));
    reader.readAsDataURL(medium.blob);
  });
  return medium.data;
}

/** Lets go of a medium that is shown no more. */
export function release({ url, frames }) {
  URL.revokeObjectURL(url); // does nothing for the small copies of the history
  for (const { bitmap } of frames ?? []) bitmap.close();
}

/** The files of a drop or a paste. */
export function filesOf(transfer) {
  return [...(transfer?.files ?? [])];
}

/** A file behind one of the page's own addresses. */
export async function fetchFile(address) {
  const relative = address.replace(/^\//, "");
  const response = await fetch(relative);
  if (!response.ok) throw new Error(`The example ${relative} is not there.`);
  const blob = await response.blob();
  return new File([blob], relative.split("/").at(-1), { type: blob.type });
}

/** Lets a person take a picture; null if they close the camera. */
export async function takePicture(dialog) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Error("The camera works only at https addresses and on this computer.");
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    const refused = error.name === "NotAllowedError";
    throw new Error(
      refused ? "The browser was not allowed to use the camera." : "No camera was found.",
    );
  }
  const view = dialog.querySelector("video");
  const [shoot, close] = [dialog.querySelector("#shoot"), dialog.querySelector("#close-camera")];
  try {
    view.srcObject = stream;
    await view.play();
    dialog.showModal();
    const taken = await new Promise((resolve) => {
      shoot.onclick = () => resolve(true);
      close.onclick = dialog.oncancel = () => resolve(false);
    });
    return taken ? await frameOf(view) : null;
  } finally {
    dialog.close();
    view.srcObject = null;
    for (const track of stream.getTracks()) track.stop();
  }
}

async function frameOf(view) {
  const canvas = document.createElement("canvas");
  canvas.width = view.videoWidth;
  canvas.height = view.videoHeight;
  canvas.getContext("2d").drawImage(view, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], "camera.png", { type: "image/png" });
}
