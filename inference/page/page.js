// The start of the page: connects its controls with the conversation.
import {keepKey} from "./api.js";
import {ask, drawAll, isRunning, removeTurns, sendOnEnter, stop} from "./chat.js";
import {byId, make} from "./elements.js";
import {chosenModels, loadModels, showSettings} from "./settings.js";
import {showTraining} from "./training.js";
import {t, translatePage} from "./words.js";

const EXAMPLES = ["Who are you?", "What sound does a frog make?", "Tell me a short story about a fox in the forest."];
const question = byId("question");

async function start() {
  try {
    await loadModels();
  } catch (error) {
    byId("notice").textContent = error.message;
  }
}

async function send(text) {
  if (!chosenModels().length) await start(); // The server did not answer when the page was opened.
  if (!text || !chosenModels().length) return;
  question.value = "";
  ask(text);
}

byId("composer").onsubmit = (event) => {
  event.preventDefault();
  if (isRunning()) stop();
  else send(question.value.trim());
};
sendOnEnter(question, () => isRunning() || send(question.value.trim()));
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
document.addEventListener("keyneeded", () => {
  byId("key-row").hidden = false;
  byId("settings").open = true;
  byId("key").focus();
});
byId("key").onchange = () => {
  keepKey(byId("key").value);
  start();
};
byId("settings").oninput = showSettings;
byId("probabilities").onchange = drawAll;
byId("show-training").onclick = showTraining;
byId("new").onclick = () => {
  removeTurns(0);
  question.focus();
};

translatePage();
byId("settings").open = innerWidth > 768; // On a phone there is no room for them beside the conversation.
byId("examples").append(...EXAMPLES.map((text) => make("button", {onclick: () => send(t(text))}, t(text))));
question.focus();
start();
