// The page: one chat about pictures or a video. This file holds what is going on and tells the
// others what to show; they tell it what a person does.
//
// A chat is {id, turns, waiting, suggestions, readOnly}. `waiting` are pictures that were given and
// not asked about yet; a question takes them along. Pictures are numbered over the whole chat, as
// the answers' points number them.

import { spoken, textUpTo } from "./answer.js";
import { ask, attention, examples, models } from "./api.js";
import { Conversation } from "./chat.js";
import { announce, byId, counted, element, toast } from "./dom.js";
import { Finder } from "./find.js";
import { keepChat, listenForHistory, reopened } from "./history.js";
import { dataURL, fetchFile, filesOf, readMedium, release, takePicture } from "./media.js";
import { asCSV, asJSON, copy, download, overlay } from "./save.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";

const USUAL_QUESTIONS = ["Describe this picture.", "Point to everything."];

let chat = newChat();
let shownTurn = null; // the turn whose points are on the pictures
let stopping = null; // of the answer that is being written
let looking = null; // of the heat map that is being made
let finding = false; // by example, in place of asking

const settings = new Settings(() => showModel());
const stage = new Stage({
  select: (index) => selectPoint(shownTurn, index),
  hover: (index) => highlight(shownTurn, index),
  remove: removeWaiting,
  why: showWhy,
});
const conversation = new Conversation({
  focus: showTurn,
  select: selectPoint,
  hover: highlight,
  copyJSON: (turn) => copied(asJSON(turn), "The answer is on the clipboard as JSON."),
  copyCSV: (turn) => copied(asCSV(turn.points), "The points are on the clipboard as CSV."),
  save: savePictures,
  again: askAgain,
});

const finder = new Finder(stage, settings, { answered: learnAbilities, locked: askForKey });

function newChat() {
  return {
    id: `${Date.now()}-${Math.random().toString(36).slice(2)}`,
    turns: [],
    waiting: [],
    suggestions: null,
    readOnly: false,
  };
}

/** All pictures of the chat in the order of their numbers. */
function allMedia() {
  return [...chat.turns.flatMap(({ media }) => media), ...chat.waiting];
}

// ---- showing ----

function show() {
  const media = allMedia();
  const started = media.length > 0 || (chat.turns.length > 0 && !finding);
  byId("welcome").hidden = started;
  byId("intro").hidden = finding || chat.turns.length > 0;
  byId("canvas").hidden = byId("stage-bar").hidden = !media.length;
  document.body.classList.toggle("started", started);
  byId("add-more").hidden = chat.readOnly || media.some(({ kind }) => kind === "video");
  byId("composer").hidden = finding || chat.readOnly;
  byId("readonly").hidden = !chat.readOnly;
  byId("undo").hidden = !chat.turns.length || stopping !== null;
  byId("stop").hidden = stopping === null;
  byId("send").hidden = stopping !== null;
  showModes();
  if (finding) return finder.show(media);
  stage.show(media, chat.readOnly ? media.length : media.length - chat.waiting.length);
  conversation.show(chat, shownTurn);
  showPoints();
  showSuggestions(media);
}

/** The switch between asking and finding, for models that find. What is not loaded yet may. */
function showModes() {
  const { model } = settings;
  byId("modes").hidden = chat.readOnly || !model || (model.abilities && !model.abilities.find);
  byId("mode-ask").setAttribute("aria-pressed", String(!finding));
  byId("mode-find").setAttribute("aria-pressed", String(finding));
  byId("finder").hidden = !finding;
  byId("turns").hidden = finding;
  byId("chat").setAttribute("aria-label", finding ? "Finding" : "Conversation");
  byId("skip").textContent = finding ? "Skip to what was found" : "Skip to the question";
  byId("skip").setAttribute("href", finding ? "#finder" : "#question");
  document.body.classList.toggle("finding", finding);
}

function setMode(finds) {
  if (finds === finding) return;
  if (!finds) finder.hide();
  finding = finds;
  show();
}

function showPoints() {
  stage.setPoints(shownTurn?.points ?? [], shownTurn?.answer?.video?.frame_times);
}

function showTurn(turn) {
  if (shownTurn === turn) return;
  shownTurn = turn;
  conversation.show(chat, turn);
  showPoints();
  conversation.select(turn, null);
}

function selectPoint(turn, index) {
  showTurn(turn);
  looking?.abort();
  stage.select(index);
  conversation.select(turn, index);
}

function highlight(turn, index) {
  if (turn !== shownTurn) return;
  stage.highlight(index);
  conversation.highlight(turn, index);
}

function showModel() {
  byId("model-name").textContent = settings.model?.id ?? "no model";
  showModes();
  if (byId("modes").hidden) setMode(false);
  const media = allMedia();
  if (media.length) showSuggestions(media);
}

function showSuggestions(media) {
  const asked = new Set(chat.turns.map(({ question }) => question));
  const video = media.some(({ kind }) => kind === "video");
  const usual = media.length && !video && !chat.turns.length ? USUAL_QUESTIONS : [];
  const left = (chat.suggestions ?? usual).filter((question) => !asked.has(question));
  byId("suggestions").replaceChildren(
    ...(stopping ? [] : left).map((question) =>
      element(
        "button",
        { type: "button", class: "suggestion", on: { click: () => askQuestion(question) } },
        question,
      ),
    ),
  );
}

// ---- pictures ----

async function takeFiles(files) {
  if (!files.length) return;
  if (chat.readOnly) startOver();
  const read = [];
  for (const file of files) {
    try {
      read.push(await readMedium(file, { animations: settings.abilities.video !== false }));
    } catch (error) {
      toast(error.message);
    }
  }
  addMedia(read);
}

/** Adds media to the chat: pictures, or one video. */
function addMedia(media) {
  if (!media.length) return;
  const all = [...allMedia(), ...media];
  if (all.some(({ kind }) => kind === "video") && all.length > 1) {
    toast("A chat is about pictures, or about one video.", {
      label: "New chat with it",
      run: () => {
        startOver();
        addMedia(
          media[0].kind === "video" ? [media[0]] : media.filter(({ kind }) => kind !== "video"),
        );
      },
    });
    return;
  }
  const goesOn = chat.turns.length > 0 && !finding;
  chat.waiting.push(...media);
  show();
  if (finding) finder.choose(media.at(-1));
  announce(`${counted(media.length, media[0].kind)} added.`);
  if (goesOn) {
    toast("Added to this chat.", {
      label: "New chat with it instead",
      run: () => {
        startOver(media);
        addMedia(media);
      },
    });
  }
  byId("question").focus();
}

function removeWaiting(number) {
  const asked = allMedia().length - chat.waiting.length;
  chat.waiting.splice(number - asked, 1);
  if (!chat.turns.length && !chat.waiting.length) chat.suggestions = null;
  show();
}

async function openExample(example) {
  const addresses = example.video ? [example.video] : (example.images ?? [example.image]);
  try {
    const files = await Promise.all(addresses.map(fetchFile));
    const media = await Promise.all(
      files.map((file) => readMedium(file, { animations: Boolean(example.video) })),
    );
    chat.suggestions = example.questions;
    addMedia(media);
  } catch (error) {
    toast(error.message);
  }
}

// ---- asking ----

async function askQuestion(question) {
  if (!question.trim() || stopping || chat.readOnly) return;
  const turn = {
    question: question.trim(),
    media: chat.waiting,
    model: settings.model?.id,
    state: "writing",
    text: "",
    points: [],
    answer: null,
    error: null,
  };
  chat.waiting = [];
  chat.turns.push(turn);
  await writeAnswer(turn);
}

/** Fills a turn, which is the last, with the server's answer as it comes. */
async function writeAnswer(turn) {
  const own = chat; // a person may open another chat meanwhile
  const controller = new AbortController();
  stopping = controller;
  shownTurn = turn;
  announce("Looking.");
  show();
  let planned = false;
  const showNews = () => {
    if (planned) return; // words may come faster than a screen shows them
    planned = true;
    requestAnimationFrame(() => {
      planned = false;
      if (chat !== own || turn.state !== "writing") return;
      conversation.update(turn);
      if (shownTurn === turn) showPoints();
    });
  };
  try {
    turn.request = { ...settings.request(), ...(await promptOf(own)) };
    turn.answer = await ask(turn.request, {
      signal: controller.signal,
      onText: (text) => {
        turn.text += text;
        showNews();
      },
      onPoint: (point) => {
        turn.points = [...turn.points, point];
        showNews();
      },
    });
    turn.text = turn.answer.text;
    turn.points = turn.answer.points;
    turn.state = "done";
    takeSizes(turn.answer);
    keepChat(own);
    learnAbilities();
    const marks = turn.points.length
      ? ` ${counted(turn.points.length, "point")} on the picture.`
      : "";
    announce(`${spoken(turn.text)}${marks}`);
  } catch (error) {
    turn.state = error.name === "AbortError" ? "stopped" : "error";
    turn.error = error.message;
    if (error.name === "AbortError") announce("Stopped.");
    else if (error.status === 401) askForKey();
  } finally {
    if (stopping === controller) stopping = null;
    if (chat === own) show();
  }
}

/** What a model can do is known once it is loaded. */
async function learnAbilities() {
  if (settings.model?.abilities) return;
  const found = await models().catch(() => null);
  if (found) settings.setModels(found);
}

function askForKey() {
  toast("The server asks for a key.", { label: "Enter the key", run: () => settings.open() });
}

/** What the server is asked: this question alone, or with the turns before it. */
async function promptOf({ turns }) {
  const pictures = turns.flatMap(({ media }) => media);
  const { question } = turns.at(-1);
  const earlier = turns.slice(0, -1).filter(({ state, text }) => state !== "error" && text);
  if (!settings.remember || !earlier.length) {
    const urls = await Promise.all(pictures.map(dataURL));
    return pictures[0]?.kind === "video"
      ? { question, video: urls[0] }
      : { question, images: urls };
  }
  const messages = [];
  let waiting = []; // pictures of turns that failed belong to the next one
  for (const turn of turns) {
    waiting.push(...turn.media);
    if (turn !== turns.at(-1) && !earlier.includes(turn)) continue;
    const parts = await Promise.all(waiting.map(partOf));
    waiting = [];
    messages.push({ role: "user", content: [...parts, { type: "text", text: turn.question }] });
    if (turn !== turns.at(-1)) messages.push({ role: "assistant", content: turn.text });
  }
  return { messages };
}

async function partOf(medium) {
  const type = medium.kind === "video" ? "video_url" : "image_url";
  return { type, [type]: { url: await dataURL(medium) } };
}

/** Sizes of pictures that the browser cannot show are known from the answer. */
function takeSizes({ images }) {
  for (const [i, medium] of allMedia().entries()) {
    if (medium.width || !images?.[i]) continue;
    medium.unseenSize = [images[i].width, images[i].height];
  }
}

function askAgain(turn) {
  if (stopping || turn !== chat.turns.at(-1)) return;
  chat.turns.pop();
  chat.waiting = [...turn.media, ...chat.waiting];
  askQuestion(turn.question);
}

/** Takes the last turn back: its question can be changed, its pictures wait again. */
function undo() {
  const turn = chat.turns.pop();
  if (!turn) return;
  chat.waiting = [...turn.media, ...chat.waiting];
  shownTurn = chat.turns.at(-1) ?? null;
  byId("question").value = turn.question;
  fitQuestion();
  keepChat(chat);
  show();
  announce("The last question was taken back.");
  byId("question").focus();
}

function stop() {
  stopping?.abort();
}

/** Begins a new chat; media in `kept` will be shown in it. */
function startOver(kept = []) {
  stop();
  stopping = null;
  const left = allMedia().filter((medium) => !kept.includes(medium));
  finder.clear();
  chat = newChat();
  shownTurn = null;
  byId("toast").hidden = true; // what it offers is about the chat that ends
  show();
  left.forEach(release);
}

// ---- what can be done with an answer ----

async function showWhy(index) {
  looking?.abort();
  if (byId("why").getAttribute("aria-pressed") === "true") return stage.heat(null);
  const turn = shownTurn;
  if (!turn?.request) return toast("The pictures of this chat are not here any more.");
  const answer = textUpTo(turn.text, turn.points, index);
  if (answer === null)
    return toast("This model selects places: where it looked behind that is not known.");
  looking = new AbortController();
  byId("why").setAttribute("aria-busy", "true");
  try {
    const { temperature, max_tokens, ...prompt } = turn.request; // the rest is about writing
    const seen = await attention({ ...prompt, answer }, looking.signal);
    if (turn !== shownTurn || stage.selected !== index) return;
    stage.heat(seen);
    announce(`Where the model looked is shown. ${seen.note}`);
  } catch (error) {
    if (error.name !== "AbortError") toast(error.message);
  } finally {
    byId("why").removeAttribute("aria-busy");
  }
}

async function copied(text, done) {
  try {
    await copy(text);
    toast(done);
  } catch (error) {
    toast(`The clipboard cannot be used: ${error.message}.`);
  }
}

/** Downloads the shown pictures with the points of a turn; of a video the moment that is shown. */
async function savePictures(turn) {
  showTurn(turn);
  const numbers = stage.chosen === null ? stage.media.keys() : [stage.chosen];
  for (const i of numbers) {
    const { source, width, height, name, points } = stage.snapshot(i);
    if (!width) continue;
    const blob = await overlay(source, width, height, points, turn.points);
    download(blob, `${name.replace(/\.[^.]*$/, "")}-points.png`);
  }
}

/** Shows a chat of before, to read. */
function reopen(kept) {
  startOver();
  setMode(false);
  chat = reopened(kept);
  shownTurn = chat.turns.at(-1);
  show();
}

// ---- what a person does ----

function fitQuestion() {
  const field = byId("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 180)}px`;
}

function submit() {
  const field = byId("question");
  if (!field.value.trim() || stopping) return field.focus();
  const question = field.value;
  field.value = "";
  fitQuestion();
  askQuestion(question);
}

function listen() {
  const click = (id, action) => byId(id).addEventListener("click", action);
  const question = byId("question");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  question.addEventListener("input", fitQuestion);
  question.addEventListener("keydown", (event) => {
    // Enter that ends the writing of a character, in Japanese for one, is no order to send.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  click("mode-ask", () => setMode(false));
  click("mode-find", () => setMode(true));
  click("stop", stop);
  click("undo", undo);
  click("new-chat", () => {
    startOver();
    byId("pick").focus();
  });
  click("open-settings", () => settings.open());
  click("open-model", () => settings.open());
  listenForHistory(reopen);
  click("pick", () => byId("files").click());
  click("add-more", () => byId("files").click());
  click("open-camera", async () => {
    try {
      const file = await takePicture(byId("camera"));
      if (file) await takeFiles([file]);
    } catch (error) {
      toast(error.message);
    }
  });
  byId("files").addEventListener("change", async ({ target }) => {
    await takeFiles([...target.files]);
    target.value = ""; // the same file can be chosen again
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (stopping) stop();
    else if (finding) finder.cancel();
    else if (stage.selected !== null) selectPoint(shownTurn, null);
    else byId("toast").hidden = true;
  });
  listenForDrops();
}

function listenForDrops() {
  let inside = 0; // enter and leave come for every element below the pointer
  const mark = (change) => {
    inside = change === 0 ? 0 : inside + change;
    document.body.classList.toggle("dropping", inside > 0);
  };
  addEventListener("dragenter", () => mark(1));
  addEventListener("dragleave", () => mark(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    mark(0);
    const files = filesOf(event.dataTransfer);
    if (files.length) takeFiles(files);
    else toast("Only files can be dropped: save the picture first, or copy and paste it.");
  });
  addEventListener("paste", (event) => {
    const files = filesOf(event.clipboardData);
    if (!files.length) return; // a text for the question
    event.preventDefault();
    takeFiles(files);
  });
}

async function showExamples() {
  const offered = await examples();
  const items = offered.map((example) => {
    const picture = element("img", {
      src: example.image.replace(/^\//, ""),
      alt: "",
      width: 96,
      height: 96,
    });
    return element(
      "li",
      {},
      element(
        "button",
        { type: "button", class: "example", on: { click: () => openExample(example) } },
        picture,
        element("span", {}, example.title),
      ),
    );
  });
  byId("example-list").replaceChildren(...items);
  byId("examples").hidden = !items.length;
}

async function connect() {
  try {
    settings.setModels(await models());
    await showExamples();
  } catch (error) {
    settings.setModels([]);
    if (error.status === 401) askForKey();
    else toast(error.message);
  }
}

listen();
show();
connect();
byId("settings").addEventListener("close", () => settings.models.length || connect());
