// The learner's view of an answer: each token with its probability, and the others that were likely.
import {byId, make} from "./elements.js";
import {t} from "./words.js";

const MARK = /^<\|.*\|>$|^<\/?(think|tool_call)>$/; // tokens that are marks of the format and no words

// What tokens say: {written: all of it, and its parts reasoning and content}. A token may be half a character,
// so their bytes are put together before they are read.
export function partsOf(tokens) {
  const written = new TextDecoder().decode(new Uint8Array(tokens.flatMap((token) => token.bytes)));
  const [, reasoning = "", content] = written.match(/^(?:<think>\n?(.*?)(?:<\/think>\n*|$))?(.*)$/s);
  return {written, reasoning, content, tokens};
}

// A text that came without probabilities, as one token.
export const tokenOfText = (token) => ({token, bytes: [...new TextEncoder().encode(token)], top_logprobs: []});

// White space made visible: · is a space, ⏎ a new line, ⇥ a tab.
export const visible = (text) => text.replace(/ /g, "·").replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");

function percentOf(token) {
  if (token.logprob === undefined) return t("probability unknown");
  return `${(100 * Math.exp(token.logprob)).toFixed(1)} %`;
}

// The row of tokens of one answer. Only one of them is a stop of the Tab key; the arrow keys go to the next.
export class TokenRow {
  // choose(index, token) is called when the reader wants `token` at the place `index`, if canChoose() allows it.
  constructor(choose, canChoose) {
    Object.assign(this, {choose, canChoose, tokens: []});
    this.element = make("div", {className: "tokens", role: "group", "aria-label": t("Tokens with their probabilities. " +
      "The arrow keys go from one to the next, Enter opens the others.")});
    this.element.onpointerover = (event) => this.show(event.target);
    this.element.onpointerout = closeOthersSoon;
    this.element.onfocusin = (event) => this.show(event.target);
    this.element.onfocusout = closeOthersSoon;
    this.element.onclick = (event) => event.target.focus();
    this.element.onkeydown = (event) => this.press(event);
  }

  // Shows these tokens. Those that are shown already stay.
  draw(tokens) {
    let same = 0;
    while (same < this.tokens.length && this.tokens[same] === tokens[same]) same += 1;
    while (this.element.childElementCount > same) this.element.lastChild.remove();
    this.element.append(...tokens.slice(same).map(tokenElement));
    if (this.element.firstChild) this.element.firstChild.tabIndex = 0;
    this.tokens = [...tokens];
  }

  indexOf(element) {
    return [...this.element.children].indexOf(element);
  }

  show(element) {
    const index = this.indexOf(element);
    if (index >= 0) showOthers(element, this.tokens, index, this.canChoose() && ((token) => {
      this.choose(index, token);
      requestAnimationFrame(() => requestAnimationFrame(() => this.element.children[index]?.focus()));
    }));
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
  const text = token.token;
  const isSpace = text.trim() === "";
  const className = MARK.test(text) ? "token mark" : isSpace ? "token space" : "token";
  const shown = isSpace ? visible(text) + (text.includes("\n") ? "\n" : "") : text;
  const label = t("{text}, {percent}", {text: visible(text), percent: percentOf(token)});
  const element = make("span", {className, role: "button", tabIndex: -1, "aria-label": label,
                                "aria-haspopup": "menu"}, shown);
  element.style.setProperty("--unsure", token.logprob === undefined ? 0 : 1 - Math.exp(token.logprob));
  return element;
}

// ---------------------------------------------------------------- the list of others

let closing = null; // the timer that closes the list
let owner = null; // the token whose list is open

// Opens the list of the tokens that were likely at a place. choose: what a click calls, or false.
function showOthers(element, tokens, index, choose) {
  clearTimeout(closing);
  const list = byId("others");
  if (owner === element && !list.hidden) return;
  owner?.removeAttribute("aria-describedby");
  owner = element;
  owner.setAttribute("aria-describedby", "others");
  const written = tokens[index];
  const before = partsOf(tokens.slice(0, index)).written;
  // The words before must be whole. In the middle of a tool call an answer can't go on.
  const isPlace = choose && !before.endsWith("\ufffd") && !before.includes("<tool_call>");
  const row = (token) => {
    const isWritten = token.id === written.id && token.token === written.token;
    const isHalf = token.token.includes("\ufffd");
    const remark = isWritten ? t("written") : isHalf ? t("half a character") : "";
    const button = make("button", {role: "menuitem", disabled: !isPlace || isWritten || isHalf || MARK.test(token.token),
      onclick: () => choose(token)}, make("i"), make("b", {}, visible(token.token)), make("small", {}, remark),
      make("span", {}, percentOf(token)));
    button.style.setProperty("--probability", Math.exp(token.logprob));
    return button;
  };
  const isListed = written.top_logprobs.some((token) => token.id === written.id);
  const rows = isListed || written.logprob === undefined ? written.top_logprobs : [...written.top_logprobs, written];
  list.replaceChildren(...rows.map(row), make("p", {}, !rows.length ? t("probability unknown")
    : isPlace ? t("Choose another token, and the answer goes on from there.") : ""));
  list.hidden = false;
  const place = element.getClientRects()[0];
  const fitsBelow = place.bottom + list.offsetHeight + 8 < innerHeight;
  list.style.left = `${Math.max(8, Math.min(place.left, innerWidth - list.offsetWidth - 8))}px`;
  list.style.top = `${fitsBelow ? place.bottom + 4 : Math.max(8, place.top - list.offsetHeight - 4)}px`;
}

export function closeOthers() {
  byId("others").hidden = true;
}

// The delay lets the pointer, or the focus, go from the token to its list.
function closeOthersSoon() {
  clearTimeout(closing);
  closing = setTimeout(() => {
    const list = byId("others");
    if (!list.matches(":hover, :focus-within") && document.activeElement !== owner) closeOthers();
  }, 250);
}

// Lets the arrow keys go through the list, and Escape leave it.
export function watchOthers() {
  const list = byId("others");
  list.onpointerleave = list.onfocusout = closeOthersSoon;
  list.onkeydown = (event) => {
    const buttons = [...list.querySelectorAll("button:enabled")];
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    const place = buttons.indexOf(event.target) + step;
    if (step) buttons.at(place % buttons.length).focus();
    if (event.key === "Escape") {
      owner.focus();
      closeOthers();
    }
    if (step || event.key === "Escape") event.preventDefault();
  };
}
