// The learner's view of an answer: each token with its probability, and the others that were likely.
import {byId, make} from "./elements.js";
import {t} from "./words.js";

const MARK = /^<\|.*\|>$|^<\/?(think|tool_call)>$/; // tokens that are marks of the format and no words

// What tokens say: {written: all of it, its parts reasoning and content, and the tokens}.
// A token may be half a character, so the bytes are put together before they are read.
export function partsOf(tokens) {
  const written = new TextDecoder().decode(new Uint8Array(tokens.flatMap((token) => token.bytes)));
  const [, reasoning = "", content] = written.match(/^(?:<think>\n?(.*?)(?:\n?<\/think>\n*|$))?(.*)$/s);
  return {written, reasoning, content, tokens};
}

// A text that came without probabilities, as one token.
export const tokenOfText = (token) => ({token, bytes: [...new TextEncoder().encode(token)], top_logprobs: []});

// White space made visible: · is a space, ⏎ a new line, ⇥ a tab.
export const visible = (text) => text.replace(/ /g, "·").replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");

const probabilityOf = ({logprob}) => Math.exp(logprob ?? 0);
function percentOf(token) {
  const percent = 100 * probabilityOf(token);
  if (token.logprob === undefined) return t("probability unknown");
  return percent < 0.05 ? "< 0.1 %" : `${percent.toFixed(1)} %`;
}

// The row of tokens of one answer. Only one of them is a stop of the Tab key; the arrow keys go to the next.
export class TokenRow {
  // choose(index, token) is called when the reader wants `token` at the place `index`, if canChoose() allows it.
  constructor(choose, canChoose) {
    const label = t("Tokens with their probabilities. The arrow keys go to the next one, Enter opens the others.");
    this.element = make("div", {className: "tokens", role: "group", "aria-label": label});
    Object.assign(this, {choose, canChoose, tokens: [], focusAt: -1});
    for (const type of ["pointerover", "focusin"])
      this.element.addEventListener(type, (event) => this.show(event.target));
    for (const type of ["pointerout", "focusout"]) this.element.addEventListener(type, closeOthersSoon);
    this.element.onclick = (event) => event.target.focus();
    this.element.onkeydown = (event) => this.press(event);
  }

  // Shows these tokens. Those that are shown already stay.
  draw(tokens) {
    let same = 0;
    while (same < this.tokens.length && this.tokens[same] === tokens[same]) same += 1;
    while (this.element.childElementCount > same) this.element.lastChild.remove();
    this.element.append(...tokens.slice(same).map(tokenElement));
    if (!this.element.querySelector("[tabindex='0']")) this.element.firstChild.tabIndex = 0;
    this.tokens = [...tokens];
    this.element.children[this.focusAt]?.focus(); // the token that was chosen by keyboard
    this.focusAt = -1;
  }

  show(element) {
    const index = [...this.element.children].indexOf(element);
    const choose = (token) => {
      this.focusAt = byId("others").querySelector(":focus-visible") ? index : -1;
      this.choose(index, token);
    };
    if (index >= 0) showOthers(element, this.tokens, index, this.canChoose() ? choose : null);
  }

  press(event) {
    const {target, key} = event;
    const next = {ArrowLeft: target.previousSibling, ArrowRight: target.nextSibling,
                  Home: this.element.firstChild, End: this.element.lastChild}[key];
    if (next) {
      target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    } else if (["Enter", " ", "ArrowDown"].includes(key)) byId("others").querySelector("button:enabled")?.focus();
    else if (key === "Escape") closeOthers();
    else return;
    event.preventDefault();
  }
}

function tokenElement(token) {
  const isSpace = token.token.trim() === "";
  const kind = MARK.test(token.token) ? "mark" : isSpace ? "space" : "";
  const label = `${visible(token.token)}, ${percentOf(token)}`;
  const shown = isSpace ? visible(token.token) + token.token.replace(/[^\n]/g, "") : token.token; // breaks the line too
  const element = make("span", {className: `token ${kind}`, role: "button", tabIndex: -1, "aria-label": label,
                                "aria-haspopup": "menu", "aria-describedby": "others"}, shown);
  element.style.setProperty("--unsure", 1 - probabilityOf(token));
  return element;
}

// ---------------------------------------------------------------- the list of others

let closing = null; // the timer that closes the list
let owner = null; // the token whose list is open

// Opens the list of the tokens that were likely at a place. choose(token): what a click calls, or null.
function showOthers(element, tokens, index, choose) {
  clearTimeout(closing);
  const list = byId("others");
  if (owner === element && !list.hidden) return;
  owner = element;
  const before = partsOf(tokens.slice(0, index)).written;
  // The words before must be whole characters. In the middle of a tool call an answer can't go on.
  const canGoOn = choose && !before.endsWith("\ufffd") && !before.includes("<tool_call>");
  const written = tokens[index];
  const others = written.top_logprobs;
  const isMissing = !others.some((token) => token.id === written.id); // It was too unlikely to be in the list.
  const rows = (isMissing ? [...others, written] : others).map((token) => {
    const remark = token.id === written.id ? t("written") : token.token.includes("\ufffd") ? t("half a character") : "";
    const button = make("button", {role: "menuitem", onclick: () => choose(token)}, make("i"),
      make("b", {}, visible(token.token)), make("small", {}, remark), make("span", {}, percentOf(token)));
    button.disabled = !canGoOn || remark !== "" || MARK.test(token.token);
    button.style.setProperty("--probability", probabilityOf(token));
    return button;
  });
  const advice = canGoOn && others.length ? t("Choose another token, and the answer goes on from there.") : "";
  list.replaceChildren(...rows, make("p", {}, advice));
  list.hidden = false;
  const {left, top, bottom} = element.getClientRects()[0];
  const fitsBelow = bottom + list.offsetHeight + 8 < innerHeight;
  list.style.left = `${Math.max(8, Math.min(left, innerWidth - list.offsetWidth - 8))}px`;
  list.style.top = `${fitsBelow ? bottom + 4 : Math.max(8, top - list.offsetHeight - 4)}px`;
}

export const closeOthers = () => { byId("others").hidden = true; };

// The delay lets the pointer, or the focus, go from the token to its list.
function closeOthersSoon() {
  clearTimeout(closing);
  closing = setTimeout(() => {
    if (!byId("others").matches(":hover, :focus-within") && document.activeElement !== owner) closeOthers();
  }, 250);
}

byId("others").onpointerleave = closeOthersSoon;
byId("others").addEventListener("focusout", closeOthersSoon);
byId("others").onkeydown = (event) => {
  const buttons = [...byId("others").querySelectorAll("button:enabled")];
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step) buttons.at((buttons.indexOf(event.target) + step) % buttons.length).focus();
  else if (event.key === "Escape") owner.focus();
  else return;
  event.preventDefault();
};
