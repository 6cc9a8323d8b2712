// The start of the page: connects its controls with the conversation.
import {setKeyQuestion} from "./api.js";
import {ask, drawAll, isRunning, isSendKey, newChat, setRunningWatcher, stop} from "./chat.js";
import {byId, make} from "./elements.js";
import {areModelsLoaded, loadModels, showSettings} from "./settings.js";
import {watchOthers} from "./tokens.js";
import {showTraining} from "./training.js";
import {t, translatePage} from "./words.js";

const EXAMPLES = ["Who are you?", "What sound does a frog make?", "Tell me a short story about a fox in the forest."];
const question = byId("question");

async function send(text) {
  if (!text) return;
  if (!areModelsLoaded()) await start(); // The server was gone when the page was opened.
  if (!areModelsLoaded()) return;
  question.value = "";
  fitQuestion();
  ask(text);
}

async function start() {
  try {
    await loadModels();
  } catch (error) {
    byId("notice").textContent = error.message;
  }
}

// The field grows with what is written in it.
function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function showRunning() {
  byId("send").textContent = isRunning() ? "■" : "↑";
  byId("send").setAttribute("aria-label", isRunning() ? t("Stop") : t("Send"));
}

// Asks for the key of the server. Returns null if the reader closes the panel.
function askForKey() {
  const panel = byId("key");
  panel.showModal();
  return new Promise((resolve) => {
    panel.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      resolve(byId("key-text").value);
      panel.close();
    };
    panel.onclose = () => resolve(null); // After a submit this comes too late to matter.
  });
}

translatePage();
setKeyQuestion(askForKey);
setRunningWatcher(showRunning);
showRunning();
watchOthers();
byId("examples").append(...EXAMPLES.map((text) => make("button", {onclick: () => send(t(text))}, t(text))));

byId("composer").onsubmit = (event) => {
  event.preventDefault();
  if (isRunning()) stop();
  else send(question.value.trim());
};
question.onkeydown = (event) => {
  if (isSendKey(event) && !isRunning()) send(question.value.trim());
};
question.oninput = fitQuestion;
document.onkeydown = (event) => {
  if (event.key === "Escape") stop();
};
byId("settings").oninput = showSettings;
byId("probabilities").onchange = () => {
  byId("scale").hidden = !byId("probabilities").checked;
  drawAll();
};
byId("new").onclick = () => {
  newChat();
  question.focus();
};
byId("menu").onclick = () => {
  const isOpen = byId("settings").classList.toggle("open");
  byId("menu").setAttribute("aria-expanded", isOpen);
};
byId("show-training").onclick = showTraining;
byId("training").querySelector("button").onclick = () => byId("training").close();
question.focus();
start();
