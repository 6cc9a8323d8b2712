"""Tokenizers on disk: read, and handed on with the model as they were. A reader may skip this file.

    tokenizer = load_tokenizer("out/full_sft")      # any model, or "x.gguf"; "x.pth": our own
    write_tokenizer(tokenizer, Path("out/mine"))    # the same files, which transformers 4 and 5 can open

The library transformers would write less than it reads. It drops files that other programs need, such as
tokenizer.model, and version 5 writes settings that version 4 refuses. For this reason the files that were
read stay in memory, and they are written again, except for what has changed since.
"""

import re
from pathlib import Path

from common import files
from common.errors import ModelError
from model.gguf_file import is_gguf
from model.gguf_tokenizer import read_tokenizer

OWN_TOKENIZER = Path(__file__).resolve().with_name("tokenizer")
OWN_IS_TAKEN = "{} holds no tokenizer, so it gets Seedling's own; --tokenizer names another"
VOCABULARY, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of templates with other names
FILES = (VOCABULARY, SETTINGS, TEMPLATE, MORE_TEMPLATES, "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
MAX_BYTES = 2**28  # tokenizers with a vocabulary of 260,000 take 2**25
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # tokenizer.json holds all of them
ONLY_TRANSFORMERS_5 = ("backend", "is_local", "local_files_only")  # settings that version 5 adds on saving


def load_tokenizer(path):
    """transformers' tokenizer of a model or tokenizer folder. Raises ModelError where there is none.

    A GGUF file has its own. A .pth file holds weights alone: for it this is Seedling's own tokenizer.
    """
    path = Path(path)
    if gets_our_own(path):
        path = OWN_TOKENIZER
    if path.is_file():
        return read_tokenizer(path)
    if not (path / VOCABULARY).is_file() and not (path / SETTINGS).is_file():
        refuse_adapter(path)
        raise ModelError(f"no tokenizer in {path}: {VOCABULARY} is missing")
    as_read = {}
    for file in (path / name for name in FILES):
        if file.is_file():
            if file.stat().st_size > MAX_BYTES:
                raise ModelError(f"{file} is too large to be a tokenizer: {file.stat().st_size:,} bytes")
            as_read[file.name] = file.read_bytes()
    name = files.read_json_if_there(path / SETTINGS).get("tokenizer_class")
    if name in GENERIC_CLASSES and VOCABULARY in as_read:
        from transformers import PreTrainedTokenizerFast as Tokenizer
    else:  # a class with rules of its own; transformers takes two seconds to find it, and imports every model
        from transformers import AutoTokenizer as Tokenizer
    try:
        # trust_remote_code is set, because by default transformers asks the person whether to run such code.
        tokenizer = Tokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # damaged files raise all kinds, and a panic of Rust is no Exception
        what = files.kind_unlike_name(path / VOCABULARY)
        reason = f"{VOCABULARY} is {what}" if what else files.one_line(error)
        if VOCABULARY not in as_read:
            reason = f"{VOCABULARY} is missing, and it could not be made from the files that are there"
        raise ModelError(f"the tokenizer in {path} can't be read: {reason}") from None
    tokenizer.as_read = (_tokens(tokenizer), as_read)
    return tokenizer


def refuse_adapter(path: Path) -> None:
    """Raises ModelError for a folder with an adapter and no model, where somebody wants to open a model."""
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        base = files.read_json(path / "adapter_config.json").get("base_model_name_or_path")
        named = f" ({base})" if base else ""
        raise ModelError(f"{path} holds an adapter and no model: name the model that it changes{named}")


def other_template(adapter: Path, tokenizer) -> str:
    """A line on an adapter that was trained with another chat template than `tokenizer` has; else ""."""
    if (adapter / TEMPLATE).is_file():
        template = (adapter / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    else:
        template = files.read_json_if_there(adapter / SETTINGS).get("chat_template")
    if not template or template == tokenizer.chat_template:
        return ""
    return (f"warning: {adapter} holds another chat template than the one in use, so its answers may be "
            f"poor; eval_model.py and merge_lora.py take its own with --tokenizer {adapter}")


def gets_our_own(path: Path) -> bool:
    """Whether `path` is a file that holds no tokenizer: a .pth file."""
    return path.is_file() and not is_gguf(path)


def _tokens(tokenizer) -> tuple:
    """What changes when somebody adds a token, or gives one another purpose."""
    return vocabulary_size(tokenizer), tokenizer.special_tokens_map


def vocabulary_size(tokenizer) -> int:
    """How many rows an embedding for it needs. Ids may have holes, so there may be fewer tokens than that."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_vocabulary(tokenizer, vocab_size: int, path) -> None:
    """Raises ModelError where an embedding of vocab_size rows has none for some token. path: of the model."""
    if (needed := vocabulary_size(tokenizer)) > vocab_size:
        raise ModelError(f"{path}: the tokenizer needs {needed:,} rows of the embedding, the weights have "
                         f"{vocab_size:,}: they do not belong together")


def write_tokenizer(tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files into a folder, so that transformers 4 and 5 open them."""
    tokens, as_read = getattr(tokenizer, "as_read", (None, {}))
    if tokens == _tokens(tokenizer):
        for name, content in as_read.items():
            (folder / name).write_bytes(content)
    else:  # made or changed in memory
        tokenizer.save_pretrained(str(folder), save_jinja_files=False)
    settings = files.read_json_if_there(folder / SETTINGS)
    for name in ONLY_TRANSFORMERS_5:
        settings.pop(name, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # This class of version 4 would also give token_type_ids, which the models here do not take.
        settings.setdefault("model_input_names", tokenizer.model_input_names)
    if isinstance(settings.get("extra_special_tokens"), list):  # version 4 has another name for such a list
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if response_template := getattr(tokenizer, "response_template", None):
        settings["response_template"] = response_template
    templates = tokenizer.chat_template or {}  # one, or several by name
    if isinstance(templates, str):
        settings["chat_template"] = templates
        templates = {"default": templates}
    elif templates:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (folder / SETTINGS).write_bytes(files.json_text(settings).encode("utf-8"))
    # New versions read the template from a file of its own, and old ones from the settings.
    for name, text in templates.items():
        if not re.fullmatch(r"[\w-]{1,100}", name):  # it comes from a stranger's file, and could be "../../x"
            continue
        file = folder / (TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text.encode("utf-8"))
