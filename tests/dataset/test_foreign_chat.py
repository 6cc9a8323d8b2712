"""Chat templates of other makers: ids and mask as transformers has them, for the shapes that templates have.

Each template marks with {% generation %} what the model has to write, which transformers turns into a mask;
dataset/foreign_chat.py never looks at those marks.
"""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from common.errors import DataError
from dataset import chat
from dataset.foreign_chat import with_standard_calls


def template(turn: str, before: str = "", prompt: str = "") -> str:
    """`turn` is written for each message `m`; "{A ... A}" in it stands around what the assistant writes."""
    turn = turn.replace("{A", "{% generation %}").replace("A}", "{% endgeneration %}")
    return (before + "{% for m in messages %}" + turn + "{% endfor %}"
            + "{% if add_generation_prompt %}" + prompt + "{% endif %}")


def by_role(user: str, assistant: str, system: str = "{{ raise_exception('no system message') }}") -> str:
    return (f"{{% if m.role == 'user' %}}{user}{{% elif m.role == 'assistant' %}}{assistant}"
            f"{{% else %}}{system}{{% endif %}}")


CHATML = "<|im_start|>{{ m.role }}\n"
TEMPLATES = {
    "chatml": template(
        by_role(CHATML + "{{ m.content }}<|im_end|>\n", CHATML + "{A{{ m.content }}<|im_end|>A}\n",
                CHATML + "{{ m.content }}<|im_end|>\n"), prompt="<|im_start|>assistant\n"),
    "chatml with a system message of its own": template(
        by_role(CHATML + "{{ m.content }}<|im_end|>\n", CHATML + "{A{{ m.content }}<|im_end|>A}\n",
                CHATML + "{{ m.content }}<|im_end|>\n"), prompt="<|im_start|>assistant\n",
        before="{% if messages[0].role != 'system' %}<|im_start|>system\nHelp!<|im_end|>\n{% endif %}"),
    "llama 2": template(  # the system message stands within the first question
        by_role("{% if loop.index0 == first %}<s>[INST] {{ system + m.content.strip() }} [/INST]"
                "{% else %}<s>[INST] {{ m.content.strip() }} [/INST]{% endif %}",
                "{A {{ m.content.strip() }} </s>A}", ""),
        before="{% set first = 1 if messages[0].role == 'system' else 0 %}{% set system = '<<SYS>>\n' + "
               "messages[0].content + '\n<</SYS>>\n\n' if first else '' %}"),
    "llama 3": template(
        by_role("<|start|>user<|end|>\n\n{{ m.content | trim }}<|eot|>",
                "<|start|>assistant<|end|>\n\n{A{{ m.content | trim }}<|eot|>A}",
                "<|start|>system<|end|>\n\nDate: today\n\n{{ m.content | trim }}<|eot|>"),
        before="<|begin|>", prompt="<|start|>assistant<|end|>\n\n"),
    "gemma": template(by_role("<turn>user\n{{ m.content | trim }}</turn>\n",
                              "<turn>model\n{A{{ m.content | trim }}</turn>A}\n"),
                      before="<bos>", prompt="<turn>model\n"),
    "zephyr": template(by_role("<|user|>\n{{ m.content }}</s>\n", "<|assistant|>\n{A{{ m.content }}</s>A}\n",
                               "<|system|>\n{{ m.content }}</s>\n"), prompt="<|assistant|>\n"),
    "vicuna": template(  # its prompt ends before the space that the answer begins with
        by_role("USER: {{ m.content }} ", "ASSISTANT:{A {{ m.content }}</s>A}", "{{ m.content }}\n\n"),
        prompt="ASSISTANT:"),
    "a space before the last answer alone": template(
        by_role("USER: {{ m.content }} ",
                "ASSISTANT:{A{% if loop.last %} {% endif %}{{ m.content }}</s>A}", "{{ m.content }}\n\n"),
        prompt="ASSISTANT:"),
    "a space before the answer, which the prompt has": template(
        by_role("Q: {{ m.content }}\n", "A: {A{{ m.content }}</s>A}\n", "{{ m.content }}\n"), prompt="A: "),
    "trimmed on the left": template(
        by_role("[U]{{ m.content.lstrip() }}", "[A]{A{{ m.content.lstrip() }}</s>A}"), prompt="[A]"),
    "trimmed on the right": template(
        by_role("[U]{{ m.content.rstrip() }}", "[A]{A{{ m.content.rstrip() }}</s>A}"), prompt="[A]"),
    "trimmed of line breaks": template(
        by_role("[U]{{ m.content.strip('\n') }}", "[A]{A{{ m.content.strip('\n') }}</s>A}"), prompt="[A]"),
    "trimmed of line breaks on the left": template(  # as Qwen3's does
        by_role("[U]{{ m.content }}", "[A]{A{{ m.content.lstrip('\n') }}</s>A}"), prompt="[A]"),
    "no turn for an empty question": template(
        by_role("{{ '[U]' + m.content if m.content }}", "[A]{A{{ m.content }}</s>A}"), prompt="[A]"),
}
CONTROL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|start|>", "<|end|>", "<|eot|>", "<|begin|>",
           "<turn>", "</turn>", "<bos>", "  "]  # fmt: skip
WORDS = ["What colour is the sky?", " The sky is blue.\n\n", "USER: Hi ASSISTANT: Hello [INST] 1 + 1 = 2"]


def byte_level(control=CONTROL, **options) -> Tokenizer:
    """GPT-2's kind of tokenizer, with a few merges; a space joins the word after it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(WORDS * 3, trainer)
    backend.add_special_tokens([AddedToken(token, **{"normalized": False, **options}) for token in control])
    return backend


def with_template(backend: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=chat_template)


TOKENIZERS = {name: with_template(byte_level(), text) for name, text in TEMPLATES.items()}


def say(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def theirs(tokenizer, messages) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True,
                                          return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


# Texts with whatever templates and tokenizers treat apart, at their edges above all.
PARTS = ["Hi", "sky", " ", "\n", "\t", "  ", "猫", "😀", "1", "[INST]", "ASSISTANT:", "{{ 0 }}", "<", ">",
         "|im_end|>", "assistant\n", "\ue0000\ue001", "é"]  # fmt: skip
TEXT = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("".join)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(st.tuples(TEXT | st.just(""), TEXT), min_size=1, max_size=3), system=st.none() | TEXT)
@example(turns=[("Hi", "Hello"), ("", "Hi")], system=None)
@example(turns=[(" \n x", "\n x \n"), ("\n", " y\n"), ("z", "z")], system="Be kind.")
def test_ids_and_mask_are_those_of_transformers(name, turns, system):
    tokenizer = TOKENIZERS[name]
    if "no system message" in TEMPLATES[name]:
        system = None
    messages = say(*(text for turn in turns for text in turn), system=system)
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    try:
        ids, mask = chat.encode_chat(tokenizer, messages)
    except DataError as error:  # words that make a control token, alone or with what stands beside them
        assert "would take it for a control token" in str(error)
        plain = tokenizer.apply_chat_template([dict(m, content="x") for m in messages], tokenize=False)
        count = [sum(text.count(token) for token in CONTROL[:-1]) for text in (written, plain)]
        assert count[0] > count[1]
        return
    assert (ids, mask) == theirs(tokenizer, messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_generation(name):
    ids, mask = chat.encode_chat(TOKENIZERS[name], say("Hi"), add_generation_prompt=True)
    assert not any(mask) and ids == TOKENIZERS[name].apply_chat_template(
        say("Hi"), tokenize=True, return_dict=False, add_generation_prompt=True)


def test_a_tokenizer_that_cuts_pads_adds_tokens_or_trims_offsets():
    """What tokenizer.json may hold for other uses; transformers turns it off for a template, too."""
    control = CONTROL[:-1]  # without the two spaces
    backend = byte_level(control)
    backend.enable_truncation(4)
    backend.enable_padding(length=200, pad_id=0, pad_token="!")
    begin = ("<s>", backend.token_to_id("<s>"))
    trim = processors.ByteLevel(trim_offsets=True)
    backend.post_processor = processors.Sequence(
        [trim, processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])])
    # The prompt ends in a space that is a token of its own, as the answer begins with another one.
    text = TEMPLATES["a space before the answer, which the prompt has"]
    messages = say("Hi there", " Hello you")
    ids, mask = chat.encode_chat(with_template(backend, text), messages)
    assert (ids, mask) == theirs(with_template(byte_level(control), text), messages)
    assert ids == with_template(backend, text).apply_chat_template(messages, tokenize=True, return_dict=False)


# --- what would become a control token ---------------------------------------------------------------------


def control_of(tokenizer, messages) -> list[str]:
    """The control tokens that transformers makes of a conversation."""
    ids, added = tokenizer.apply_chat_template(messages)["input_ids"], tokenizer.added_tokens_decoder
    return [added[index].content for index in ids if index in added]


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<e>{% endfor %}"


def test_the_longest_control_token_counts():
    """Of "<e>" and "<e>x" a tokenizer takes the longer one, here from a message and what stands before it."""
    tokenizer = with_template(byte_level(["<e>", "<e>x", "<e>xy"]), TURNS.replace("[{{ m.role }}]", ""))
    assert control_of(tokenizer, say("Hi", "Hello")) == ["<e>", "<e>"]
    for word, taken in (("x", "<e>x"), ("xy", "<e>xy")):
        assert control_of(tokenizer, say("Hi", word)) == [taken, "<e>"]
        with pytest.raises(DataError, match=f"'{taken}' at the edge of a message"):
            chat.encode_chat(tokenizer, say("Hi", word))


def test_a_control_token_that_is_normalized_is_found_in_plain_text():
    backend = byte_level(["<e>"])
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("＜x＞", normalized=True)])
    tokenizer = with_template(backend, TURNS)
    for text in ("a<x>", "a＜x＞"):
        assert control_of(tokenizer, say(text, "b"))[0] == "＜x＞"
        with pytest.raises(DataError, match="would take it for a control token"):
            chat.encode_chat(tokenizer, say(text, "b"))


def test_runs_of_spaces_that_are_tokens_control_nothing():
    for run in ("  ", "\t\t", "\n\n", "\r\r", "\u2581\u2581"):
        tokenizer = with_template(byte_level(["<e>", run]), TURNS)
        messages = say(f"a{run}b", f"{run}c")
        ids, mask = chat.encode_chat(tokenizer, messages)
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == f"{run}c<e>"


LETTERS = ["<unk>", *"Hielousrant[]"]


@pytest.mark.parametrize("model", [
    models.BPE({letter: i for i, letter in enumerate(LETTERS)}, [], unk_token="<unk>"),
    models.Unigram([(letter, -float(i)) for i, letter in enumerate(LETTERS)], unk_id=0),
])
def test_a_template_may_write_the_token_for_the_unknown_and_a_text_may_not(model):
    backend = Tokenizer(model)
    backend.add_special_tokens(["<unk>", "<e>"])
    tokenizer = with_template(backend, "<unk>" + TURNS)
    ids, mask = chat.encode_chat(tokenizer, say("Hi", "Hello"))
    assert ids == tokenizer.apply_chat_template(say("Hi", "Hello"))["input_ids"]
    assert ids.count(0) == 1 and sum(mask) == len("Hello") + 1
    for messages in (say("H?i", "Hello"), say("Hi", "Hello!")):
        with pytest.raises(DataError, match="no token for a character in it$"):
            chat.encode_chat(tokenizer, messages)


def test_where_the_tokenizer_itself_raises_one_line_says_why():
    backend = Tokenizer(models.Unigram([(letter, -1.0) for letter in LETTERS]))  # no token for the unknown
    backend.add_special_tokens(["<e>"])
    tokenizer = with_template(backend, TURNS)
    assert chat.encode_chat(tokenizer, say("Hi", "Hello"))[0] == tokenizer.apply_chat_template(
        say("Hi", "Hello"), tokenize=True, return_dict=False)
    with pytest.raises(DataError, match=r"^this tokenizer has no token for a character in it \(.+\)$"):
        chat.encode_chat(tokenizer, say("Hi", "Hello!"))


def test_a_tokenizer_without_any_control_token_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level([]), chat_template=TURNS)
    with pytest.raises(DataError, match="no control token that ends an answer"):
        chat.encode_chat(tokenizer, say("Hi", "Hello"))


# --- templates whose mask can't be known -------------------------------------------------------------------


@pytest.mark.parametrize("chat_template, reason", [
    (TURNS.replace("<e>", "(end)<e>"), "no control token that ends an answer"),
    (TURNS.replace("<e>", ""), "no control token that ends an answer"),
    (TURNS.replace("<e>", "{{ '<e>' if m.role == 'user' else '' }}"), "no control token that ends an answer"),
    ("{{ messages[0].content | length }}" + TURNS, "rewrites what a message says"),  # as the marks are 3 long
    (TURNS + "{{ messages[0].content | length }}", "rewrites what a message says"),
    (TURNS + "{% if messages[0].content | length > 3 %}long{% endif %}", "rewrites what a message says"),
    (TURNS + "{% if messages[0].content | length < 4 %}short{% endif %}", "rewrites what a message says"),
    (TURNS.replace("m.content", "m.content[:4]"), "rewrites what a message says"),
    (TURNS.replace("m.content", "m.content.replace('o', '0')"), "rewrites what a message says"),
    (TURNS + "{{ messages[-1].content }}", "leaves out, or moves"),
    ("{{ messages[-1].content }}<e>{{ messages[0].content }}<e>", None),
    (TURNS.replace("in messages", "in messages | reverse"), None),
    (TURNS.replace("[{{ m.role }}]", "X"), None),  # what stands before the words is no space
    (TURNS + "{{ raise_exception('nothing said') if '' in messages | map(attribute='content') }}", None),
    ("{{ raise_exception('not\ntoday') }}", "refuses it: not$"),
    ("{{ messages[7].content.x }}", "refuses it: "),
])
def test_a_template_is_refused_or_right(chat_template, reason):
    tokenizer = with_template(byte_level(["<e>"]), chat_template)
    messages = say("A long question", "Hello")
    if reason:
        with pytest.raises(DataError, match=reason) as error:
            chat.encode_chat(tokenizer, messages)
        assert "\n" not in str(error.value)
    else:  # an odd order is no harm
        ids, mask = chat.encode_chat(tokenizer, messages)
        assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == "Hello<e>"


# --- tools and thinking ------------------------------------------------------------------------------------

THINKING = (  # as Qwen3: thoughts about earlier questions are dropped, and a switch turns thinking off
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% set say = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '') %}"
    "{% generation %}{% if loop.index0 > ns.last and thought %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ say }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if say or not loop.first }}<tool_call>\n"
    "{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}"
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}"
    "\n</tool_response><|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
BARE_CALLS = (  # as Llama 3.2: a call is the whole answer, and results are written as JSON
    "<s>{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
    "<turn>assistant</turn>{% generation %}{{ '{\"name\": \"' + m.tool_calls[0].function.name + '\"' }}, "
    "{{ m.tool_calls[0].function.arguments | tojson }}}<eot>{% endgeneration %}"
    "{% elif m.role == 'assistant' %}<turn>assistant</turn>{% generation %}{{ m.content | trim }}<eot>"
    "{% endgeneration %}{% elif m.role == 'tool' %}<turn>tool</turn>{{ m.content | tojson }}<eot>"
    "{% else %}<turn>{{ m.role }}</turn>{{ m.content | trim }}<eot>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant</turn>{% endif %}")
WITH_IDS = (  # as Mistral's: calls have ids of nine characters
    "<s>{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% generation %}[CALLS]["
    "{% for c in m.tool_calls %}{{ {'name': c.function.name} | tojson }}"
    "{{ raise_exception('an id of nine characters') if c.id is not defined or c.id | length != 9 }}{{ c.id }}"
    "{% endfor %}]</s>{% endgeneration %}"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}{{ m.tool_call_id }}[/RESULT]"
    "{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content }}</s>{% endgeneration %}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}")
AS_TEXT = (  # as DeepSeek's: arguments are put into a string, and a message with calls has no content
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' and m.content is none %}"
    "<|A|>{% generation %}{% for c in m.tool_calls %}<|call|>{{ c.function.name + '\n' }}"
    "{{ '' + c.function.arguments }}<|/call|>{% endfor %}</s>{% endgeneration %}"
    "{% elif m.role == 'assistant' %}<|A|>{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% elif m.role == 'tool' %}<|R|>{{ m.content }}<|/R|>"
    "{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|>{% endif %}")
TOOL_TOKENS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
               "<s>", "</s>", "<turn>", "</turn>", "<eot>", "<|call|>", "<|/call|>", "<|A|>", "<|U|>",
               "<|R|>", "<|/R|>", "[CALLS]", "[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[RESULT]",
               "[/RESULT]"]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]
ASK, RESULT = {"role": "user", "content": "Weather?"}, {"role": "tool", "content": '{"t": "3 C"}'}
CALLS = [{"name": "weather", "arguments": {"city": "Oslo"}}]
CALL = {"role": "assistant", "content": "", "tool_calls": CALLS}
TOLD = {"role": "assistant", "content": "3 C."}


def tool_tokenizer(text: str) -> PreTrainedTokenizerFast:
    return with_template(byte_level(TOOL_TOKENS), text)


def agree(tokenizer, messages, tools=None, **calls) -> str:
    """Our ids and mask are transformers'; returns what is supervised."""
    theirs = tokenizer.apply_chat_template(with_standard_calls(messages, **calls), tools=tools, tokenize=True,
                                           return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = chat.encode_chat(tokenizer, messages, tools)
    assert (ids, mask) == (theirs["input_ids"], theirs["assistant_masks"])
    return tokenizer.decode([index for index, on in zip(ids, mask, strict=True) if on])


AS_IT_IS = {"no_content": False, "as_text": False, "with_ids": False}


@pytest.mark.parametrize("text, calls, said", [
    (THINKING, {}, '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
                   "3 C.<|im_end|>"),
    (BARE_CALLS, {}, '{"name": "weather", {"city": "Oslo"}}<eot>3 C.<eot>'),
    (WITH_IDS, {"with_ids": True}, '[CALLS][{"name": "weather"}call00000]</s> 3 C.</s>'),
    (AS_TEXT, {"as_text": True, "no_content": True},
     '<|call|>weather\n{"city": "Oslo"}<|/call|></s>3 C.</s>'),
])  # fmt: skip
def test_calls_and_results_in_a_foreign_template(text, calls, said):
    tokenizer = tool_tokenizer(text)
    assert agree(tokenizer, [ASK, CALL, RESULT, TOLD], TOOLS, **AS_IT_IS | calls) == said
    two = [ASK, CALL, RESULT, TOLD, {"role": "user", "content": "And now?"}, TOLD]
    assert agree(tokenizer, two, TOOLS, **AS_IT_IS | calls).startswith(said)
    as_json_text = dict(CALL, tool_calls=[{"name": "weather", "arguments": '{"city": "Oslo"}'}])
    assert chat.encode_chat(tokenizer, [ASK, as_json_text, RESULT, TOLD], TOOLS) == chat.encode_chat(
        tokenizer, [ASK, CALL, RESULT, TOLD], TOOLS)
    ids, mask = chat.encode_chat(tokenizer, [ASK, dict(CALL, trained=False), RESULT, TOLD], TOOLS)
    assert said.endswith(tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]).strip())
    assert 0 < sum(mask) < len(tokenizer(said)["input_ids"])


def test_thinking_in_a_foreign_template():
    tokenizer = tool_tokenizer(THINKING)
    thought, inline = dict(TOLD, reasoning_content="It is\ncold."), "<think>\nIt is\ncold.\n</think>\n\n3 C."
    said = inline + "<|im_end|>"
    assert agree(tokenizer, [ASK, thought], **AS_IT_IS) == said
    assert agree(tokenizer, [ASK, dict(TOLD, content=inline)], **AS_IT_IS) == said
    for old in (thought, dict(TOLD, content=inline)):
        assert agree(tokenizer, [ASK, old, ASK, thought], **AS_IT_IS) == "3 C.<|im_end|>" + said
    with_call = [ASK, dict(CALL, reasoning_content="Look."), RESULT, thought]
    said = agree(tokenizer, with_call, TOOLS, **AS_IT_IS)
    assert said.startswith("<think>\nLook.\n</think>\n\n<tool_call>")
    for thinking in (False, True):  # the switch, where a prompt for an answer is written
        pieces = chat.write_chat(tokenizer, [ASK], None, True, thinking)
        [(ids, _)] = chat.encode_pieces(tokenizer, [pieces])
        assert ids == tokenizer.apply_chat_template([ASK], tokenize=True, return_dict=False,
                                                    add_generation_prompt=True, enable_thinking=thinking)


@pytest.mark.parametrize("messages, tools, reason", [
    ([ASK, dict(TOLD, reasoning_content="Hm.")], None, "leaves out what the assistant thought"),
    ([ASK, CALL, RESULT, TOLD], None, "leaves out tool calls"),
    ([ASK, TOLD], TOOLS, "has no place for tools"),
    ([ASK, dict(TOLD, content="</s>")], None, "'</s>' in a message"),
    ([ASK, TOLD], [{"name": "</s>"}], "'</s>' in the tools"),
    ([ASK, dict(CALL, tool_calls=[{"name": "f", "arguments": {"</s>": 1}}])], None, "'</s>' in a message"),
])
def test_what_a_foreign_template_has_no_place_for_is_named(messages, tools, reason):
    """A template leaves out in silence what it does not know."""
    tokenizer = tool_tokenizer(TEMPLATES["zephyr"])
    with pytest.raises(DataError, match=reason):
        chat.encode_chat(tokenizer, messages, tools)


EMPTY_THOUGHT = template(by_role(
    "<|U|>{{ m.content }}", "<|A|>{A{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% else %}<think></think>{% endif %}{{ m.content }}<eot>A}"), prompt="<|A|>")  # fmt: skip


def test_an_empty_thought_after_the_prompt_is_the_models_own():
    """The prompt has no switch for it, so the model that answers has to write these signs."""
    tokenizer = tool_tokenizer(EMPTY_THOUGHT)
    assert agree(tokenizer, [ASK, TOLD], **AS_IT_IS) == "<think></think>3 C.<eot>"
    mixed = [ASK, TOLD, ASK, {**TOLD, "reasoning_content": "Hm."}]
    assert agree(tokenizer, mixed, **AS_IT_IS) == (
        "<think></think>3 C.<eot><think>Hm.</think>3 C.<eot>")


def test_a_thought_in_the_words_that_a_template_takes_out():
    """DeepSeek-R1's takes it out of every answer, Qwen3's out of answers to earlier questions."""
    cut_off = "{% set c = m.content.split('</think>')[-1] %}<|A|>{A{{ c }}<eot>A}"
    thought = {**TOLD, "content": "<think>\nHm.\n</think>\n\n3 C."}
    tokenizer = tool_tokenizer(template(by_role("<|U|>{{ m.content }}", cut_off), prompt="<|A|>"))
    assert agree(tokenizer, [ASK, TOLD], **AS_IT_IS) == "3 C.<eot>"
    with pytest.raises(DataError, match="leaves out what the assistant thought"):
        chat.encode_chat(tokenizer, [ASK, thought])
    qwen3 = tool_tokenizer(THINKING)
    ids, mask = chat.encode_chat(qwen3, [ASK, thought, ASK, thought])
    learnt = qwen3.decode([index for index, on in zip(ids, mask, strict=True) if on])
    assert learnt == "3 C.<|im_end|><think>\nHm.\n</think>\n\n3 C.<|im_end|>"


def test_the_token_that_begins_the_next_question_ends_no_answer():
    """Here only the last answer has an end, so a model would learn to write the next question's sign."""
    answer = "<|A|>{A{{ m.content }}{% if loop.last %}<eot>{% endif %}A}"
    tokenizer = tool_tokenizer(template(by_role("<|U|>{{ m.content }}", answer), prompt="<|A|>"))
    assert agree(tokenizer, [ASK, TOLD], **AS_IT_IS) == "3 C.<eot>"
    with pytest.raises(DataError, match="no control token that ends an answer"):
        chat.encode_chat(tokenizer, [ASK, TOLD, ASK, TOLD])
