// Finds and makes the elements of the page.
export const byId = (id) => document.getElementById(id);
// make("button", {className: "plain", onclick: stop}, "Stop") is an element with these properties and children.
// "role" and names with a hyphen are set as attributes.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}
