// The start of the page: connects its controls with the conversation.
import {keepKey} from "./api.js";
import {ask, drawAll, isRunning, isSendKey, newChat, stop} from "./chat.js";
import {byId, make} from "./elements.js";
import {areModelsLoaded, loadModels, showSettings} from "./settings.js";
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
  if (!areModelsLoaded()) await start(); // The server did not answer when the page was opened.
  if (!text || !areModelsLoaded()) return;
  question.value = "";
  fitQuestion();
  ask(text);
}

// The field grows with what is written in it.
function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function toggleSettings(isOpen) {
  byId("settings").classList.toggle("open", isOpen);
  byId("menu").setAttribute("aria-expanded", isOpen);
}

byId("composer").onsubmit = (event) => {
  event.preventDefault();
  if (isRunning()) stop();
  else send(question.value.trim());
};
question.onkeydown = (event) => {
  if (isSendKey(event) && !isRunning()) send(question.value.trim());
};
question.oninput = fitQuestion;
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
document.addEventListener("keyneeded", () => {
  byId("key-row").hidden = false;
  toggleSettings(true);
  byId("key").focus();
});
byId("key").onchange = () => {
  keepKey(byId("key").value);
  start();
};
byId("settings").oninput = showSettings;
byId("menu").onclick = () => toggleSettings(!byId("settings").classList.contains("open"));
byId("probabilities").onchange = () => {
  byId("scale").hidden = !byId("probabilities").checked;
  drawAll();
};
byId("show-training").onclick = showTraining;
byId("new").onclick = () => {
  newChat();
  question.focus();
};

translatePage();
byId("examples").append(...EXAMPLES.map((text) => make("button", {onclick: () => send(t(text))}, t(text))));
question.focus();
start();
