"""The API as programs use it that are not ours: OpenAI's own client for Python, against a real server."""

import json
import re
import threading
from typing import Annotated

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, Field
from test_thinking import RECORDS, learnt  # noqa: F401 (a fixture: a model that knows RECORDS by heart)

from benchmarks.serving_clients import Server
from dataset.chat import encode_chat
from inference.chat_model import ChatModel, Sampling
from model.generate import generate
from model.lora import apply_lora, lora_parameters, save_lora
from model.weights import load_model, load_tokenizer

HI = [{"role": "user", "content": "Hi"}]
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": {
    "type": "object", "required": ["zone"],
    "properties": {"zone": {"enum": ["Oslo", "Rome"], "default": None}}}}}  # fmt: skip (pydantic's null)


@pytest.fixture(scope="module")
def models(home, learnt, tmp_path_factory):  # noqa: F811
    """Folders: `model`, which knows RECORDS by heart, an adapter of it, and `base`, which continues texts."""
    model = load_model(learnt / "model")
    apply_lora(model, rank=4)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    save_lora(model, learnt / "odd")
    return learnt / "model", learnt / "odd", home / "base"


@pytest.fixture(scope="module")
def address(models):
    model, adapter, base = models
    with Server("--device", "cpu", "--load_from", model, base, "--lora", adapter) as server:
        yield server.address
        server.process.terminate()
        server.process.wait(20)
        log = server.log()
    assert "Traceback" not in log and "Hi" not in log.split()  # no word of a prompt


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def ours(models):
    return ChatModel(models[0], [str(models[1])], device="cpu")


def chat(client, content="Name a river.", **more):
    return client.chat.completions.create(
        **{"model": "model", "temperature": 0, "messages": [{"role": "user", "content": content}]} | more
    )


def test_models(client):
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["model", "odd", "base"]
    assert [found[name].parent for name in found] == [None, "model", None]
    assert [found[name].kind for name in found] == ["chat", "chat", "text"]
    assert client.models.retrieve("odd").parent == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'; there are: model, odd, base"):
        client.models.retrieve("x")


@pytest.mark.parametrize(
    "record", [record for records in ("inline", "reason", "tool") for record in RECORDS[records]]
)
def test_thinking_and_calls_are_told_apart(client, record):
    """Whole and streamed: what the model has learnt by heart comes as OpenAI's fields."""
    question, right = record["messages"]
    answer = chat(client, question["content"])
    message, usage = answer.choices[0].message, answer.usage
    thought = right.get("reasoning_content") or re.sub("(?s).*<think>|</think>.*", "", right["content"]) * (
        "<think>" in right["content"]
    )
    assert (getattr(message, "reasoning_content", None) or "") == thought.strip("\n")
    assert getattr(message, "reasoning", None) == getattr(message, "reasoning_content", None)
    calls = right.get("tool_calls") or [
        json.loads(call) for call in re.findall(r"<tool_call>\n(.*)\n</tool_call>", right["content"])
    ]
    found = message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in found] == [
        (call["name"], call["arguments"]) for call in calls
    ]
    words = re.sub("(?s)<(think|tool_call)>.*</(think|tool_call)>", "", right["content"]).strip() or None
    assert message.content == words
    assert answer.choices[0].finish_reason == ("tool_calls" if calls else "stop")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens > 1

    with client.chat.completions.stream(
        model="model", temperature=0, messages=[question], n=2, stream_options={"include_usage": True}
    ) as events:
        for _ in events:
            pass
        whole = events.get_final_completion()
    for choice in whole.choices:
        assert (choice.message.content or None, choice.finish_reason) == (
            words,
            answer.choices[0].finish_reason,
        )
        assert [call.function.arguments for call in choice.message.tool_calls or []] == [
            call.function.arguments for call in found
        ]
    assert whole.usage.completion_tokens == 2 * usage.completion_tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.5, "top_p": 1},
        {"temperature": 1, "top_k": 4, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("adapter", [None, "odd"])
def test_the_same_prompt_and_seed_give_the_same_text_everywhere(client, ours, models, settings, adapter):
    """In the terminal, over the API, and (greedy, without an adapter) in transformers."""
    ours.switch(str(models[1]) if adapter else None)
    prompt = ours.encode(HI)
    sampling = Sampling(**{"top_p": 0.9, "seed": 7, "max_new_tokens": 40} | settings)
    ids = [token.item() for token in ours.generate([prompt], sampling)]
    expected = ours.read(prompt, [token for token in ids if token not in ours.stop_ids]).message()
    extra = {name: settings[name] for name in settings if name in ("top_k", "repetition_penalty")}
    plain = {name: settings[name] for name in settings if name not in extra}
    answer = client.chat.completions.create(
        model=adapter or "model", messages=HI, seed=7, max_tokens=40, **plain, extra_body=extra
    )
    message = answer.choices[0].message
    assert message.content == expected["content"]
    assert getattr(message, "reasoning", None) == expected.get("reasoning_content")
    assert answer.usage.completion_tokens == len(ids) > 4
    if settings == {"temperature": 0} and not adapter:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        theirs = AutoModelForCausalLM.from_pretrained(
            models[0], local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(models[0], local_files_only=True, trust_remote_code=False)
        inputs = tokenizer.apply_chat_template(
            HI, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)[
            0, inputs["input_ids"].size(1) :
        ]
        assert written.tolist() == ids


def test_many_at_once_are_what_each_is_alone(client):
    """Mixed models, adapters, settings and seeds; each is asked again when nobody else asks."""

    def ask(number: int) -> list:
        settings = {
            "temperature": (0, 0.9, 1.4)[number % 3],
            "seed": number,
            "max_tokens": 5 + number % 30,
            "model": ("model", "odd", "base")[number // 3 % 3],
            "n": 1 + number % 2,
        }
        answer = chat(client, f"Number {number}?", **settings)
        return [choice.message.content for choice in answer.choices]

    found = {}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: ask(number)}))
        for number in range(48)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: ask(number) for number in range(48)}


def test_a_mix_of_adapters(client, ours, models):
    def ask(**more):
        return chat(client, "Hi", max_tokens=30, **more).choices[0].message.content

    assert ask(extra_body={"adapters": {"odd": 1.0}}) == ask(model="odd") != ask()
    assert ask(extra_body={"adapters": {"odd": 0.0}}) == ask()
    ours.switch({str(models[1]): 0.5})
    ids = [token.item() for token in ours.generate([ours.encode(HI)], Sampling(0, max_new_tokens=30))]
    expected = ours.read(ours.encode(HI), [token for token in ids if token not in ours.stop_ids]).message()
    assert ask(extra_body={"adapters": {"odd": 0.5}}) == expected["content"]


def test_log_probabilities(client, models):
    answer = chat(client, logprobs=True, top_logprobs=2).choices[0]
    entries = answer.logprobs.content
    model, tokenizer = load_model(models[0]).eval(), load_tokenizer(models[0])
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "Name a river."}], None, True)[0]
    ids = [entry.id for entry in entries]
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    for entry, of_place in zip(entries, log_probs, strict=True):
        assert abs(entry.logprob - of_place[entry.id].item()) < 1e-3
        assert [top.id for top in entry.top_logprobs] == of_place.topk(2).indices.tolist()
    assert [entry.token for entry in entries][:2] == ["<think>", "\n"] and entries[-1].token == "<|im_end|>"
    assert (
        b"".join(bytes(entry.bytes) for entry in entries).decode().startswith("<think>\nRivers are long.\n")
    )
    streamed = []
    for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [entry.id for entry in streamed] == ids


def test_half_characters_have_bytes(client):
    answer = client.completions.create(
        model="base", prompt="猫", temperature=2, seed=3, max_tokens=60, logprobs=0, extra_body={"top_k": 0}
    )
    chats = (
        chat(client, model="base", temperature=2, seed=3, max_tokens=100, logprobs=True)
        .choices[0]
        .logprobs.content
    )
    assert any("\ufffd" in entry.token for entry in chats)
    text = b"".join(bytes(entry.bytes) for entry in chats).decode("utf-8", "replace")
    assert all(sum(entry.bytes) or entry.token for entry in chats) and len(text) > 30
    assert "".join(answer.choices[0].logprobs.tokens)


def test_completions(client, models):
    base, tokenizer = load_model(models[2]).eval(), load_tokenizer(models[2])
    for prompts in (["The cat", "A dog"], [[5, 6, 7], [8]]):
        answer = client.completions.create(model="base", prompt=prompts, max_tokens=6, temperature=0, n=2)
        for place, prompt in enumerate(prompts):
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            new = [token.item() for token in generate(base, torch.tensor([ids]), 6, temperature=0)]
            for choice in answer.choices[2 * place : 2 * place + 2]:
                assert choice.text == tokenizer.decode(new) and choice.finish_reason == "length"
        texts = ["", ""]
        for chunk in client.completions.create(
            model="base", prompt=prompts, max_tokens=6, temperature=0, stream=True
        ):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [answer.choices[0].text, answer.choices[2].text]


@torch.no_grad()
def test_echo_tells_the_probability_of_the_prompt(client, models):
    """What lm-eval needs for multiple choice."""
    model, tokenizer = load_model(models[2]).eval(), load_tokenizer(models[2])
    ids = tokenizer("The cat sits on the mat.")["input_ids"]
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for max_tokens, prompt in ((1, "The cat sits on the mat."), (0, ids)):
        choice = client.completions.create(
            model="base", prompt=prompt, max_tokens=max_tokens, temperature=0, echo=True, logprobs=1
        ).choices[0]
        assert choice.text.startswith("The cat sits on the mat.")
        found = choice.logprobs
        assert len(found.tokens) == len(ids) + max_tokens and found.token_logprobs[0] is None
        for place in range(1, len(ids)):
            assert abs(found.token_logprobs[place] - log_probs[place - 1, ids[place]].item()) < 1e-3
            assert max(found.top_logprobs[place].values()) == pytest.approx(
                log_probs[place - 1].max().item(), abs=1e-3
            )
        assert "".join(found.tokens[: len(ids)]) == "The cat sits on the mat."
        assert [
            choice.text[at : at + len(text)] for at, text in zip(found.text_offset, found.tokens, strict=True)
        ][:8] == found.tokens[:8]


class Person(BaseModel):
    name: Annotated[str, Field(max_length=8)]
    age: Annotated[int, Field(ge=0, le=150)]


def test_structured_outputs(client):
    for seed in range(5):
        parsed = (
            client.chat.completions.parse(
                model="odd", messages=HI, response_format=Person, temperature=1.0, seed=seed, max_tokens=80
            )
            .choices[0]
            .message
        )
        assert isinstance(parsed.parsed, Person)
    free = chat(client, response_format={"type": "json_object"}, max_tokens=120, temperature=1, seed=2)
    assert free.choices[0].message.content.startswith("{")
    with pytest.raises(openai.BadRequestError, match="response_format|Invalid type"):
        chat(
            client,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}},
        )


def test_forced_calls(client):
    for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
        for seed in range(3):
            answer = chat(
                client,
                tools=[CLOCK],
                tool_choice=choice,
                temperature=1.2,
                seed=seed,
                max_tokens=100,
                parallel_tool_calls=False,
            ).choices[0]
            [call] = answer.message.tool_calls
            assert call.function.name == "clock" and answer.finish_reason == "tool_calls"
            assert json.loads(call.function.arguments)["zone"] in ("Oslo", "Rome")
    result = [
        {"role": "user", "content": "Time?"},
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "noon"},
    ]
    assert (
        chat(client, messages=result, tools=[CLOCK], max_tokens=5).choices[0].message
    )  # and the chat goes on
    assert not chat(client, tools=[CLOCK], tool_choice="none").choices[0].message.tool_calls
    with pytest.raises(openai.BadRequestError, match="there is no tool 'x'"):
        chat(client, tools=[CLOCK], tool_choice={"type": "function", "function": {"name": "x"}})


def test_thinking_on_and_off(client):
    def ask(content, thinking):
        extra = {"chat_template_kwargs": {"enable_thinking": thinking}}
        return chat(client, content, extra_body=extra).choices[0].message

    assert ask("Name a river.", True).reasoning == "Rivers are long." == ask("Name a river.", None).reasoning
    assert not hasattr(ask("Name a river.", False), "reasoning")
    assert not hasattr(chat(client, reasoning_effort="none").choices[0].message, "reasoning")
    assert ask("A river, please.", True).reasoning  # it never thinks of itself before this answer


def test_the_last_message_goes_on(client):
    def ask(begun):
        answer = (
            chat(
                client,
                messages=[
                    {"role": "user", "content": "Name a river."},
                    {"role": "assistant", "content": begun},
                ],
                extra_body={"continue_final_message": True},
            )
            .choices[0]
            .message
        )
        return getattr(answer, "reasoning", None), answer.content

    assert ask("<think>\nRivers are") == (" long.", "The Rhine.")
    assert ask("<think>\nRivers are long.\n</think>\n\nThe") == (None, " Rhine.")
    with pytest.raises(openai.BadRequestError, match="the last message is the assistant's"):
        chat(client, messages=[*HI, {"role": "assistant", "content": "Yo"}])


def test_stop_texts(client):
    whole = chat(client, model="base", max_tokens=40).choices[0].message.content
    stop = whole[13:16]
    for stream in (False, True):
        answer = chat(client, model="base", max_tokens=40, stop=[stop, "never"], stream=stream)
        text = (
            "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            if stream
            else answer.choices[0].message.content
        )
        assert text == whole[: whole.index(stop)]
        assert stream or answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"temperature": 3}, "temperature: "),
        ({"temperature": 0.0001}, "temperature: must be 0, or from 0.001 to 2"),
        ({"n": 0}, "n: "),
        ({"extra_body": {"n": "2"}}, "n: "),
        ({"extra_body": {"top_logits": 1}}, "top_logits: this server does not know"),
        ({"extra_body": {"best_of": 3}}, "best_of is not supported"),
        ({"stop": [""]}, "stop: "),
        ({"extra_body": {"mirostat": 1}}, "mirostat"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias: 999999 is no token"),
        ({"logit_bias": {"a": 1}}, "logit_bias: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "x", "content": "a"}]}, "message 1 has the role 'x'"),
        (
            {"messages": [{"role": "user", "content": "a", "weights": 1}]},
            "'weights' of a message is not used",
        ),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, "the model has room for 256"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "image_url",
        ),
        ({"extra_body": {"adapters": {"nope": 1}}}, "'nope' is no adapter of model; there are: odd"),
        ({"model": "odd", "extra_body": {"adapters": {"odd": 1}}}, "name the base model"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "has no effect"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra_body": {"continue_final_message": True}}, "needs a last message of the assistant"),
        ({"model": "base", "tools": [CLOCK]}, "it knows neither tools nor thinking"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_completion_tokens": 0}, "max_completion_tokens: "),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "not both"),
        ({"stream_options": {"include_usage": True}}, "needs stream"),
    ],
)
def test_what_it_does_not_do_it_refuses_by_name(client, fields, complaint):
    with pytest.raises(openai.BadRequestError, match=re.escape(complaint)) as refused:
        chat(client, **fields)
    assert refused.value.body.keys() == {"message", "type", "param", "code"}
    assert "\n" not in refused.value.body["message"]


def test_what_carries_no_meaning_is_taken(client):
    assert (
        chat(
            client,
            user="me",
            store=False,
            service_tier="auto",
            metadata={"a": "b"},
            parallel_tool_calls=True,
            extra_body={"safety_identifier": "x"},
        )
        .choices[0]
        .message.content
        == "The Rhine."
    )


def test_a_chat_goes_on_after_an_answer_without_words(client, ours):
    said = chat(client, max_tokens=3, logit_bias={str(ours.stop_ids[0]): 100}).choices[0].message
    assert said.content == ""
    messages = [*HI, said, {"role": "user", "content": "Name a river."}]
    answer = chat(client, messages=messages, max_tokens=3)
    messages[1] = {"role": "assistant", "content": ""}
    assert answer.usage.prompt_tokens == len(ours.encode(messages))


def test_a_null_in_a_tool_stays(client, ours):
    """Schemas that pydantic makes of an optional field have one."""
    parameters = {"type": "object", "properties": {"zone": {"type": "string", "default": None}}}
    tool = {"type": "function", "function": {"name": "clock", "parameters": parameters}}
    count = chat(client, messages=HI, tools=[tool], max_tokens=1).usage.prompt_tokens
    assert count == len(ours.encode(HI, [tool]))


def test_tokenize_shows_what_training_would_see(address, models):
    record = RECORDS["tool"][2]["messages"]
    tokenizer = load_tokenizer(models[0])
    answer = httpx.post(f"{address}/tokenize", json={"model": "model", "messages": record}).json()
    assert (answer["tokens"], answer["mask"]) == encode_chat(tokenizer, record)
    assert answer["count"] == len(answer["texts"]) and "".join(answer["texts"]) == tokenizer.decode(
        answer["tokens"]
    )
    plain = httpx.post(f"{address}/tokenize", json={"model": "base", "prompt": "<|im_end|> hi"}).json()
    assert "".join(plain["texts"]) == "<|im_end|> hi" and all(plain["mask"]) and plain["count"] > 3


def test_metrics_and_health(address, client):
    def metrics():
        return dict(re.findall(r"^seedling_(\w+) (\S+)$", httpx.get(f"{address}/metrics").text, re.M))

    before = metrics()
    usage = chat(client, n=3).usage
    after = metrics()
    assert float(after["tokens_total"]) - float(before["tokens_total"]) == usage.completion_tokens
    assert after["answers_running"] == after["answers_waiting"] == "0"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}

    # A chat that goes on: what was computed before is not computed again, and it is counted.
    said = [{"role": "user", "content": "Name all rivers from A to Z, and from Z to A."}]
    first = chat(client, messages=said)
    said += [{"role": "assistant", "content": first.choices[0].message.content}, *HI]
    for model, n in (("odd", 1), ("model", 2)):
        before = metrics()
        usage = chat(client, messages=said, model=model, n=n, max_tokens=3).usage
        cached = usage.prompt_tokens_details.cached_tokens
        found = float(metrics()["cached_prompt_tokens_total"]) - float(before["cached_prompt_tokens_total"])
        assert found == n * cached
        assert (0 if model == "odd" else first.usage.prompt_tokens) <= cached < usage.prompt_tokens
        assert cached == 0 or model == "model"


def test_the_openapi_page_names_every_route(address):
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/health",
        "/metrics",
    } <= paths.keys()
