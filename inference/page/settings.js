// The controls beside the conversation: which models answer, and how they choose their words.
import {request} from "./api.js";
import {byId, make} from "./elements.js";
import {t} from "./words.js";

let choices = []; // what the two lists of models offer: a card of /v1/models each, with `label` and `isMix`

// Fills the two lists from the server.
export async function loadModels() {
  const cards = (await (await request("v1/models")).json()).data;
  choices = cards.map((card) => ({...card, isMix: false, label: labelOf(card)}));
  const adapters = cards.filter((card) => card.parent);
  if (adapters.length) {
    const base = cards.find((card) => card.id === adapters[0].parent);
    choices.push({...base, isMix: true, label: t("a mix of adapters")});
  }
  const options = () => choices.map((choice, index) => new Option(choice.label, index));
  byId("model").replaceChildren(...options());
  byId("beside").replaceChildren(new Option(t("nothing"), ""), ...options());
  byId("mix").append(...adapters.map((card) => weightSlider(card.id, Math.round(10 / adapters.length) / 10)));

  const {defaults, max_model_len: most} = cards[0];
  byId("temperature").value = defaults.temperature;
  byId("length").value = defaults.max_tokens;
  byId("length").max = most;
  showSettings();
}

export const areModelsLoaded = () => choices.length > 0;

function labelOf(card) {
  if (card.parent) return `${card.parent} + ${card.id}`;
  return card.kind === "text" ? `${card.id} ${t("(base model)")}` : card.id;
}

function weightSlider(name, weight) {
  const slider = make("input", {type: "range", min: -1, max: 2, step: 0.1, name});
  slider.value = weight; // after min and max, which would clip it
  return make("label", {}, make("span", {}, name), " ", make("output"), slider);
}

// The models that answer, one for each column: {label, kind, thinking, request: what a request says of them}.
export function chosenModels() {
  return [byId("model").value, byId("beside").value].filter((value) => value !== "").map((value) => {
    const {id, label, kind, thinking, isMix} = choices[value];
    if (!isMix) return {label, kind, thinking, request: {model: id}};
    const weights = [...byId("mix").querySelectorAll("input")].map((slider) => [slider.name, slider.valueAsNumber])
      .filter(([, weight]) => weight !== 0);
    const written = weights.map(([name, weight]) => `${weight < 0 ? "−" : "+"} ${Math.abs(weight)} ${name}`);
    const adapters = weights.length ? {adapters: Object.fromEntries(weights)} : {};
    return {label: [id, ...written].join(" "), kind, thinking, request: {model: id, ...adapters}};
  });
}

// The fields of a request that say how a model chooses its tokens.
export function samplingFields(model) {
  const fields = {temperature: byId("temperature").valueAsNumber, max_tokens: byId("length").valueAsNumber || 1};
  if (model.thinking && !byId("thinking").checked) fields.chat_template_kwargs = {enable_thinking: false};
  return fields;
}

export function systemMessages() {
  const content = byId("system").value.trim();
  return content ? [{role: "system", content}] : [];
}

// Shows the values of the sliders, and only those controls that the chosen models have.
export function showSettings() {
  const chosen = chosenModels();
  const indexes = [byId("model").value, byId("beside").value];
  byId("mix").hidden = !indexes.some((index) => choices[index]?.isMix);
  for (const slider of document.querySelectorAll("input[type=range]"))
    slider.parentElement.querySelector("output").value = slider.valueAsNumber.toFixed(1);
  byId("thinking-row").hidden = !chosen.some((model) => model.thinking);
  const isText = chosen.some((model) => model.kind === "text");
  byId("notice").textContent = isText
    ? t("A base model continues your text. It knows no conversation and keeps no history.") : "";
}
