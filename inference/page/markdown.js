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
  ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.hasAttribute?.("href")) Object.assign(element, {target: "_blank", rel: "noopener noreferrer"});
});
const safeElements = (text) => DOMPurify.sanitize(marked.parse(text), ALLOWED);

// Draws a text into a box while the text grows. Blocks that are complete are drawn once.
export class GrowingMarkdown {
  constructor(box) {
    Object.assign(this, {box, drawnLetters: 0, drawnNodes: 0}); // of the complete blocks
  }

  draw(text, isFinished) {
    try {
      // The last two blocks may still change: a list goes on after an empty line.
      const blocks = isFinished ? [] : marked.lexer(text.slice(this.drawnLetters)).slice(0, -2);
      const complete = blocks.map((block) => block.raw).join("");
      // A finished text is read once more as a whole, because a link may be explained in a later block.
      if (isFinished) this.drawnLetters = this.drawnNodes = 0;
      while (this.box.childNodes.length > this.drawnNodes) this.box.lastChild.remove();
      this.box.append(safeElements(complete));
      this.drawnNodes = this.box.childNodes.length;
      this.drawnLetters += complete.length;
      this.box.append(safeElements(text.slice(this.drawnLetters)));
    } catch { // Thousands of nested brackets are more than marked can read. They are shown as plain text.
      this.box.replaceChildren(text);
    }
  }
}
