"""What a request to the server may say: the fields of OpenAI's API, and a few more. A reader may skip this
file.

Every field is obeyed, known to carry no meaning here, or refused by its name. None is dropped in silence.
Source: https://platform.openai.com/docs/api-reference
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_CHOICES, MAX_TOP_LOGPROBS, MAX_PROMPTS, MAX_ANSWERS, MAX_NAMES = 128, 20, 512, 1024, 4096
# They say who asks, or how a service is to store and bill it: nothing that an answer depends on.
NO_MEANING = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# These are known, and only these values of them are what this server does anyway.
NEUTRAL = {"store": (False,), "service_tier": ("auto", "default"), "modalities": (["text"],),
           "best_of": (1,), "suffix": ("",), "functions": ([],), "function_call": (), "audio": (),
           "prediction": (), "web_search_options": (), "verbosity": ("medium",), "truncation": ("disabled",),
           "logprob_token_ids": (), "prompt_logprobs": (), "min_p": (0,), "min_tokens": (0,),
           "ignore_eos": (False,), "skip_special_tokens": (True,), "add_generation_prompt": (True,)}


# Fields of several forms. Of a value that has none of them pydantic says only that it has not the first.
FORMS = {"prompt": f"a text, or token ids, or a list of up to {MAX_PROMPTS} texts or id lists, none empty",
         "stop": "a text, or a list of texts",
         "tool_choice": 'none, auto, required, or {"type": "function", "function": {"name": ...}}'}


class Refused(Exception):
    """A request that is answered with an error, in OpenAI's shape."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400,
                 kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel):
    """Takes each field in its own type, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_mistake(cls, body):
        """Keeps one unknown field of all, to be refused: each mistake takes time and memory."""
        if not isinstance(body, dict):
            return body
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in body if name not in fields), None)
        return {name: value for name, value in body.items() if name in fields or name == unknown}


class StreamOptions(Strict):
    include_usage: bool | None = False
    include_obfuscation: bool | None = False  # nothing is added to hide the length of what is sent


# Of a million wrong items the first is reported.
FirstMistake = Field(fail_fast=True)
Texts = Annotated[list[str], FirstMistake]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=0, le=2**31)]
NewTokens = Annotated[int, Field(ge=1, le=2**31)]
Weight = Annotated[float, Field(ge=-100, le=100)]


class Sampling(Strict):
    """What chats and completions have in common. None stands for the default of the model or of OpenAI."""

    model: str = Field(description="one of those that /v1/models lists")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31, description="0 or -1: all tokens")
    repetition_penalty: float | None = Field(None, ge=0.001, le=1000)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Weight] | None = Field(None, description="{token id: added to its logit}")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="answers to each prompt")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | Texts | None = Field(None, description="texts that end an answer, at most 16")
    adapters: dict[str, Weight] | None = Field(None, description="a weighted sum of adapters of the model")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body):
        """Drops fields that have no meaning, or no effect. Raises ValueError for unsupported values."""
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise ValueError(f"{name} is not supported by this server")
        return {name: value for name, value in body.items() if name not in NO_MEANING | NEUTRAL.keys()}

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value):
        if value and value < 0.001:
            raise ValueError("must be 0, or from 0.001 to 2")
        return value

    @field_validator("stop")
    @classmethod
    def _some_texts(cls, value):
        value = [value] if isinstance(value, str) else value or []
        if len(value) > 16 or not all(value):
            raise ValueError("takes up to 16 texts, none of them empty")
        return value

    @field_validator("logit_bias", "adapters", mode="before")
    @classmethod
    def _not_too_many(cls, value):
        if isinstance(value, dict) and len(value) > MAX_NAMES:
            raise ValueError(f"takes up to {MAX_NAMES} names")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value):
        if not all(name.isascii() and name.isdigit() and len(name) < 10 for name in value or ()):
            raise ValueError("its names must be token ids")
        return value

    @model_validator(mode="after")
    def _options_of_streams(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class Function(Strict):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str


def as_records(tools: list[Tool] | None) -> list[dict]:
    """Tools as a record of the data has them (dataset/tool_calls.py)."""
    return [tool.model_dump(exclude_none=True) for tool in tools or []]


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TemplateOptions(Strict):
    enable_thinking: bool | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    response_format: ResponseFormat | None = None
    continue_final_message: bool | None = Field(False, description="the answer goes on with the last message")
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none"] | None = Field(None, description="none: the model may not think first")

    @model_validator(mode="after")
    def _together(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if self.response_format and self.response_format.type == "json_schema":
            schema = self.response_format.json_schema
            if schema is None or schema.schema_ is None:
                raise ValueError("response_format json_schema needs json_schema.schema")
        elif self.response_format and self.response_format.json_schema is not None:
            raise ValueError("response_format.json_schema has no effect without type: json_schema")
        if self.tool_choice not in (None, "none", "auto") and self.form is not None:
            raise ValueError("response_format and a forced tool call can't both shape the answer")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self

    @property
    def form(self) -> dict | None:
        """The JSON schema that the answer must follow, or None."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.type == "json_object" else form.json_schema.schema_

    @property
    def thinking(self) -> bool | None:
        """Whether the answer begins with a thought: must, must not, or (None) as the model likes."""
        if self.reasoning_effort == "none":
            return False
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: (str | TokenIds | Annotated[Texts | Annotated[list[TokenIds], FirstMistake],
                                        Field(min_length=1, max_length=MAX_PROMPTS)])
    max_tokens: Tokens | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = Field(False, description="the answer begins with the prompt")

    @model_validator(mode="after")
    def _not_too_many_answers(self):
        if len(self.prompts) * (self.n or 1) > MAX_ANSWERS:
            raise ValueError(f"{len(self.prompts)} prompts with n={self.n}: a request may ask for "
                             f"{MAX_ANSWERS} answers")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts, or lists of token ids."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation with what training would learn of it."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=4096, fail_fast=True)
    tools: list[Tool] | None = Field(None, max_length=128, fail_fast=True)
    add_generation_prompt: bool | None = False

    @model_validator(mode="after")
    def _one_of_both(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


def refusal(errors: list[dict]) -> Refused:
    """What pydantic found wrong with a request, in one line that names the field."""
    first = errors[0]
    name, *parts = [str(part) for part in first["loc"] if part != "body"] or [""]
    path, reason = ".".join([name, *parts]), first["msg"].removeprefix("Value error, ")
    if parts and name in FORMS:
        path, reason = name, f"must be {FORMS[name]}"
    if first["type"] == "extra_forbidden":
        reason = "this server does not know the field"
    return Refused(f"{path}: {reason}" if path else reason, name or None)
