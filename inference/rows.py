"""What somebody asks over the API -> rows to decode, and how their answers are read. A reader may skip this
file."""

from dataclasses import dataclass

from common.errors import DataError, UsageError
from dataset.chat import encode_continuation
from dataset.messages import to_messages
from dataset.replies import Reply
from inference.answer import AnswerReader
from inference.chat_model import DEFAULT_NEW_TOKENS
from inference.engine import Engine, Lane
from inference.grammar import Grammars
from inference.protocol import ChatRequest, CompletionRequest, Refused, Sampling, as_records
from model.batch import Row

COMPLETION_TOKENS = 16  # OpenAI's default for completions
MAX_ECHOED = 2**20  # log-probabilities of prompts in one answer, which then has about 30 MB


@dataclass
class Asked:
    """rows: what is to be decoded. readers: of each row. num_prompt_tokens: every prompt counts once.

    num_new_tokens: of all answers, when they have ended.
    """

    lane: Lane
    rows: list[Row]
    readers: list[AnswerReader]
    num_prompt_tokens: int
    num_new_tokens: int = 0


def find(engine: Engine, name: str) -> tuple[Lane, str | None]:
    """The lane and the adapter that a name stands for."""
    if name not in engine.names:
        there_are = ", ".join(engine.names)
        raise Refused(f"there is no model {name[:100]!r}; there are: {there_are}", "model",
                      "model_not_found", 404)
    return engine.names[name]


def ask_chat(engine: Engine, body: ChatRequest) -> Asked:
    """Raises Refused for what can't be answered."""
    lane, adapter = find(engine, body.model)
    chat_model = lane.chat_model
    offered = None if body.tool_choice == "none" else body.tools
    messages, tools = read_messages(body.messages, as_records(offered), as_written=True)
    begun = None
    if body.continue_final_message:
        if messages[-1]["role"] != "assistant":
            raise Refused("continue_final_message needs a last message of the assistant", "messages")
        messages, begun = messages[:-1], messages[-1]
    elif messages[-1]["role"] == "assistant":
        raise Refused("the last message is the assistant's: nothing asks for an answer; with "
                      "continue_final_message: true the answer goes on where it ends", "messages")
    if chat_model.plain and (tools or body.thinking):
        raise Refused(f"{body.model} is a base model: it knows neither tools nor thinking", "model")
    try:
        prompt = chat_model.encode(messages, tools, bool(body.thinking), begun)
    except DataError as error:
        raise Refused(str(error), "messages") from None
    marks = {mark: token for token, mark in chat_model.marks.items()}
    end_tokens, bias = tuple(chat_model.stop_ids), {}
    if body.thinking and not chat_model.begins_with_thought(prompt) and begun is None:
        if "<think>" not in marks:
            raise Refused(f"{body.model} has no <think> to begin a thought with", "chat_template_kwargs")
        prompt = [*prompt, marks["<think>"]]
    if body.thinking is False and "<think>" in marks:
        bias = {marks["<think>"]: -float("inf")}
    if tools and body.parallel_tool_calls is False:
        if "</tool_call>" not in marks:
            raise Refused(f"parallel_tool_calls: false is not supported for {body.model}",
                          "parallel_tool_calls")
        end_tokens += (marks["</tool_call>"],)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    rows = make_rows(engine, body, lane, adapter, prompt, limit, end_tokens=end_tokens,
                     top_logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    constraint = constraint_of(lane, body, tools)
    for row in rows:
        row.logit_bias |= bias
        row.constraint = constraint and constraint.copy()
    readers = [AnswerReader(chat_model.decode, chat_model.marks, chat_model.new_reply(prompt, begun),
                            body.stop or []) for _ in rows]
    return Asked(lane, rows, readers, len(prompt))


def read_messages(messages: list[dict], tools: list[dict],
                  as_written: bool = False) -> tuple[list[dict], list | None]:
    """As the datasets read them (dataset/messages.py). What they would only count is refused here."""
    notes: list[str] = []
    try:
        messages, tools = to_messages({"messages": messages, "tools": tools}, notes.append,
                                      as_written=as_written)
    except DataError as error:
        raise Refused(str(error), "messages") from None
    if notes:
        raise Refused(notes[0], "messages")
    return messages, tools


def constraint_of(lane: Lane, body: ChatRequest, tools: list | None):
    choice = body.tool_choice
    forced = choice not in (None, "none", "auto")
    if body.form is None and not forced:
        return None
    try:
        if lane.grammars is None:
            model = lane.chat_model
            lane.grammars = Grammars(model.tokenizer, model.model.config.vocab_size, model.stop_ids)
        if not forced:
            return lane.grammars.json(body.form)
        named = [tool["function"] for tool in tools
                 if choice == "required" or tool["function"]["name"] == choice.function.name]
        if not named:
            raise Refused(f"tool_choice: there is no tool {choice.function.name!r}", "tool_choice")
        several = choice == "required" and body.parallel_tool_calls is not False
        return lane.grammars.calls(named, several)
    except (DataError, UsageError) as error:
        raise Refused(str(error), "tool_choice" if forced else "response_format") from None


def ask_completion(engine: Engine, body: CompletionRequest) -> Asked:
    """Raises Refused for what can't be answered."""
    lane, adapter = find(engine, body.model)
    chat_model = lane.chat_model
    rows, num_prompt_tokens = [], 0
    for prompt in body.prompts:
        try:
            ids = encode_continuation(chat_model.tokenizer, prompt)[0] if isinstance(prompt, str) else prompt
        except DataError as error:
            raise Refused(str(error), "prompt") from None
        ids = ids or chat_model.stop_ids[:1]  # any text may follow the end of another
        if max(ids) >= chat_model.model.config.vocab_size:
            raise Refused(f"{max(ids)} is no token of {body.model}", "prompt")
        num_prompt_tokens += len(ids)
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        rows += make_rows(engine, body, lane, adapter, ids, limit, end_tokens=tuple(chat_model.stop_ids),
                          top_logprobs=body.logprobs,
                          prompt_logprobs=bool(body.echo) and body.logprobs is not None)
    if body.echo and body.logprobs is not None:
        num_echoed = num_prompt_tokens * (body.n or 1) * (1 + body.logprobs)
        if num_echoed > MAX_ECHOED:
            raise Refused(f"echo with logprobs would give {num_echoed:,} log-probabilities of prompts; a "
                          f"request may ask for {MAX_ECHOED:,}", "logprobs")
    readers = [AnswerReader(chat_model.decode, {}, Reply(), body.stop or []) for _ in rows]
    return Asked(lane, rows, readers, num_prompt_tokens)


def make_rows(engine: Engine, body: Sampling, lane: Lane, adapter: str | None, prompt: list[int],
              limit: int | None, **options) -> list[Row]:
    """The rows of one prompt: as many as answers are asked for."""
    chat_model, vocab_size = lane.chat_model, lane.chat_model.model.config.vocab_size
    room = lane.max_length - len(prompt)
    if room < 1:
        raise Refused(f"a prompt of {len(prompt)} tokens: the model has room for {lane.max_length}, answer "
                      "included", code="context_length_exceeded")
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if max(bias, default=0) >= vocab_size:
        raise Refused(f"logit_bias: {max(bias)} is no token of {body.model}", "logit_bias")
    own = chat_model.sampling
    settings = {
        "max_new_tokens": min(DEFAULT_NEW_TOKENS if limit is None else limit, room),
        "temperature": own.temperature if body.temperature is None else body.temperature,
        "top_p": own.top_p if body.top_p is None else body.top_p,
        "top_k": own.top_k if body.top_k is None else max(0, body.top_k),
        "repetition_penalty": body.repetition_penalty or own.repetition_penalty,
        "presence_penalty": body.presence_penalty or 0.0, "frequency_penalty": body.frequency_penalty or 0.0,
        "adapter": mix_of(engine, body, lane, adapter)}
    seeds = [None if body.seed is None else (body.seed + place) % 2**63 for place in range(body.n or 1)]
    return [Row(prompt, logit_bias=dict(bias), seed=seed, **settings, **options) for seed in seeds]


def mix_of(engine: Engine, body: Sampling, lane: Lane, adapter: str | None) -> str | dict[str, float] | None:
    """The adapter that a request names by its model, or by the field `adapters`."""
    if not body.adapters:
        return adapter
    if adapter is not None:
        raise Refused("adapters: name the base model as the model", "adapters")
    known = {name: path for name, (of, path) in engine.names.items() if of is lane and path}
    unknown = [name for name in body.adapters if name not in known]
    if unknown:
        there_are = ", ".join(known) or "none"
        raise Refused(f"adapters: {unknown[0][:100]!r} is no adapter of {body.model}; there are: {there_are}",
                      "adapters")
    return {known[name]: weight for name, weight in body.adapters.items() if weight} or None
