"""Let other people's clients speak to our server, and compare what they get with what the model says.

    python benchmarks/clients.py                                           # out/quickstart, all clients
    python benchmarks/clients.py --only "openai for npm" --folder ../clients
    python benchmarks/clients.py --only schemathesis --openai_page ../openai-openapi/openapi.json

Each client runs in an environment of its own: a venv above the packages of the Python that runs this file, or
a folder of npm. --folder keeps them. The bar is that every client gets what `eval_model.py` says for the same
prompt, that lm-eval's scores over the API are those of its own `hf` backend, and that schemathesis, which
makes up requests from our OpenAPI page, finds no server error and no answer that the page does not announce.
With --openai_page it also makes them up from the page that OpenAI publishes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

QUESTIONS = ["What sound does a frog make?", "What is 27 + 15?", "你是谁？"]
NPM_SCRIPT = """
import OpenAI from "openai";
const [url, model, ...questions] = process.argv.slice(2);
const client = new OpenAI({baseURL: url + "/v1", apiKey: "any", maxRetries: 0});
const found = {whole: [], streamed: []};
for (const content of questions) {
  const asked = {model, messages: [{role: "user", content}], temperature: 0};
  found.whole.push((await client.chat.completions.create(asked)).choices[0].message.content);
  const stream = client.chat.completions.stream({...asked, stream_options: {include_usage: true}});
  found.streamed.push((await stream.finalChatCompletion()).choices[0].message.content);
}
const hi = {model, messages: [{role: "user", content: "Hi"}]};
const long = await client.chat.completions.create({...hi, stream: true});
for await (const chunk of long) { long.controller.abort(); }
try {
  await client.chat.completions.create({...hi, model: "none"});
} catch (error) { found.error = [error.status, error.code]; }
const tools = [{type: "function", function: {name: "clock", parameters: {type: "object",
  properties: {zone: {enum: ["Oslo"]}}, required: ["zone"], additionalProperties: false}}}];
const called = await client.chat.completions.create({...hi, tools, tool_choice: "required",
  parallel_tool_calls: false, temperature: 0});
found.call = called.choices[0].message.tool_calls[0].function;
console.log(JSON.stringify(found));
"""
LANGCHAIN_SCRIPT = """
import json, sys
from typing import Annotated
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

url, model, *questions = sys.argv[1:]
client = ChatOpenAI(base_url=url + "/v1", api_key="any", model=model, temperature=0)
found = {"whole": [client.invoke(question).content for question in questions],
         "streamed": ["".join(part.content for part in client.stream(question)) for question in questions]}

class Person(BaseModel):
    age: int = Field(ge=0, le=9)

@tool
def clock(zone: Annotated[str, Field(max_length=4)]) -> str:
    "The time."

found["age"] = client.with_structured_output(Person, method="json_schema").invoke("A child.").age
call = client.bind_tools([clock], tool_choice="clock").invoke("Time?").tool_calls[0]
found["call"] = {"name": call["name"], "arguments": json.dumps(call["args"])}
print(json.dumps(found))
"""
TASK = """task: world
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def ours(model: Path) -> list[str]:
    """What the model says to QUESTIONS in the terminal."""
    from inference.chat_model import ChatModel, Sampling

    chat_model = ChatModel(model, device="cpu")
    answers = []
    for question in QUESTIONS:
        ids = chat_model.encode([{"role": "user", "content": question}])
        answers.append("".join(piece.text for piece in chat_model.stream(ids, Sampling(temperature=0))))
    return answers


def judge(found: dict, expected: list[str]) -> str:
    for way in ("whole", "streamed"):
        if found[way] != expected:
            return f"failed: {way} it gets {found[way]}, not {expected}"
    if found["call"]["name"] != "clock" or "zone" not in found["call"]["arguments"]:
        return f"failed: the forced call is {found['call']}"
    if found.get("error", [404, "model_not_found"]) != [404, "model_not_found"]:
        return f"failed: a missing model is told as {found['error']}"
    return "as in the terminal: answers, streams, a forced call"


def run(command: list, **options) -> str:
    ended = subprocess.run([str(word) for word in command], capture_output=True, encoding="utf-8", **options)
    if ended.returncode:
        said = ended.stderr[-600:] or ended.stdout[-600:]
        raise RuntimeError(f"{Path(str(command[0])).name} failed: {said}")
    return ended.stdout


def npm(url: str, model: Path, folder: Path, expected: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "client.mjs").write_text(NPM_SCRIPT, encoding="utf-8")
    run(["npm", "install", "--silent", "openai"], cwd=folder)
    return judge(json.loads(run(["node", "client.mjs", url, model.name, *QUESTIONS], cwd=folder)), expected)


def langchain(url: str, model: Path, folder: Path, expected: list[str]) -> str:
    python = environment(folder, ["langchain-openai"])
    found = json.loads(run([python, "-c", LANGCHAIN_SCRIPT, url, model.name, *QUESTIONS]))
    assert 0 <= found["age"] <= 9
    return judge(found, expected) + ", a parsed form"


def lm_eval(url: str, model: Path, folder: Path, expected: list[str]) -> str:
    """Multiple choice by the probabilities of the choices, over the API and by lm-eval's own backend."""
    python = environment(folder, ["lm_eval[api]"])
    animals = [("cow", "moo"), ("dog", "woof"), ("cat", "meow"), ("frog", "ribbit"), ("duck", "quack"),
               ("owl", "hoot"), ("pig", "oink"), ("mouse", "squeak"), ("snake", "hiss"), ("sheep", "baa")]
    sounds = [sound for _, sound in animals]
    rows = [{"question": f"A {animal} says", "choices": sounds, "answer": place}
            for place, (animal, _) in enumerate(animals)]
    (folder / "world.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "world.yaml").write_text(TASK.replace("DATA", str(folder / "world.json")), encoding="utf-8")
    common = ["--tasks", "world", "--include_path", folder, "--batch_size", 1, "--output_path"]
    offline = {"env": os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}}
    scores = []
    over_the_api = f"model={model.name},base_url={url}/v1/completions,tokenizer={model},num_concurrent=4"
    for backend, arguments in (("local-completions", over_the_api),
                               ("hf", f"pretrained={model},dtype=float32")):
        out = folder / backend
        run([python, "-m", "lm_eval", "--model", backend, "--model_args", arguments, "--device", "cpu",
             *common, out], **offline)
        [result] = sorted(out.rglob("results_*.json"))[-1:]
        scores.append(json.loads(result.read_text())["results"]["world"]["acc,none"])
    chats = folder / "chats"
    (folder / "chat.json").write_text("\n".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False)
                                                for q, a in zip(QUESTIONS, expected, strict=True)),
                                      encoding="utf-8")
    (folder / "chat.yaml").write_text(
        TASK.replace("world", "chat").replace("DATA", str(folder / "chat.json")).replace(
            "multiple_choice", "generate_until").replace("doc_to_choice: choices\n", "").replace(
            "metric: acc", "metric: exact_match") + "generation_kwargs: {until: [], temperature: 0}\n",
        encoding="utf-8")
    run([python, "-m", "lm_eval", "--model", "local-chat-completions", "--apply_chat_template",
         "--model_args", f"model={model.name},base_url={url}/v1/chat/completions", "--tasks", "chat",
         "--include_path", folder, "--output_path", chats], **offline)
    [result] = sorted(chats.rglob("results_*.json"))[-1:]
    exact = json.loads(result.read_text())["results"]["chat"]["exact_match,none"]
    if scores[0] != scores[1] or exact != 1:
        return f"failed: over the API {scores[0]}, by lm-eval's own backend {scores[1]}; chats {exact}"
    return f"the score of its own backend, {scores[0]:g}; all chats as in the terminal"


def schemathesis(url: str, model: Path, folder: Path, expected: list[str]) -> str:
    """By our own OpenAPI page: as it is, and then with a name of a model that is there."""
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        as_it_is, named = (json.loads(text) for text in [answer.read()] * 2)
    for form in named["components"]["schemas"].values():
        if "model" in form.get("properties", {}):
            form["properties"]["model"] = {"enum": [model.name]}
    return make_up_requests(model, folder, "", {"": as_it_is, "with our model: ": named})


def make_up_requests(model: Path, folder: Path, base: str, pages: dict[str, dict]) -> str:
    """Lets schemathesis make up requests from OpenAPI pages. base: what stands before their paths.

    Requests for answers without end are right. So the model, in a server of its own, has little room.
    """
    from benchmarks.serving_clients import Server, copy_with_context

    environment(folder, ["schemathesis"])
    with tempfile.TemporaryDirectory() as place:
        copy_with_context(model, Path(place) / model.name, 512)
        with Server("--load_from", Path(place) / model.name, threads=os.cpu_count()) as server:
            return outcomes_of(folder, server.address, base, pages)


def outcomes_of(folder: Path, url: str, base: str, pages: dict[str, dict]) -> str:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    outcomes = []
    for kind, page in pages.items():
        (folder / "page.json").write_text(json.dumps(page), encoding="utf-8")
        before = answers_begun(url)
        ended = subprocess.run([folder / "bin" / "schemathesis", "run", folder / "page.json", "--url",
                                url + base, "--checks", checks, "--max-examples", "100", "--seed", "1",
                                "--request-timeout", "60"], cwd=folder, capture_output=True, encoding="utf-8")
        said = ended.stdout + ended.stderr
        counted = re.search(r"(\d[\d,]*) generated", said)
        if ended.returncode or not counted:
            return f"failed: {kind}{said[-3000:]}"
        outcomes.append(f"{kind}{counted[1]} requests, {answers_begun(url) - before:,} answers of the model")
    return "; ".join(outcomes) + ": no server error, no answer that the page does not announce"


def answers_begun(url: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return int(re.search(rb"^seedling_first_tokens_total (\d+)", answer.read(), re.MULTILINE)[1])


# What our server has of OpenAI's API. The paths of its document begin after /v1.
SERVED = {"/chat/completions": "post", "/completions": "post", "/models": "get", "/models/{model}": "get"}


def openai_page(url: str, model: Path, folder: Path, expected: list[str], page: Path) -> str:
    """By the page that OpenAI publishes: as it is, and then with those fields alone that our page knows."""
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        ours = json.load(answer)["components"]["schemas"]
    known = ours["ChatRequest"]["properties"].keys() | ours["CompletionRequest"]["properties"].keys()
    pages = {kind: published(json.loads(page.read_text(encoding="utf-8")), model.name, fields)
             for kind, fields in (("", None), ("with fields that we serve: ", known))}
    return make_up_requests(model, folder, "/v1", pages)


def published(document: dict, model: str, fields: set[str] | None) -> dict:
    """OpenAI's page with the operations that we serve. model: the only one. fields: the only ones.

    The page announces no answer to a request that is refused. So 4XX is added, with the shape that the page
    itself has for errors, and the stream of /completions, of which it speaks in words alone.
    """
    schemas, paths = document["components"]["schemas"], {}
    error = {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}
    for path, method in SERVED.items():
        operation = document["paths"][path][method]
        operation["responses"]["4XX"] = {"description": "refused", "content": {"application/json": error}}
        paths[path] = {method: operation}
    stream = {"text/event-stream": {"schema": {"type": "object", "required": ["data"]}}}
    paths["/completions"]["post"]["responses"]["200"]["content"] |= stream
    schemas["ModelIdsShared"] = schemas["CreateCompletionRequest"]["properties"]["model"] = {"enum": [model]}
    if fields:
        parts = [schemas["CreateCompletionRequest"], *schemas["CreateChatCompletionRequest"]["allOf"][1:],
                 *schemas["CreateModelResponseProperties"]["allOf"][1:], schemas["ModelResponseProperties"]]
        for part in parts:
            part["properties"] = {name: one for name, one in part["properties"].items() if name in fields}
            part["additionalProperties"] = True
    return document | {"paths": paths}


CLIENTS = {"openai for npm": npm, "langchain-openai": langchain, "lm-eval": lm_eval,
           "schemathesis": schemathesis}


def environment(folder: Path, packages: list[str]) -> Path:
    from benchmarks.opens_elsewhere import make_environment

    python = make_environment(folder, packages)
    if python is None:
        raise RuntimeError(f"{' '.join(packages)} can't be installed here")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "out" / "quickstart" / "full_sft"
    parser.add_argument("--load_from", type=Path, default=default, metavar="DIR",
                        help="the model that is served (default: that of the quickstart)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keeps the environments of the clients")
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=list(CLIENTS), metavar="CLIENT")
    parser.add_argument("--openai_page", type=Path, metavar="FILE",
                        help="openapi.json of github.com/openai/openai-openapi, for schemathesis")
    args = parser.parse_args()
    clients = {name: CLIENTS[name] for name in args.only}
    if args.openai_page:
        clients["schemathesis by OpenAI's page"] = partial(openai_page, page=args.openai_page.resolve())
    model, failed = args.load_from.resolve(), False
    expected = ours(model)
    from benchmarks.serving_clients import Server

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, \
            Server("--load_from", model, threads=os.cpu_count()) as server:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name, client in clients.items():
            try:
                kept = folder / name.partition(" by ")[0].replace(" ", "_")  # both pages: one environment
                outcome = client(server.address, model, kept, expected)
            except (RuntimeError, OSError) as error:
                outcome = f"failed: {error}"
            failed |= outcome.startswith("failed")
            print(f"{name:18} {outcome}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
