// The panel that shows a conversation as training would see it: its token ids, and which of them are trained.
import {request} from "./api.js";
import {historyBefore, lastTurn} from "./chat.js";
import {byId, make} from "./elements.js";
import {chatOptions} from "./settings.js";
import {visible} from "./tokens.js";
import {t} from "./words.js";

export async function showTraining() {
  const [panel, legend, list] = [byId("training"), byId("training-legend"), byId("training-tokens")];
  panel.querySelector("button").onclick = () => panel.close();
  list.replaceChildren();
  legend.textContent = t("There is no conversation yet.");
  panel.showModal();
  if (!lastTurn()) return;
  const {question, answers: [answer]} = lastTurn();
  const messages = [...historyBefore(lastTurn(), 0), {role: "user", content: question}, answer.message()];
  const isText = answer.model.kind === "text";
  try {
    const text = isText ? {prompt: question + answer.content} : {messages, tools: chatOptions(answer.model).tools};
    const told = await (await request("tokenize", {model: answer.model.request.model, ...text})).json();
    const mask = told.mask.map((isTrained) => isTrained || isText); // Pretraining learns to write every token.
    const numbers = {n: told.count, most: told.max_model_len, trained: mask.filter((one) => one).length};
    legend.textContent = t("{n} of {most} tokens. The model learns to write the {trained} underlined ones. " +
      "It only reads the others.", numbers);
    list.append(...told.tokens.map((id, i) => tokenBox(id, told.texts[i], mask[i])));
  } catch (error) {
    legend.textContent = error.message;
  }
}

function tokenBox(id, text, isTrained) {
  const box = make("li", {className: isTrained ? "trained" : ""}, make("b", {}, visible(text)), make("small", {}, id));
  if (isTrained) box.append(make("span", {className: "unseen"}, t("trained")));
  return box;
}
