// Requests to the server, and the events of an answer that it streams.
import {t} from "./words.js";

const KEY = "seedling_api_key"; // its name in the browser's store, which forgets it with the tab
let askForKey = async () => null;

// Sets what asks the reader for a key: an async function that returns the key, or null if there is none.
export function setKeyQuestion(question) {
  askForKey = question;
}

// Returns the server's answer to a GET, or to a POST if there is a body. Throws an Error whose message can be shown.
export async function request(path, body, signal) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = {method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body)};
  const response = await fetch(path, options).catch(explainFailure);
  if (response.status === 401) {
    const newKey = await askForKey();
    if (newKey) {
      sessionStorage.setItem(KEY, newKey);
      return request(path, body, signal);
    }
  }
  if (!response.ok) throw new Error(await errorMessage(response));
  return response;
}

async function errorMessage(response) {
  try {
    return (await response.json()).error.message;
  } catch { // not the server's own form of an error
    return t("The server answered with the status {status}.", {status: response.status});
  }
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
    text += value;
    const complete = text.split("\n\n");
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
