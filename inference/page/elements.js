// Two helpers for the elements of the page.

export const byId = (id) => document.getElementById(id);

// make("button", {className: "plain", onclick: stop}, "Stop"): an element with these properties and children.
// A name with a hyphen, and "role", is set as an attribute.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}
