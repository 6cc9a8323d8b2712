// The panel that shows a conversation as training would see it: its token ids, and which of them are trained.
import {request} from "./api.js";
import {historyOf, lastAnswers} from "./chat.js";
import {byId, make} from "./elements.js";
import {visible} from "./tokens.js";
import {t} from "./words.js";

export async function showTraining() {
  const [legend, list] = [byId("training-legend"), byId("training-tokens")];
  list.replaceChildren();
  byId("training").showModal();
  const answer = lastAnswers()[0];
  if (!answer) {
    legend.textContent = t("There is no conversation yet.");
    return;
  }
  const question = {role: "user", content: answer.turn.question};
  const text = answer.model.kind === "text"
    ? {prompt: question.content + answer.content}
    : {messages: [...historyOf(answer.turn, 0), question, answer.message()]};
  try {
    const told = await (await request("tokenize", {model: answer.model.request.model, ...text})).json();
    const trained = told.mask.filter((isTrained) => isTrained).length;
    legend.textContent = t("{n} of at most {most} tokens. {trained} are trained: their box is filled and underlined. " +
      "The model learns to write these. All others are only read. The number below each token is its id.",
      {n: told.count, most: told.max_model_len, trained});
    list.append(...told.tokens.map((id, i) => tokenBox(id, told.texts[i], told.mask[i])));
  } catch (error) {
    legend.textContent = error.message;
  }
}

function tokenBox(id, text, isTrained) {
  const box = make("li", {className: isTrained ? "trained" : ""}, make("b", {}, visible(text)), make("small", {}, id));
  if (isTrained) box.append(make("span", {className: "unseen"}, t("trained")));
  return box;
}
