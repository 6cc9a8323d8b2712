// The conversation: what is asked of the server, and how an answer is drawn while it comes.
import {events, request} from "./api.js";
import {byId, make} from "./elements.js";
import {GrowingMarkdown} from "./markdown.js";
import {chosenModels, samplingFields, systemMessages} from "./settings.js";
import {closeOthers, partsOf, tokenOfText, TokenRow} from "./tokens.js";
import {t} from "./words.js";

const OTHERS = 8; // how many likely tokens the server tells for each place

let turns = []; // {question, element, answers: the Answer in each column, of which the second may be missing}
let running = null; // the AbortController of the answers that are being written
let whenRunningChanges = () => {};

export const isRunning = () => running !== null;
export const stop = () => running?.abort();
export const setRunningWatcher = (watcher) => { whenRunningChanges = watcher; };

// Asks a question, of every chosen model.
export async function ask(question) {
  const turn = {question, answers: []};
  turn.element = make("section", {className: "turn"}, questionElement(turn), make("div", {className: "answers"}));
  turns.push(turn);
  byId("turns").append(turn.element);
  byId("welcome").hidden = true;
  turn.answers = chosenModels().map((model, column) => new Answer(turn, column, model));
  turn.element.lastChild.append(...turn.answers.map((answer) => answer.element));
  byId("scroller").scrollTop = byId("scroller").scrollHeight;
  await write(turn.answers);
}

export function newChat() {
  removeTurns(0);
  byId("welcome").hidden = false;
}

function removeTurns(first) {
  stop();
  closeOthers();
  for (const turn of turns.splice(first)) turn.element.remove();
}

// ---------------------------------------------------------------- the question

function questionElement(turn) {
  const box = make("div", {className: "question", role: "group", "aria-label": t("You asked")});
  const show = () => box.replaceChildren(make("p", {}, turn.question), make("div", {className: "buttons"},
    make("button", {onclick: edit}, t("Edit")), copyButton(() => turn.question)));
  const edit = () => {
    const field = make("textarea", {value: turn.question, rows: 3, "aria-label": t("Your message")});
    const send = () => {
      const question = field.value.trim();
      if (!question) return;
      removeTurns(turns.indexOf(turn)); // What followed was said about another question.
      ask(question);
      byId("question").focus();
    };
    const cancel = () => {
      show();
      box.querySelector("button").focus();
    };
    field.onkeydown = (event) => {
      if (event.key === "Escape") cancel();
      if (isSendKey(event)) send();
    };
    box.replaceChildren(field, make("div", {className: "buttons"},
      make("button", {onclick: send}, t("Send")), make("button", {onclick: cancel}, t("Cancel"))));
    field.focus();
  };
  show();
  return box;
}

// Enter sends. Shift and Enter begin a new line, and an Enter that ends the typing of Chinese characters does neither.
export function isSendKey(event) {
  const isSend = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (isSend) event.preventDefault();
  return isSend;
}

function copyButton(text) {
  const button = make("button", {}, t("Copy"));
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = t("Copied");
    } catch { // Browsers allow it on this machine's own address and over https alone.
      button.textContent = t("The browser does not allow copying here.");
    }
    setTimeout(() => { button.textContent = t("Copy"); }, 1500);
  };
  return button;
}

// ---------------------------------------------------------------- the answer

// One model's answer to one question. Its elements are made once; `draw` adds to them what is new.
class Answer {
  constructor(turn, column, model) {
    Object.assign(this, {turn, column, model});
    this.name = make("h3");
    this.thinkingText = make("p");
    this.thinking = make("details", {className: "thinking"}, make("summary", {}, t("Thinking")), this.thinkingText);
    this.textBox = make("div", {className: "text"});
    this.markdown = new GrowingMarkdown(this.textBox);
    this.tokenRow = new TokenRow((index, token) => this.writeFrom(index, token), () => this === this.lastInColumn());
    this.callBox = make("div");
    this.note = make("span", {className: "note"});
    this.error = make("p", {className: "error", role: "alert"});
    this.continueButton = make("button", {className: "again", onclick: () => this.continue()}, t("Continue"));
    const againButton = make("button", {className: "again", onclick: () => this.again()}, t("Again"));
    this.element = make("article", {className: "answer"}, this.name, this.thinking, this.textBox,
      this.tokenRow.element, this.callBox, this.error,
      make("div", {className: "buttons"}, this.note, this.continueButton, copyButton(() => this.content), againButton));
    this.restart();
  }

  // Forgets what was said, or all but a beginning, which the model will continue. written: the beginning as the
  // model wrote it. reasoning and content: its parts.
  restart({written = "", reasoning = "", content = "", tokens = []} = {}) {
    Object.assign(this, {begun: written, reasoning, content, tokens, calls: [], end: "", errorText: "", count: 0});
    this.name.textContent = this.model.label;
    this.element.setAttribute("aria-label", t("Answer of {model}", {model: this.model.label}));
  }

  // Takes one event of the stream.
  add(event) {
    if (event.usage) this.count = event.usage.completion_tokens;
    const choice = event.choices[0];
    if (!choice) return;
    const {content, reasoning_content: reasoning, tool_calls: calls} = choice.delta;
    if (content) this.content += content;
    if (reasoning) this.reasoning += reasoning;
    if (calls) this.calls.push(...calls);
    if (choice.logprobs) this.tokens.push(...choice.logprobs.content);
    if (choice.finish_reason) this.end = choice.finish_reason;
  }

  draw() {
    const isWriting = this.end === "";
    const showsTokens = byId("probabilities").checked && this.tokens.length > 0;
    if (showsTokens) this.tokenRow.draw(this.tokens);
    else this.markdown.draw(this.content, !isWriting);
    this.tokenRow.element.hidden = !showsTokens;
    this.textBox.hidden = showsTokens;

    // The thinking is open while it streams. After that it is the reader's to open.
    const isThinking = isWriting && !this.content && this.reasoning !== "";
    if (isThinking !== this.wasThinking) this.thinking.open = this.wasThinking = isThinking;
    this.thinking.hidden = showsTokens || !this.reasoning;
    growText(this.thinkingText, this.reasoning);

    const shown = this.callBox.childElementCount;
    if (shown > this.calls.length) this.callBox.replaceChildren();
    this.callBox.append(...this.calls.slice(this.callBox.childElementCount).map(callElement));
    this.error.textContent = this.errorText;
    this.element.setAttribute("aria-busy", isWriting);
    this.continueButton.hidden = !["length", "stopped"].includes(this.end) || !(this.content || this.reasoning);
    this.note.textContent = this.noteText();
  }

  noteText() {
    if (this.end === "") return t("writing");
    const notes = [];
    if (this.end === "length") notes.push(t("cut off"));
    if (this.end === "stopped") notes.push(t("stopped"));
    if (this.end === "stop" && !this.content && !this.calls.length) notes.push(t("no words"));
    if (this.count) {
      const speed = Math.round(this.count / this.seconds).toLocaleString();
      notes.push(t("{n} tokens", {n: this.count}), t("{n} tokens/s", {n: speed}));
    }
    return notes.join(" · ");
  }

  // The message of this answer in the history of the next question.
  message() {
    const message = {role: "assistant", content: this.content};
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (this.calls.length)
      message.tool_calls = this.calls.map(({id, type, function: called}) => ({id, type, function: called}));
    return message;
  }

  lastInColumn() {
    return turns.at(-1)?.answers[this.column];
  }

  again() {
    this.model = chosenModels()[this.column] ?? this.model;
    this.restart();
    write([this]);
  }

  continue() {
    const {content, reasoning, tokens} = this;
    const ended = content ? `<think>\n${reasoning}\n</think>\n\n${content}` : `<think>\n${reasoning}`;
    const written = reasoning ? ended : content;
    this.restart({written, content, reasoning, tokens: tokens.length ? tokens : [tokenOfText(written)]});
    write([this]);
  }

  // Goes on from another token: what was written before the place `index`, and then this token.
  writeFrom(index, token) {
    const tokens = [...this.tokens.slice(0, index), {...token, top_logprobs: this.tokens[index].top_logprobs}];
    this.restart(partsOf(tokens));
    write([this]);
  }
}

function callElement({function: called}) {
  const name = called.name || t("no name");
  return make("figure", {className: "call"},
    make("figcaption", {}, t("Call of the tool {name}", {name})), make("pre", {}, indented(called.arguments)));
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch { // A model may write arguments that are no JSON.
    return String(json);
  }
}

// Makes an element show a text, by adding to the text that it shows already where that is enough.
function growText(element, text) {
  const shown = element.firstChild?.data ?? "";
  if (shown && text.startsWith(shown)) element.firstChild.appendData(text.slice(shown.length));
  else element.textContent = text;
}

// ---------------------------------------------------------------- asking the server

// Lets the server write these answers, or go on with them, all at the same time.
async function write(answers) {
  stop();
  closeOthers();
  const mine = running = new AbortController();
  whenRunningChanges();
  byId("finished").replaceChildren();
  await Promise.all(answers.map((answer) => writeOne(answer, mine.signal)));
  if (running === mine) running = null; // else the next answers are being written already
  whenRunningChanges();
}

async function writeOne(answer, signal) {
  drawSoon(answer);
  const began = performance.now();
  try {
    const response = await request("v1/chat/completions", requestBody(answer), signal);
    for await (const event of events(response)) {
      answer.add(event);
      drawSoon(answer);
    }
    answer.end ||= "stop";
  } catch (error) {
    const isStopped = signal.aborted;
    answer.end = isStopped ? "stopped" : "error";
    answer.errorText = isStopped ? "" : error.message;
  }
  answer.seconds = (performance.now() - began) / 1000;
  drawSoon(answer);
  // A screen reader hears the whole answer once, and not each token.
  byId("finished").append(make("p", {}, `${answer.model.label}: ${answer.content}`));
}

function requestBody(answer) {
  const body = {...answer.model.request, ...samplingFields(answer.model), messages: messagesFor(answer),
                stream: true, stream_options: {include_usage: true}};
  if (byId("probabilities").checked) Object.assign(body, {logprobs: true, top_logprobs: OTHERS});
  else answer.tokens = []; // Those of the first part alone would show half of the answer.
  if (body.messages.at(-1).role === "assistant") body.continue_final_message = true;
  return body;
}

// What the model is told. Where the answer has begun already, the last message is its beginning.
function messagesFor(answer) {
  const question = answer.turn.question;
  if (answer.model.kind === "text") return [{role: "user", content: question + answer.begun}];
  const messages = [...historyOf(answer.turn, answer.column), {role: "user", content: question}];
  if (answer.begun) messages.push({role: "assistant", content: answer.begun});
  return messages;
}

// The messages before a turn, as one column had them. Where it had no answer of its own, it has the first column's.
export function historyOf(turn, column) {
  const messages = systemMessages();
  for (const {question, answers} of turns.slice(0, turns.indexOf(turn))) {
    const answer = answers[column] ?? answers[0];
    const isSaid = answer.content || answer.calls.length;
    if (isSaid && answer.model.kind !== "text") messages.push({role: "user", content: question}, answer.message());
  }
  return messages;
}

// The last answers, one for each column.
export const lastAnswers = () => turns.at(-1)?.answers ?? [];

// ---------------------------------------------------------------- drawing

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

export function drawAll() {
  for (const turn of turns) turn.answers.forEach(drawSoon);
}
