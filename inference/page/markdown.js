// A model's Markdown as elements. A model may write anything, so what it writes is treated as hostile.
const {marked, DOMPurify} = window; // the two files in vendor/

// First wall: HTML and images in the text are shown as the letters that they are.
const asLetters = ({raw}) => raw.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
marked.use({breaks: true, renderer: {html: asLetters, image: asLetters}});

// Second wall: of the HTML that comes out, only these tags and attributes remain.
const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre",
                 "blockquote", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "a", "#text"],
  ALLOWED_ATTR: ["href", "start", "align"],
  ADD_URI_SAFE_ATTR: ["start", "align"], // their values are no addresses
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName === "A") {
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer");
  }
});

function safeElements(text) {
  return DOMPurify.sanitize(marked.parse(text), ALLOWED);
}

// Draws a text into a box while the text grows. Blocks that are complete are drawn once.
export class GrowingMarkdown {
  constructor(box) {
    this.box = box;
    this.drawnText = 0; // characters of the text that belong to complete blocks
    this.drawnNodes = 0; // and the number of nodes in the box that show them
  }

  draw(text, isFinished) {
    try {
      if (isFinished) this.drawWhole(text);
      else this.drawRest(text);
    } catch { // Thousands of nested brackets are more than marked can read. They are shown as plain text.
      this.box.replaceChildren(text);
    }
  }

  drawRest(text) {
    // The last two blocks may still change: a list goes on after an empty line.
    const complete = marked.lexer(text.slice(this.drawnText)).slice(0, -2).map((block) => block.raw).join("");
    while (this.box.childNodes.length > this.drawnNodes) this.box.lastChild.remove();
    this.box.append(safeElements(complete));
    this.drawnNodes = this.box.childNodes.length;
    this.drawnText += complete.length;
    this.box.append(safeElements(text.slice(this.drawnText)));
  }

  // A finished answer is read once more as a whole. It is replaced only if the pieces showed something else.
  drawWhole(text) {
    const whole = this.box.cloneNode(false);
    whole.append(safeElements(text));
    if (!whole.isEqualNode(this.box)) this.box.replaceChildren(...whole.childNodes);
    this.drawnText = this.drawnNodes = 0;
  }
}
