"""What the job `decode` of speed.py runs: greedy decoding by us, transformers and llama.cpp, in one shape.

A reader may skip this file. The rows of llama.cpp need llama-cpp-python and requirements-export.txt. It keeps
keys and values in float16, as it does unless told otherwise.
"""

import contextlib
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import shared
from common.cli import ROOT

OURS, COMPILED, THEIRS, LLAMA = "Seedling", "Seedling, compiled", "transformers", "llama.cpp"
# contender: (whose code, in 8 bits)
CONTENDERS = {OURS: (OURS, False), f"{OURS}, int8": (OURS, True),
              COMPILED: (COMPILED, False), f"{COMPILED}, int8": (COMPILED, True), THEIRS: (THEIRS, False),
              LLAMA: (LLAMA, False), f"{LLAMA}, Q8_0": (LLAMA, True)}
PACKAGES = {LLAMA: "llama_cpp"}


def prepare(contender: str, rows: int, prompt: int, args):
    """A function that decodes args.new_tokens after a random prompt in each row, and returns figures.

    The model is that of args.load_from, or one of args.preset with weights at random. The least that has to
    be read from memory is every weight, once for each step.
    """
    import torch

    from model.config import preset
    from model.transformer import CausalLM
    from model.weights import load_model

    code, in_8_bits = CONTENDERS[contender]
    model = load_model(args.load_from) if args.load_from else CausalLM(preset(args.preset)).eval()
    ids = torch.randint(model.config.vocab_size, (rows, prompt))
    size = sum(parameter.nbytes for parameter in model.parameters())
    if in_8_bits:
        size //= 4
    make = {OURS: ours, COMPILED: partial(ours, compiled=True), THEIRS: theirs, LLAMA: llama_cpp}[code]
    decode = make(model, ids, in_8_bits, args)

    def turn():
        decode()
        return {"amount": rows * args.new_tokens, "bytes": size * args.new_tokens}

    return turn


def ours(model, ids, in_8_bits: bool, args, compiled: bool = False):
    from model.compiled_step import compile_decoding
    from model.generate import generate
    from model.int8 import quantize_int8
    from model.one_token import prepare_to_decode

    model.to(args.device)
    if in_8_bits:
        quantize_int8(model)
    (compile_decoding if compiled else prepare_to_decode)(model)

    def decode():
        for _ in generate(model, ids, args.new_tokens, temperature=0):
            pass

    return decode


def theirs(model, ids, in_8_bits: bool, args):
    import torch

    model = shared.transformers_model(model.config).eval().to(args.device)
    ids = ids.to(args.device)

    @torch.no_grad()
    def decode():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                       eos_token_id=None, max_new_tokens=args.new_tokens)

    return decode


def llama_cpp(model, ids, in_8_bits: bool, args):
    import llama_cpp as library
    import numpy as np
    import torch

    from model.gguf import write_model
    from model.weights import load_tokenizer

    library.llama_log_set(silent := library.llama_log_callback(lambda *_: None), None)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "model.gguf")
    tokenizer = load_tokenizer(args.load_from or ROOT / "model" / "tokenizer")
    with contextlib.redirect_stdout(None):
        write_model(model, tokenizer, path, "Q8_0" if in_8_bits else "F32", "benchmark", [])
    loaded = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    (rows, prompt), vocabulary = ids.shape, model.config.vocab_size
    settings = library.llama_context_default_params()
    settings.n_ctx = rows * (prompt + args.new_tokens + 1)
    settings.n_batch = settings.n_ubatch = rows * prompt
    settings.n_seq_max = rows
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = library.llama_init_from_model(loaded, settings)
    batch = library.llama_batch_init(rows * prompt, 0, 1)

    def forward(tokens, begin: int) -> np.ndarray:
        """tokens (rows, T), the first of them at position `begin` -> the likeliest next tokens (rows,)."""
        batch.n_tokens, wanted = tokens.size, []
        for number, ((row, place), token) in enumerate(np.ndenumerate(tokens)):
            batch.token[number], batch.pos[number] = int(token), begin + place
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
            batch.logits[number] = place == tokens.shape[1] - 1
            wanted += [number] if batch.logits[number] else []
        if library.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode")
        logits = [np.ctypeslib.as_array(library.llama_get_logits_ith(context, number), (vocabulary,))
                  for number in wanted]
        return np.array([row.argmax() for row in logits])

    def decode(keep=(folder, silent)):
        library.llama_memory_clear(library.llama_get_memory(context), True)
        new = forward(ids.numpy(), 0)
        for step in range(args.new_tokens - 1):
            new = forward(new[:, None], prompt + step)

    return decode
