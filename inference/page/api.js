// Requests to the server, and the events of an answer that it streams.
import {t} from "./words.js";

const KEY = "seedling_api_key"; // its name in sessionStorage, which forgets it when the tab is closed
export const keepKey = (key) => sessionStorage.setItem(KEY, key);

// Returns the server's answer to a GET, or to a POST if there is a body. Throws an Error whose message can be shown.
export async function request(path, body, signal) {
  const headers = body ? {"Content-Type": "application/json"} : {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = {method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body)};
  const response = await fetch(path, options).catch(explainFailure);
  if (response.status === 401) {
    document.dispatchEvent(new Event("keyneeded"));
    throw new Error(t("This server asks for a key. Please enter it in the settings."));
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null); // null: an error that is not in the server's own form
    throw new Error(told?.error?.message ?? t("The server answered with the status {status}.", response));
  }
  return response;
}

function explainFailure(error) {
  if (error.name === "AbortError") throw error;
  throw new Error(t("The server does not answer. Is it still running?"));
}

// The events of a stream, as objects, in whatever pieces their text arrives.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {value, done} = await reader.read().catch(explainFailure);
    if (done) throw new Error(t("The server broke the answer off."));
    const complete = (text + value).split("\n\n");
    text = complete.pop(); // the beginning of an event whose rest is still to come
    for (const event of complete) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new Error(object.error.message);
      yield object;
    }
  }
}
