// The conversation: what is asked of the server, and how an answer is drawn while it comes.
import {events, request} from "./api.js";
import {byId, make} from "./elements.js";
import {GrowingMarkdown} from "./markdown.js";
import {chatOptions, chosenModels} from "./settings.js";
import {closeOthers, partsOf, tokenOfText, TokenRow} from "./tokens.js";
import {t} from "./words.js";

const OTHERS = 8; // how many likely tokens the server tells for each place

const turns = []; // {question, element, answers: an Answer in each column, of which there are one or two}
let running = null; // the AbortController of the answers that are being written

export const isRunning = () => running !== null;
export const stop = () => running?.abort();
export const lastTurn = () => turns.at(-1);

// Asks a question, of every chosen model.
export function ask(question) {
  const turn = {question};
  turn.answers = chosenModels().map((model, column) => new Answer(turn, column, model));
  const columns = make("div", {className: "answers"}, ...turn.answers.map((answer) => answer.element));
  turn.element = make("section", {className: "turn"}, questionElement(turn), columns);
  turns.push(turn);
  byId("turns").append(turn.element);
  byId("welcome").hidden = true;
  byId("scroller").scrollTop = byId("scroller").scrollHeight;
  write(turn.answers);
}

// Removes the turns from this one on.
export function removeTurns(first) {
  stop();
  closeOthers();
  for (const turn of turns.splice(first)) turn.element.remove();
  byId("welcome").hidden = turns.length > 0;
}

// A question, which can be edited. Then what followed is removed, as it was said about another question.
function questionElement(turn) {
  const text = make("p", {}, turn.question);
  const field = make("textarea", {rows: 3, "aria-label": t("Your message")});
  const sendButton = make("button", {}, t("Send"));
  const editButton = make("button");
  const copy = copyButton(() => turn.question);
  const showEditor = (isEditing) => {
    text.hidden = copy.hidden = isEditing;
    field.hidden = sendButton.hidden = !isEditing;
    editButton.textContent = isEditing ? t("Cancel") : t("Edit");
    editButton.onclick = () => showEditor(!isEditing);
    field.value = turn.question;
    (isEditing ? field : editButton).focus();
  };
  sendButton.onclick = () => {
    removeTurns(turns.indexOf(turn));
    ask(field.value.trim() || turn.question);
    byId("question").focus();
  };
  field.addEventListener("keydown", (event) => event.key === "Escape" && showEditor(false));
  sendOnEnter(field, () => sendButton.click());
  showEditor(false);
  const buttons = make("div", {className: "buttons"}, sendButton, editButton, copy);
  return make("div", {className: "question", role: "group", "aria-label": t("You asked")}, text, field, buttons);
}

// Enter sends. Shift+Enter begins a new line. An Enter that ends the typing of Chinese characters does neither.
export function sendOnEnter(field, send) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
}

function copyButton(textOf) {
  const button = make("button", {}, t("Copy"));
  button.onclick = async () => {
    const writing = navigator.clipboard?.writeText(textOf()) ?? Promise.reject(); // only https and localhost have one
    button.textContent = await writing.then(() => t("Copied"), () => t("The browser does not allow copying here."));
    setTimeout(() => { button.textContent = t("Copy"); }, 1500);
  };
  return button;
}

// One model's answer to one question. Its elements are made once, and `draw` adds what is new.
class Answer {
  constructor(turn, column, model) {
    Object.assign(this, {turn, column, model});
    this.name = make("h3");
    this.thought = make("p");
    this.thinking = make("details", {className: "thinking"}, make("summary", {}, t("Thinking")), this.thought);
    this.textBox = make("div", {className: "text"});
    this.callBox = make("div");
    this.error = make("p", {className: "error", role: "alert"});
    this.note = make("span", {className: "note"});
    this.markdown = new GrowingMarkdown(this.textBox);
    this.tokenRow = new TokenRow((index, token) => this.writeFrom(index, token), () => this.turn === lastTurn());
    this.goOn = make("button", {className: "again", onclick: () => this.continue()}, t("Continue"));
    const again = make("button", {className: "again", onclick: () => this.again()}, t("Again"));
    const buttons = make("div", {className: "buttons"}, this.note, this.goOn, copyButton(() => this.content), again);
    this.element = make("article", {className: "answer"}, this.name, this.thinking, this.textBox,
      this.tokenRow.element, this.callBox, this.error, buttons);
    this.restart();
  }

  // Forgets what was said, or all but a beginning, which the model will continue. written: the beginning as the
  // model wrote it. reasoning and content: its parts. end: why the answer ended, "" while it is being written.
  restart({written = "", reasoning = "", content = "", tokens = []} = {}) {
    Object.assign(this, {begun: written, reasoning, content, tokens, calls: [], end: "", errorText: "", count: 0});
    this.name.textContent = this.model.label;
  }

  // Takes one event of the stream.
  add({usage, choices: [choice]}) {
    if (usage) this.count = usage.completion_tokens;
    this.seconds = (performance.now() - this.began) / 1000;
    if (!choice) return;
    this.content += choice.delta.content ?? "";
    this.reasoning += choice.delta.reasoning_content ?? "";
    for (const {index, ...call} of choice.delta.tool_calls ?? []) this.calls[index] = call;
    this.tokens.push(...choice.logprobs?.content ?? []);
    this.end = choice.finish_reason ?? "";
  }

  draw() {
    const showsTokens = byId("probabilities").checked && this.tokens.length > 0;
    if (showsTokens) this.tokenRow.draw(this.tokens);
    else this.markdown.draw(this.content, this.end !== "");
    this.tokenRow.element.hidden = !showsTokens;
    this.textBox.hidden = showsTokens;

    // The thinking is open while it streams. After that the reader opens and closes it.
    const isThinking = this.end === "" && this.content === "";
    if (isThinking !== this.wasThinking) this.thinking.open = this.wasThinking = isThinking;
    this.thinking.hidden = showsTokens || this.reasoning === "";
    if (this.thought.textContent !== this.reasoning) this.thought.textContent = this.reasoning;

    if (this.callBox.childElementCount !== this.calls.length)
      this.callBox.replaceChildren(...this.calls.map(callElement));
    this.error.textContent = this.errorText;
    this.element.setAttribute("aria-busy", this.end === "");
    this.goOn.hidden = !["length", "stopped"].includes(this.end) || this.content + this.reasoning === "";
    this.note.textContent = this.noteText();
  }

  noteText() {
    const ends = {"": t("writing"), length: t("cut off"), stopped: t("stopped")};
    const notes = this.end in ends ? [ends[this.end]] : [];
    if (this.end === "stop" && this.content === "") notes.push(t("no words"));
    const speed = Math.round(this.count / this.seconds).toLocaleString();
    if (this.count) notes.push(t("{n} tokens", {n: this.count}), t("{n} tokens/s", {n: speed}));
    return notes.join(" · ");
  }

  // This answer in the history of the next question. What is undefined is left out of the request.
  message() {
    const [reasoning_content, tool_calls] = [this.reasoning || undefined, this.calls.length ? this.calls : undefined];
    return {role: "assistant", content: this.content, reasoning_content, tool_calls};
  }

  again() {
    this.model = chosenModels()[this.column] ?? this.model;
    this.restart();
    write([this]);
  }

  // Goes on where the answer was cut off. If it was in the middle of a character, the model writes this one again.
  continue() {
    const thought = this.reasoning && `<think>\n${this.reasoning}`; // If no words follow a thought, it goes on.
    const text = thought && this.content ? `${thought}\n</think>\n\n${this.content}` : thought + this.content;
    const tokens = this.tokens.length ? [...this.tokens] : [tokenOfText(text.replace(/\ufffd+$/, ""))];
    while (partsOf(tokens).written.endsWith("\ufffd")) tokens.pop();
    this.restart(partsOf(tokens));
    write([this]);
    byId("question").focus(); // The button that had the focus is gone.
  }

  // Goes on from another token: what was written before the place `index`, and then this token.
  writeFrom(index, token) {
    const others = this.tokens[index].top_logprobs;
    this.restart(partsOf([...this.tokens.slice(0, index), {...token, top_logprobs: others}]));
    write([this]);
  }
}

function callElement({function: {name, arguments: json}}) {
  const title = make("figcaption", {}, t("Call of the tool {name}", {name}));
  return make("figure", {className: "call"}, title, make("pre", {}, json));
}

// Lets the server write these answers, or go on with them, all at the same time.
async function write(answers) {
  stop();
  closeOthers();
  byId("finished").replaceChildren();
  const mine = new AbortController();
  showRunning(mine);
  await Promise.all(answers.map((answer) => writeOne(answer, mine.signal)));
  if (running === mine) showRunning(null); // else other answers are being written already
}

function showRunning(controller) {
  running = controller;
  byId("send").textContent = running ? "■" : "↑";
  byId("send").setAttribute("aria-label", running ? t("Stop") : t("Send"));
}

async function writeOne(answer, signal) {
  Object.assign(answer, {signal, began: performance.now()});
  try {
    const response = await request("v1/chat/completions", requestBody(answer), signal);
    for await (const event of events(response)) {
      answer.add(event);
      drawSoon(answer);
    }
  } catch (error) {
    if (answer.signal !== signal) return; // The answer was begun anew.
    answer.end = signal.aborted ? "stopped" : "error";
    answer.errorText = signal.aborted ? "" : error.message;
  }
  drawSoon(answer);
  // A screen reader hears the whole answer once, and not each token.
  byId("finished").append(make("p", {}, `${answer.model.label}: ${answer.content || answer.noteText()}`));
}

function requestBody(answer) {
  const body = {...answer.model.request, ...chatOptions(answer.model), messages: messagesFor(answer), stream: true,
    stream_options: {include_usage: true}, temperature: byId("temperature").valueAsNumber};
  if (byId("length").value) body.max_tokens = byId("length").valueAsNumber;
  if (byId("probabilities").checked) Object.assign(body, {logprobs: true, top_logprobs: OTHERS});
  else answer.tokens = []; // Tokens of the beginning alone would show half of the answer.
  if (body.messages.at(-1).role === "assistant") body.continue_final_message = true;
  return body;
}

// What the model is told. Where the answer has begun already, its beginning comes last.
function messagesFor({turn, column, model, begun}) {
  if (model.kind === "text") return [{role: "user", content: turn.question + begun}];
  const messages = [...historyBefore(turn, column), {role: "user", content: turn.question}];
  return begun ? [...messages, {role: "assistant", content: begun}] : messages;
}

// The messages before a turn in one column. Where a column has no answer, the first column's answer is taken.
export function historyBefore(turn, column) {
  const system = byId("system").value.trim();
  const messages = system ? [{role: "system", content: system}] : [];
  for (const {question, answers} of turns.slice(0, turns.indexOf(turn))) {
    const answer = answers[column] ?? answers[0];
    const isSaid = answer.model.kind !== "text" && (answer.content || answer.calls.length);
    if (isSaid) messages.push({role: "user", content: question}, answer.message());
  }
  return messages;
}

const changed = new Set();

// Draws an answer in the browser's next frame, once, however many events come until then.
function drawSoon(answer) {
  if (changed.size === 0) requestAnimationFrame(drawChanged);
  changed.add(answer);
}

function drawChanged() {
  const scroller = byId("scroller");
  // The view follows the words only if the reader is at their end.
  const follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  for (const answer of changed) answer.draw();
  changed.clear();
  if (follows) scroller.scrollTop = scroller.scrollHeight;
}

export const drawAll = () => turns.forEach((turn) => turn.answers.forEach(drawSoon));
