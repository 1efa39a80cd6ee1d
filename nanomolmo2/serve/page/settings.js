// What a person sets, kept in this browser. The API key is kept elsewhere (api.js).

import { apiKey } from "./api.js";
import { byId, element } from "./dom.js";

const KEY = "nanomolmo2.settings";
const NUMBERS = ["max_tokens", "max_crops"];

/** The settings and their dialog. `onChange` is called after each change. */
export class Settings {
  constructor(onChange) {
    this.onChange = onChange;
    this.models = [];
    try {
      this.values = JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      this.values = {};
    }
    this.dialog = byId("settings");
    this.listen();
  }

  listen() {
    const on = (id, event, take) =>
      byId(id).addEventListener(event, ({ target }) => {
        take(target);
        this.save();
      });
    on("set-model", "change", ({ value }) => (this.values.model = value));
    on("set-temperature", "input", ({ value }) => (this.values.temperature = Number(value)));
    on("set-remember", "change", ({ checked }) => (this.values.remember = checked));
    on("set-theme", "change", ({ value }) => (this.values.theme = value));
    on("set-key", "input", ({ value }) => apiKey.set(value.trim()));
    for (const name of NUMBERS) {
      on(`set-${name}`, "input", (field) => {
        this.values[name] = field.value && field.validity.valid ? Number(field.value) : null;
      });
    }
    this.dialog.addEventListener(
      "click",
      ({ target }) => target === this.dialog && this.dialog.close(),
    );
  }

  save() {
    try {
      localStorage.setItem(KEY, JSON.stringify(this.values));
    } catch {
      // No room, or not allowed: the settings then last until the page is closed.
    }
    this.show();
    this.onChange();
  }

  setModels(models) {
    this.models = models;
    this.show();
    this.onChange();
  }

  /** The chosen model, or the first; undefined while none is known. */
  get model() {
    return this.models.find(({ id }) => id === this.values.model) ?? this.models[0];
  }

  get abilities() {
    return this.model?.abilities ?? {};
  }

  /** Whether requests hold the earlier turns. Models that never saw a second turn do better without. */
  get remember() {
    return this.values.remember ?? this.abilities.conversation !== false;
  }

  /** The part of a request's body that the settings decide. */
  request() {
    const body = { temperature: this.values.temperature ?? 0 };
    if (this.model) body.model = this.model.id;
    if (this.values.max_tokens) body.max_tokens = this.values.max_tokens;
    if (this.values.max_crops && this.readsCrops) body.max_crops = this.values.max_crops;
    return body;
  }

  /** Models that are not loaded yet may read crops: if they do not, the server says so. */
  get readsCrops() {
    return !this.model?.abilities || this.model.abilities.max_crops !== null;
  }

  open() {
    this.show();
    this.dialog.showModal();
  }

  show() {
    const { values, abilities } = this;
    const options = this.models.map(({ id }) => element("option", { value: id }, id));
    byId("set-model").replaceChildren(...options);
    byId("set-model").value = this.model?.id ?? "";
    byId("set-temperature").value = values.temperature ?? 0;
    byId("temperature-value").textContent = String(values.temperature ?? 0);
    byId("set-remember").checked = this.remember;
    byId("set-theme").value = values.theme ?? "";
    byId("set-key").value = apiKey.get();
    for (const name of NUMBERS) {
      if (document.activeElement !== byId(`set-${name}`))
        byId(`set-${name}`).value = values[name] ?? "";
    }
    const crops = byId("set-max_crops");
    crops.disabled = !this.readsCrops;
    crops.placeholder = this.readsCrops ? String(abilities.max_crops ?? "automatic") : "none";
    if (values.theme) document.documentElement.dataset.theme = values.theme;
    else delete document.documentElement.dataset.theme;
  }
}
