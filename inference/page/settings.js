// The controls beside the conversation: which models answer, and how they choose their words.
import {request} from "./api.js";
import {byId, make} from "./elements.js";
import {t} from "./words.js";

let choices = []; // what the two lists of models offer: a card of /v1/models each, with `label` and `isMix`

// Fills the two lists from the server.
export async function loadModels() {
  const cards = (await (await request("v1/models")).json()).data;
  choices = cards.map((card) => ({...card, label: labelOf(card)}));
  const adapters = cards.filter((card) => card.parent);
  if (adapters.length) choices.push({...cards[0], isMix: true, label: t("a mix of adapters")}); // the first has them
  const options = () => choices.map((choice, index) => new Option(choice.label, index));
  byId("model").replaceChildren(...options());
  byId("beside").replaceChildren(new Option(t("nothing"), ""), ...options());
  const sliders = adapters.map((card) => weightSlider(card.id, 1 / adapters.length));
  byId("mix").replaceChildren(byId("mix").firstChild, ...sliders); // the first child is the legend
  byId("temperature").value = cards[0].defaults.temperature;
  byId("length").value = cards[0].defaults.max_tokens;
  showSettings();
}

function labelOf({id, parent, kind}) {
  if (parent) return `${parent} + ${id}`;
  return kind === "text" ? `${id} ${t("(base model)")}` : id;
}

function weightSlider(name, weight) {
  const slider = make("input", {type: "range", min: -1, max: 2, step: 0.1, value: weight, name});
  return make("label", {}, make("span", {}, name), " ", make("span", {className: "value"}), slider);
}

// The models that answer, one for each column: {label, kind, request: the fields of a request that name the model}.
export function chosenModels() {
  const chosen = [byId("model").value, byId("beside").value].filter((value) => value !== "");
  return chosen.map((value) => choices[value]).map(({id, label, kind, isMix}) => {
    if (!isMix) return {label, kind, request: {model: id}};
    const sliders = [...byId("mix").querySelectorAll("input")].filter((slider) => slider.valueAsNumber !== 0);
    const weights = sliders.map(({name, valueAsNumber: weight}) => [name, weight]);
    const terms = weights.map(([name, weight]) => `${weight < 0 ? "−" : "+"} ${Math.abs(weight)} ${name}`);
    const adapters = weights.length ? {adapters: Object.fromEntries(weights)} : {};
    return {label: [id, ...terms].join(" "), kind, request: {model: id, ...adapters}};
  });
}

// The fields of a request that offer tools, and turn thinking on or off. A base model knows neither.
export function chatOptions({kind}) {
  const [tools, thinking] = [byId("tools").value.trim(), byId("thinking").value];
  if (kind === "text") return {};
  try { // A field that is undefined is left out of the request.
    return {tools: tools ? [JSON.parse(tools)].flat() : undefined, // one tool, or a list of them
            chat_template_kwargs: thinking ? {enable_thinking: thinking === "true"} : undefined};
  } catch (error) {
    throw new Error(t("The tools are not valid JSON: {why}", {why: error.message}));
  }
}

// Shows the values of the sliders, and what belongs to the chosen models alone.
export function showSettings() {
  for (const slider of document.querySelectorAll("input[type=range]"))
    slider.parentElement.querySelector(".value").textContent = slider.valueAsNumber.toFixed(1);
  byId("mix").hidden = ![byId("model"), byId("beside")].some((list) => choices[list.value]?.isMix);
  const isText = chosenModels().some((model) => model.kind === "text");
  byId("notice").textContent = isText ? t("A base model knows no conversation. It continues your text.") : "";
}
