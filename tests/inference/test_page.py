"""The web page in a real browser, against a real server: Debian's chromium, driven by Playwright."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.serving_clients import Server
from dataset.chat import encode_chat
from model.weights import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "inference" / "page"
FILES = sorted(path for path in PAGE.iterdir() if path.is_file())
CHROMIUM = shutil.which("chromium")
# The browser asks nobody for updates and the like, and needs neither a sandbox nor a graphics card.
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync")
LONG = 6000  # tokens: enough of them to stop an answer in the middle


# ---------------------------------------------------------------- one server and one browser for all tests


@pytest.fixture(scope="module")
def address(home, tmp_path_factory):
    """The address of a server with models of random weights. They have room for long answers."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"the server needs {package} (requirements-serve.txt)")
    folder = tmp_path_factory.mktemp("page") / "models"
    shutil.copytree(home, folder)
    for name in ("chat", "base"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"max_position_embeddings": 2 * LONG}
        path.write_text(json.dumps(config), encoding="utf-8")
    models = ["--load_from", folder / "chat", folder / "base", "--lora", folder / "lora_a", folder / "lora_b"]
    with Server("--device", "cpu", "--grace_seconds", "0.1", *models) as server:
        yield server.address


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need Playwright")
    if CHROMIUM is None:
        pytest.skip("the page is tested in Debian's chromium: apt-get install chromium")
    playwright.expect.set_options(timeout=10_000)
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)


@pytest.fixture
def open_page(browser, address):
    """open_page(**options of the browser) opens the page in a tab that shares nothing with others.

    After the test: no error was reported in any tab, and nothing was asked of another host.
    """
    contexts, problems = [], []

    def open_one(prepare=None, allowed=None, **options):
        def note_message(message):
            if message.type in ("error", "warning") and not (allowed and allowed in message.text):
                problems.append(message.text)

        def note_request(request):
            if not request.url.startswith((address, "data:")):
                problems.append(request.url)

        context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", note_message)
        page.on("request", note_request)
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        if prepare:
            prepare(page)
        page.goto(address)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(open_page):
    page = open_page()
    page.locator("#model option").first.wait_for(state="attached")
    set_range(page, "#temperature", 0)
    page.fill("#length", "12")
    return page


def expect(*given):
    from playwright.sync_api import expect

    return expect(*given)


def set_range(page, selector, value):
    page.locator(selector).fill(str(value))


def ask(page, text="Hello", wait=True):
    """Asks, and returns what was asked of the server: one request for each answer."""
    sent = []

    def note(request):
        if request.method == "POST":
            sent.append(request.post_data_json)

    page.on("request", note)
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        idle(page)
    page.remove_listener("request", note)
    return sent


def idle(page):
    """Waits until no answer is written any more, and all of it is drawn."""
    expect(page.locator("#send")).to_have_text("↑")
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def posted(page, action):
    """What an action asks of the server."""
    with page.expect_request(lambda request: request.method == "POST") as request:
        action()
    idle(page)
    return request.value.post_data_json


def last(page, part):
    return page.locator(".turn").last.locator(part)


def fake(page, *deltas, finish="stop", status=200):
    """From now on the server seems to answer with these deltas."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
               {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}}]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=status, content_type="text/event-stream", body=body))


# ---------------------------------------------------------------- a conversation


def test_talk(page):
    expect(page.locator("#welcome")).to_be_visible()
    first, = ask(page, "Hello")
    assert first == {"model": "chat", "messages": [{"role": "user", "content": "Hello"}], "stream": True,
                     "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 12}
    expect(page.locator("#welcome")).to_be_hidden()
    expect(last(page, ".note")).to_have_text(re.compile(r"\d+ tokens · [\d,]+ tokens/s"))
    page.fill("#system", "Be brief.")
    sent = ask(page, "And then?")[-1]["messages"]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert sent[0]["content"] == "Be brief." and sent[1]["content"] == "Hello" and sent[2]["content"]
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name="What sound does a frog make?").click()
    idle(page)
    expect(page.locator(".question p")).to_have_text("What sound does a frog make?")


def test_a_screen_reader_hears_an_answer_once_and_whole(page):
    fake(page, {"content": "One "}, {"content": "frog"}, {"content": "."})
    ask(page)
    expect(page.locator("[aria-live=polite]")).to_have_text("chat: One frog.")
    assert page.locator(".turn [aria-live]").count() == 0
    for control in page.locator("button, input, select, textarea").all():
        name = control.evaluate("e => (e.ariaLabel || e.labels?.[0]?.textContent || e.textContent).trim()")
        assert name, control.evaluate("e => e.outerHTML")


def test_stop_and_again(page):
    page.fill("#length", str(LONG))
    ask(page, wait=False)
    page.wait_for_timeout(150)
    page.get_by_role("button", name="Stop").click()
    expect(last(page, ".note")).to_have_text("stopped")
    idle(page)
    page.get_by_role("button", name="Again").click()  # and Escape stops as the button does
    expect(last(page, ".note")).to_have_text("writing")
    page.keyboard.press("Escape")
    expect(last(page, ".note")).to_have_text("stopped")
    page.fill("#length", "12")
    again = posted(page, page.get_by_role("button", name="Again").click)
    assert again["messages"] == [{"role": "user", "content": "Hello"}] and again["max_tokens"] == 12
    expect(page.locator(".answer")).to_have_count(1)
    expect(last(page, ".note")).to_contain_text("12 tokens")


def test_again_while_the_answer_is_being_written(page):
    ask(page)
    whole = last(page, ".text").text_content()
    page.get_by_role("button", name="New chat").click()
    page.fill("#length", str(LONG))
    ask(page, wait=False)
    for length in (LONG, LONG, 12):  # nothing of an answer that was broken off comes into the next one
        expect(last(page, ".text")).not_to_be_empty()
        page.fill("#length", str(length))
        page.get_by_role("button", name="Again").click()
        if length == LONG:
            page.wait_for_timeout(100)
            expect(page.get_by_role("button", name="Stop")).to_be_visible(timeout=1)
    idle(page)
    expect(last(page, ".note")).to_contain_text("12 tokens")
    assert last(page, ".text").text_content() == whole
    expect(page.locator("#finished p")).to_have_count(1)


def test_what_was_cut_off_goes_on(page):
    page.fill("#length", "5")
    ask(page)
    expect(last(page, ".note")).to_contain_text("cut off · 5 tokens")
    begun = last(page, ".text").text_content()
    sent = posted(page, page.get_by_role("button", name="Continue").click)
    assert sent["continue_final_message"] is True and sent["messages"][-1]["role"] == "assistant"
    assert last(page, ".text").text_content().startswith(begun.rstrip())
    assert len(last(page, ".text").text_content()) > len(begun)
    fake(page, {"content": "A \ufffd"}, finish="length")  # in the middle of a character
    ask(page, "Two")
    page.unroute_all()
    sent = posted(page, page.locator(".turn").last.get_by_role("button", name="Continue").click)
    assert sent["messages"][-1]["content"] == "A "


def test_edit_and_resend(page):
    for text in ("One", "Two", "Three"):
        ask(page, text)
    question = page.locator(".question").nth(1)
    question.get_by_role("button", name="Edit").click()
    question.get_by_role("textbox").fill("Not sent")
    question.get_by_role("button", name="Cancel").click()
    expect(page.locator(".question p")).to_have_text(["One", "Two", "Three"])
    question.get_by_role("button", name="Edit").click()
    question.get_by_role("textbox").fill("Second")
    sent = posted(page, question.get_by_role("button", name="Send").click)
    assert [m["content"] for m in sent["messages"] if m["role"] == "user"] == ["One", "Second"]
    expect(page.locator(".question p")).to_have_text(["One", "Second"])


def test_each_field_takes_what_is_typed(page):
    """Key by key: `fill` writes into a field even if the page swallows the keys."""
    ask(page, "One")
    edit = page.locator(".question").get_by_role("button", name="Edit")
    edit.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(edit).to_be_focused()
    page.keyboard.press("Enter")
    for field in (page.locator(".question textarea"), *map(page.locator, ("#question", "#system", "#tools"))):
        field.focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("x y")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Backspace")
        expect(field).to_have_value("xy")
    page.locator("#tools").fill("")
    page.locator(".question textarea").focus()
    sent = posted(page, lambda: page.keyboard.press("Enter"))
    assert sent["messages"][-1] == {"role": "user", "content": "xy"}


def test_copy(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.locator("#model option").first.wait_for(state="attached")
    fake(page, {"content": "**Croak**"})
    ask(page)
    page.locator(".answer").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "**Croak**"


def test_side_by_side_each_with_its_own_history(page):
    page.select_option("#beside", label="chat + lora_a")
    ask(page, "One")
    expect(page.locator(".answer h3")).to_have_text(["chat", "chat + lora_a"])
    said = page.locator(".answer .text").all_text_contents()
    assert said[0] != said[1]
    second = {body["model"]: body["messages"] for body in ask(page, "Two")}
    assert second.keys() == {"chat", "lora_a"}
    assert second["chat"][1] != second["lora_a"][1] and second["chat"][1]["role"] == "assistant"
    page.locator(".answer").last.get_by_role("button", name="Again").click()
    idle(page)
    expect(page.locator(".answer")).to_have_count(4)


def test_mixing_adapters(page):
    expect(page.locator("#mix")).to_be_hidden()
    page.select_option("#model", label="a mix of adapters")
    set_range(page, "#mix input >> nth=0", 0.7)
    page.locator("#mix input").nth(1).focus()
    page.keyboard.press("Home")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#mix .value").nth(1)).to_have_text("-0.5")
    sent, = ask(page)
    assert sent["model"] == "chat" and sent["adapters"] == {"lora_a": 0.7, "lora_b": -0.5}
    expect(page.locator(".answer h3")).to_have_text("chat + 0.7 lora_a − 0.5 lora_b")
    for slider in page.locator("#mix input").all():
        slider.fill("0")
    assert "adapters" not in ask(page)[-1]


def test_a_base_model_continues_a_text(page):
    page.select_option("#model", label="base (base model)")
    expect(page.get_by_role("status")).to_contain_text("A base model knows no conversation.")
    ask(page, "One")
    assert ask(page, "The frog")[-1]["messages"] == [{"role": "user", "content": "The frog"}]
    expect(last(page, ".note")).to_contain_text("cut off")
    begun = last(page, ".text").text_content()
    sent = posted(page, page.locator(".turn").last.get_by_role("button", name="Continue").click)
    assert len(sent["messages"]) == 1 and sent["messages"][0]["content"].startswith("The frog")
    assert "continue_final_message" not in sent and len(last(page, ".text").text_content()) > len(begun)
    page.select_option("#model", label="chat")  # and no conversation knows what it wrote
    assert ask(page, "Hello")[-1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_thinking_is_folded_and_calls_are_shown(page):
    call = {"index": 0, "id": "call_1", "type": "function",
            "function": {"name": "clock", "arguments": '{"zone": "<b>Oslo"}'}}
    fake(page, {"reasoning_content": "Hm, <i>a frog</i>."}, {"content": "Wait."}, {"tool_calls": [call]},
         finish="tool_calls")
    ask(page)
    thinking = last(page, "details")
    assert thinking.evaluate("e => e.open") is False
    thinking.locator("summary").click()
    expect(thinking.locator("p")).to_have_text("Hm, <i>a frog</i>.")
    expect(last(page, "figcaption")).to_have_text("Call of the tool clock")
    expect(last(page, "figure pre")).to_have_text('{"zone": "<b>Oslo"}')
    page.unroute_all()
    message = ask(page, "Thanks")[-1]["messages"][1]
    assert message["reasoning_content"] == "Hm, <i>a frog</i>."
    assert message["tool_calls"] == [{name: call[name] for name in ("id", "type", "function")}]


def test_tools_are_offered_and_thinking_is_turned_on_and_off(page, home):
    tool = {"type": "function", "function": {"name": "clock", "description": "the time"}}
    page.fill("#tools", "{clock")
    ask(page)
    expect(last(page, ".error")).to_contain_text("The tools are not valid JSON: ")
    page.fill("#tools", json.dumps(tool))
    page.select_option("#thinking", label="on")
    sent = ask(page, "Two")[-1]
    assert sent["tools"] == [tool] and sent["chat_template_kwargs"] == {"enable_thinking": True}
    expect(last(page, ".error")).to_be_empty()
    page.get_by_role("button", name="Tokens and loss mask").click()  # training would see the tools, too
    expect(page.locator("#training-tokens li").first).to_be_visible()
    asked = ask_of_tokenize(page)
    ids, _ = encode_chat(load_tokenizer(home / "chat"), asked["messages"], [tool])
    assert page.locator("#training-tokens small").all_text_contents() == [str(i) for i in ids]
    page.keyboard.press("Escape")
    page.fill("#tools", json.dumps([tool, tool]))
    page.select_option("#thinking", label="off")
    sent = ask(page, "Three")[-1]
    assert sent["tools"] == [tool, tool] and sent["chat_template_kwargs"] == {"enable_thinking": False}
    page.select_option("#model", label="base (base model)")
    assert not ask(page, "Four")[-1].keys() & {"tools", "chat_template_kwargs"}


def test_a_thought_that_was_cut_off_goes_on(page):
    fake(page, {"reasoning_content": "Hm, a frog"}, finish="length")
    ask(page)
    page.unroute_all()
    page.fill("#length", "5")
    sent = posted(page, page.get_by_role("button", name="Continue").click)
    assert sent["messages"][-1] == {"role": "assistant", "content": "<think>\nHm, a frog"}
    thought = last(page, ".thinking p").text_content()
    assert thought.startswith("Hm, a frog") and len(thought) > len("Hm, a frog")
    assert last(page, ".text").text_content() == ""


def test_the_view_stays_where_the_reader_put_it(page):
    page.fill("#length", str(LONG))
    page.set_viewport_size({"width": 500, "height": 400})
    page.locator("#settings").evaluate("e => { e.open = false }")
    ask(page, wait=False)
    scroller = page.locator("#scroller")
    for _ in range(100):  # until the text is longer than the view
        if scroller.evaluate("e => e.scrollTop") > 100:
            break
        page.wait_for_timeout(50)
    scroller.evaluate("e => { e.scrollTop = 10 }")
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    assert scroller.evaluate("e => e.scrollTop") == 10


# ---------------------------------------------------------------- the learner's view


@pytest.fixture
def tokens(page):
    page.get_by_role("switch", name="Probabilities").check()
    sent, = ask(page, "Tell me")
    assert sent["logprobs"] is True and sent["top_logprobs"] == 8
    expect(page.locator(".token")).to_have_count(12)
    return page


def test_probabilities_by_mouse(tokens):
    page, others = tokens, tokens.locator("#others")
    expect(others).to_be_hidden()
    label = page.locator(".token").nth(4).get_attribute("aria-label")
    assert re.fullmatch(r".+, (< 0\.1|\d+\.\d) %", label)
    unsure = page.locator(".token").nth(4).evaluate("e => e.style.getPropertyValue('--unsure')")
    assert 0 <= float(unsure) <= 1
    page.locator(".token").nth(4).hover()
    expect(others).to_be_visible()
    percents = [float(text.strip("< %")) for text in others.locator("span").all_text_contents()]
    assert len(percents) == 8 and sum(percents) < 101
    expect(others.get_by_text("written", exact=True)).to_have_count(1)
    before = "".join(t.text_content() for t in page.locator(".token").all()[:4])
    choice = others.locator("button:enabled").first
    shown = choice.locator("b").text_content()
    sent = posted(page, choice.click)
    assert sent["continue_final_message"] is True and sent["messages"][-1]["role"] == "assistant"
    assert sent["messages"][-1]["content"] == before + shown.replace("·", " ").replace("⏎", "\n")
    assert page.locator(".token").nth(4).get_attribute("aria-label").startswith(shown)
    expect(page.locator(".token")).to_have_count(5 + 12)
    expect(others).to_be_hidden()
    page.locator(".token").nth(1).hover()
    expect(others).to_be_visible()
    page.mouse.move(5, 5)
    expect(others).to_be_hidden()
    page.get_by_role("switch", name="Probabilities").uncheck()  # the same words again as a text
    expect(page.locator(".tokens")).to_be_hidden()
    expect(last(page, ".text")).to_be_visible()


def test_probabilities_by_keyboard_alone(page):
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("() => document.activeElement.id") == "probabilities":
            break
    page.keyboard.press("Space")
    page.locator("#question").focus()
    page.keyboard.type("Tell me")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("more")
    page.keyboard.press("Enter")
    idle(page)
    expect(page.locator(".question p")).to_have_text("Tell me\nmore")
    for _ in range(10):
        page.keyboard.press("Shift+Tab")
        if "token" in page.evaluate("() => document.activeElement.className"):
            break
    focused = page.locator(":focus")
    assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(2)).to_be_focused()
    expect(page.get_by_role("menu")).to_be_visible()
    page.keyboard.press("Enter")
    assert focused.get_attribute("role") == "menuitem"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    expect(page.locator(".token").nth(2)).to_be_focused()
    page.keyboard.press("ArrowDown")
    sent = posted(page, lambda: page.keyboard.press("Enter"))
    assert sent["continue_final_message"] is True
    expect(page.locator(".token").nth(2)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("menu")).to_be_hidden()
    expect(page.locator(".token[tabindex='0']")).to_have_count(1)


def test_tokens_that_cannot_be_chosen(page):
    def entry(token, data, logprob, index):
        return {"token": token, "bytes": list(data), "logprob": logprob, "id": index}

    others = [entry("\ufffd", b"\xe4", -0.5, 1), entry("<|im_end|>", b"<|im_end|>", -2, 2),
              entry(" 好", " 好".encode(), -3, 3)]
    tokens = [entry("a ", b"a ", -0.1, 9), others[0], entry("\ufffd", b"\xbd\xa0", -0.1, 5),
              entry("\n", b"\n", -9, 6)]
    content = [token | {"top_logprobs": others} for token in tokens]

    def prepare(route):
        chunk = {"choices": [{"index": 0, "delta": {"content": "a 你\n"}, "finish_reason": "stop",
                              "logprobs": {"content": content}}]}
        route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    page.route("**/v1/chat/completions", prepare)
    page.get_by_role("switch", name="Probabilities").check()
    ask(page)
    expect(page.locator(".token").nth(3)).to_have_text("⏎\n", use_inner_text=False)
    enabled = []
    for index in range(4):
        page.locator(".token").nth(index).hover()
        expect(page.locator("#others")).to_be_visible()
        enabled.append(page.locator("#others button:enabled b").all_text_contents())
    # In the place of the second half of a character no other token can stand.
    assert enabled == [["·好"], ["·好"], [], ["·好"]]
    sent = posted(page, page.locator("#others button:enabled").click)
    assert sent["messages"][-1]["content"] == "a 你 好"


def test_the_loss_mask_is_that_of_training(page, home):
    page.get_by_role("button", name="Tokens and loss mask").click()
    expect(page.get_by_role("dialog")).to_contain_text("There is no conversation yet.")
    page.get_by_role("button", name="Close").click()
    ask(page, "One")
    said = ask(page, "Two")[-1]["messages"]
    page.get_by_role("button", name="Tokens and loss mask").click()
    expect(page.locator("#training-tokens li").first).to_be_visible()
    asked = ask_of_tokenize(page)
    assert asked["messages"][:3] == said and len(asked["messages"]) == 4
    ids, mask = encode_chat(load_tokenizer(home / "chat"), asked["messages"])
    assert page.locator("#training-tokens small").all_text_contents() == [str(i) for i in ids]
    boxes = page.locator("#training-tokens li").all()
    assert ["trained" in (box.get_attribute("class") or "") for box in boxes] == [bool(m) for m in mask]
    assert page.locator("#training-tokens .unseen").count() == sum(mask) > 0  # said in words, too
    expect(page.locator("#training-legend")).to_contain_text(f"{len(ids)} of {2 * LONG} tokens")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def ask_of_tokenize(page):
    """What the open panel has asked of the server."""
    with page.expect_request("**/tokenize") as request:
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="Tokens and loss mask").click()
    expect(page.locator("#training-tokens li").first).to_be_visible()
    return request.value.post_data_json


# ---------------------------------------------------------------- hostile words, errors, a key


HOSTILE = """<script>window.owned = 1</script> <img src=x onerror="window.owned = 2">
<svg onload="window.owned = 3"> <style>body { display: none }</style>

<form action="/v1/models"><input name="send"></form> <p id="send" style="color: red">

[one](javascript:window.owned=4) [two](JAVA&#115;CRIPT:window.owned=5)
[three](data:text/html,x) [four](/v1/models)
[good](https://example.org/) [mail](mailto:a@example.org) ![picture](https://example.org/a.png)

<iframe src="https://example.org"></iframe> <a href="https://example.org" onclick="window.owned = 6">x</a>"""


def test_hostile_words_are_harmless(page):
    fake(page, {"reasoning_content": HOSTILE}, {"content": HOSTILE})
    ask(page, HOSTILE)
    text = last(page, ".text")
    expect(text).to_contain_text("<script>window.owned = 1</script>")
    for link in text.locator("a").all():
        link.evaluate("e => { if (!e.href) e.click() }")
    assert page.evaluate("() => window.owned") is None
    bad = "script, img, svg, style, form, input, iframe, [id], [style], [name]"
    assert page.locator(f".turn :is({bad})").count() == 0
    links = text.locator("a[href]")
    addresses = links.evaluate_all("all => all.map(e => e.href)")
    assert addresses == ["https://example.org/", "mailto:a@example.org"]
    for link in links.all():
        assert link.get_attribute("target") == "_blank" and "noopener" in link.get_attribute("rel")
    fake(page, {"content": "[" * 9000 + ">" * 9000 + "\n\n" + "> " * 9000})  # deeper than a parser can go
    ask(page)
    expect(last(page, ".text")).to_contain_text("[[[")


def test_markdown(page):
    source = "# A frog\n\n1. **one**\n2. `two`\n\n| a |\n|---|\n| b |\n\n```python\nx = '<b>'\n```\n"
    fake(page, *({"content": sign} for sign in source))
    ask(page)
    box = last(page, ".text")
    expect(box.locator("h1")).to_have_text("A frog")
    expect(box.locator("li strong")).to_have_text("one")
    expect(box.locator("td")).to_have_text("b")
    expect(box.locator("pre")).to_have_text("x = '<b>'\n")


def test_errors_are_one_line_on_the_page(open_page):
    page = open_page(allowed="Failed to load resource")
    page.locator("#model option").first.wait_for(state="attached")
    page.fill("#length", "-1")
    ask(page)  # the real server refuses this
    expect(last(page, ".error")).to_have_text(re.compile("max_tokens: .+"))
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Again").click()
    expect(page.get_by_role("alert")).to_have_text("The server does not answer. Is it still running?")
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body='data: {"error": {"message": "no <b>memory</b>"}}\n\n'))
    page.get_by_role("button", name="Again").click()
    expect(page.get_by_role("alert")).to_have_text("no <b>memory</b>")
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, body="busy"))
    page.get_by_role("button", name="Again").click()
    expect(page.get_by_role("alert")).to_have_text("The server answered with the status 503.")
    page.unroute_all()
    page.fill("#length", "5")
    page.get_by_role("button", name="Again").click()
    expect(last(page, ".note")).to_contain_text("5 tokens")
    expect(last(page, ".error")).to_be_empty()


def test_a_key_is_asked_for_and_kept(open_page):
    def lock(page):
        page.route("**/v1/models", lambda route: route.continue_()
                   if route.request.headers.get("authorization") == "Bearer secret"
                   else route.fulfill(status=401, json={"error": {"message": "no key"}}))

    page = open_page(prepare=lock, allowed="401")
    expect(page.get_by_role("status")).to_contain_text("This server asks for a key.")
    expect(page.get_by_label("Key of this server")).to_be_focused()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#model option")).to_have_count(5)
    expect(page.get_by_role("status")).to_be_empty()
    page.reload()
    expect(page.locator("#model option")).to_have_count(5)
    expect(page.locator("#mix input")).to_have_count(2)


# ---------------------------------------------------------------- languages, colours, sizes


def test_a_phone(open_page):
    page = open_page(has_touch=True)
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.locator("#model option").first.wait_for(state="attached")
    table = f"| a | b |\n|---|---|\n| {'x' * 90} | {'y' * 90} |"
    fake(page, {"content": f"{'w' * 200}\n\n{table}\n\n```\n{'z' * 300}\n```\n"})
    expect(page.locator("#model")).to_be_hidden()
    beside = lambda: page.select_option("#beside", index=1)  # noqa: E731
    for step in (page.locator("summary").first.tap, beside, lambda: ask(page, "v" * 200),
                 page.locator("#show-training").tap):
        step()
        page.wait_for_timeout(50)
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
        boxes = page.locator("main, #scroller, .question p, .answer, .answer > *, dialog").all()
        rights = [box.evaluate("e => e.getBoundingClientRect().right") for box in boxes]
        assert max(rights) <= 390, rights
        for box in page.locator(".text, .question p").all():
            assert box.evaluate("e => e.scrollWidth <= e.clientWidth")


def test_chinese(open_page):
    page = open_page(locale="zh-CN")
    page.locator("#model option").first.wait_for(state="attached")
    assert page.locator("html").get_attribute("lang") == "zh"
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    expect(page.get_by_placeholder("请输入消息")).to_be_visible()
    examples = ["你是谁？", "猫怎么叫？", "讲一个关于猫在磨坊里的故事。"]
    expect(page.locator("#examples button")).to_have_text(examples)
    shown = page.locator("body").inner_text()
    latin = {"Seedling", "chat", "base", "lora_a", "lora_b", "JSON"}
    assert set(re.findall(r"[A-Za-z_]{2,}", shown)) == latin
    page.fill("#length", "5")
    page.locator("#examples button").first.click()
    expect(page.locator(".note")).to_contain_text("因长度中断 · 5 个词元")


def test_english_elsewhere(open_page):
    page = open_page(locale="de-DE")
    assert page.locator("html").get_attribute("lang") == "en"
    expect(page.get_by_role("button", name="New chat")).to_be_visible()


def test_dark_and_light_are_readable(open_page):
    def contrast(one, other):
        """As WCAG defines it: 4.5 is asked of small text."""
        def light(colour):
            parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
            parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
        high, low = sorted((light(one), light(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    backgrounds = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        page.locator("#model option").first.wait_for(state="attached")
        places = {"text": ("#welcome h2", "color"), "dim": ("#welcome p", "color"),
                  "card": ("main", "backgroundColor"), "button": ("#send", "color"),
                  "green": ("#send", "backgroundColor")}
        colour = {name: page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{of}")
                  for name, (selector, of) in places.items()}
        backgrounds.append(colour["card"])
        assert contrast(colour["text"], colour["card"]) > 10, (scheme, colour)
        assert contrast(colour["dim"], colour["card"]) > 4.5, (scheme, colour)
        assert contrast(colour["button"], colour["green"]) > 4.5, (scheme, colour)
        assert contrast(colour["green"], colour["card"]) > 4.5, (scheme, colour)
    assert backgrounds[0] != backgrounds[1]


# ---------------------------------------------------------------- the files


def test_the_page_is_small():
    lines = [line for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) <= 900
    assert max(len(line) for line in lines) <= 120


def test_every_text_has_its_chinese():
    sources = {path.name: path.read_text(encoding="utf-8") for path in FILES}
    chinese = set(re.findall(r'^ *"(.+?)": *(?="|$)|, "(.+?)": "', sources["words.js"], re.MULTILINE))
    chinese = {one or other for one, other in chinese}
    code = "".join(text for name, text in sources.items() if name.endswith(".js") and name != "words.js")
    used = {re.sub(r'" \+\s+"', "", text) for text in re.findall(r'\bt\("((?:[^"]|" \+\s+")+)"', code)}
    used |= set(re.findall(r"\bdata-t>([^<]+)<", sources["index.html"]))
    for element in re.findall(r"<[^>]+ data-t>", sources["index.html"]):
        used |= set(re.findall(r'(?:aria-label|placeholder)="([^"]+)"', element))
    used.discard("↑")
    examples = re.search(r"EXAMPLES = \[(.+?)\]", code, re.DOTALL)[1]
    used |= set(re.findall(r'"([^"]+)"', examples))
    assert len(used) > 40 and used == chinese


def test_the_page_holds_no_script_and_no_style_of_its_own():
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?:", text)
    for path in FILES:
        if path.suffix == ".js":
            assert not re.search(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b",
                                 path.read_text(encoding="utf-8")), path.name
