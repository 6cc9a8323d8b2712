"""Merges an adapter into its base. The result is a plain model, as fast as the base, that needs no LoRA code.

    python scripts/merge_lora.py --load_from out/full_sft --lora out/lora_clinic --out_dir out/clinic
    python scripts/merge_lora.py --load_from out/full_sft --lora out/lora_clinic out/lora_identity \
        --weights 0.7 0.3 --out_dir out/both

Runs on a CPU. W + (alpha / rank) B A is computed in float32 and checked against the logits of the adapted
model. It is stored in the precision of the base (--dtype changes that), with the base's tokenizer and chat
template.

An adapter of QLoRA was trained over a 4-bit base. So the base is dequantized and the adapter merged into the
result, whether --load_from holds the base in 4 bits or not. The script says how far the dequantized base is
from the unquantized one.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, add_rope_scaling, run_script
from common.errors import ModelError
from common.files import read_json_if_there
from trainer.defaults import tokens_seen


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    import torch

    from model import tokenizer_files
    from model.adapters import Adapters, remove_lora, report_line, report_lora
    from model.lora import merge_lora
    from model.lora_files import base_of
    from model.tokenizer_files import OWN_IS_TAKEN, check_vocabulary, gets_our_own, load_tokenizer
    from model.weights import load_model, save_model

    args.load_from = args.load_from or base_of(args.lora[0])
    if args.load_from is None:
        raise ModelError(f"{args.lora[0]} does not say where its base is now: name it with --load_from")
    check_out_dir(args)
    model = load_model(args.load_from, rope_scaling=args.rope_scaling)
    dtype = getattr(torch, stored_dtype(args.load_from) if args.dtype == "auto" else args.dtype)
    if gets_our_own(args.load_from) and not args.tokenizer:
        print(OWN_IS_TAKEN.format(args.load_from))
    tokenizer = load_tokenizer(args.tokenizer or args.load_from)
    check_vocabulary(tokenizer, model.config.vocab_size, args.load_from)
    layers_in_4_bits, original = quantize_as_trained(model, args)
    adapters = Adapters(model)
    names = [adapters.load(path, str(path)) for path in args.lora]
    for path in args.lora:
        if line := tokenizer_files.other_template(path, tokenizer):
            print(line)
    adapters.use(dict(zip(names, args.weights, strict=True)))  # the weighted sum, as one adapter
    report = report_lora(model)
    print(report_line(model, " + ".join(names), report))

    adapted = logits(model)
    if not adapted.isfinite().all():
        raise ModelError("the adapted model answers with numbers that are not finite: give smaller --weights")
    if layers_in_4_bits:
        dequantize(model, report.names)
        print_loss_of_4_bits(model, layers_in_4_bits, original)
    untie_adapted_head(model, report.names)
    merge_lora(model)
    update = lost = 0.0
    for linear in map(model.get_submodule, report.names):
        merged = linear.weight.detach()
        update += (merged - linear.lora.original).square().sum().item()
        lost += (merged - merged.to(dtype).float()).square().sum().item()
    remove_lora(model, keep_merged=True)
    print(f"merged in float32: the logits, up to {adapted.abs().max():.1f} in size, differ from the adapted "
          f"model's by at most {farthest(model, adapted):.1e}")
    if dtype != torch.float32:
        model.to(dtype)
        print(f"rounded to {str(dtype).removeprefix('torch.')}: by {(lost / max(update, 1e-30))**0.5:.1%} of "
              f"the update; logits now differ by at most {farthest(model, adapted):.1e}")
    save_model(model, args.out_dir, tokenizer, training=describe(args))
    print(f"saved {args.out_dir}")


def quantize_as_trained(model, args) -> tuple[list[str], Path | None]:
    """Makes the base the one that the adapter was trained over.

    Returns the names of the layers that are in 4 bits then, and the folder of their original weights, if that
    is known.
    """
    from model.quantize import NF4Linear, quantize_model

    def layers_in_4_bits():
        return [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]

    stored = layers_in_4_bits()
    if stored:
        if args.quantize:
            raise ModelError(f"--quantize {args.quantize}: {args.load_from} is stored in 4 bits")
        return stored, args.original
    if args.original:
        raise ModelError(f"--original: {args.load_from} is not quantized, it is the original itself")
    trained_over = {str(arguments(path).get("quantize", "none")) for path in args.lora}
    if len(trained_over) > 1 and not args.quantize:
        raise ModelError("some adapters were trained over 4 bits and some were not: choose with --quantize")
    if args.quantize == "nf4" or (not args.quantize and trained_over == {"nf4"}):
        quantize_model(model)
    return layers_in_4_bits(), args.load_from


def dequantize(model, adapted: list[str]) -> None:
    """Makes 4-bit layers plain ones, which keep their adapters."""
    from model.adapters import remove_lora
    from model.lora import apply_lora
    from model.quantize import dequantize_model

    loras = {name: model.get_submodule(name).lora for name in adapted}
    remove_lora(model)
    dequantize_model(model)
    apply_lora(model, rank=1, target_modules=adapted)
    for name, lora in loras.items():
        model.get_submodule(name).lora = lora


def untie_adapted_head(model, adapted: list[str]) -> None:
    """Gives the output head a weight of its own, if an adapter changes it and it is also the embedding."""
    import torch

    if "lm_head" in adapted and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        print(f"an adapter changes the output head and not the embedding, which were one matrix: the result "
              f"has both, {model.lm_head.weight.numel():,} parameters more")


def print_loss_of_4_bits(model, names: list[str], original: Path | None) -> None:
    """Says how far these layers are from the original. Raises ModelError where that is another model."""
    from model.weights import load_model

    if original is None:
        print("the base is a 4-bit one, dequantized; --original DIR shows how far it is from the unquantized")
        return
    weights, lost, size = load_model(original).state_dict(), 0.0, 0.0
    for name in names:
        before, after = weights.get(f"{name}.weight"), model.get_submodule(name).weight.detach()
        if before is None or before.shape != after.shape:
            raise ModelError(f"--original {original}: not the base's original: {name} is missing or has "
                             "another shape")
        lost += (after - before).square().sum().item()
        size += before.square().sum().item()
    print(f"the base is a 4-bit one, dequantized: its linear layers differ from {original}'s by "
          f"{(lost / size)**0.5:.2%} of their size")


def check_out_dir(args):
    """Raises ModelError where writing would destroy something."""
    if args.out_dir.resolve() in [path.resolve() for path in (args.load_from, *args.lora)]:
        raise ModelError(f"--out_dir {args.out_dir} is the base or an adapter; name another folder")
    if args.out_dir.is_file():
        raise ModelError(f"--out_dir {args.out_dir} is a file; name a folder")
    if args.out_dir.is_dir() and any(args.out_dir.iterdir()) and not args.overwrite:
        raise ModelError(f"--out_dir {args.out_dir} holds something; name another folder, or add --overwrite")


def stored_dtype(folder: Path) -> str:
    """The precision that a model directory is stored in, according to its config.json."""
    config = read_json_if_there(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in ("bfloat16", "float16") else "float32"


def logits(model):
    """The logits of a few tokens that every model has: (B, T, V)."""
    import torch

    ids = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits.float()


def farthest(model, expected) -> float:
    return (logits(model) - expected).abs().max().item()


def describe(args) -> dict:
    """training.json. The max_seq_len of the base stays: a chat keeps within the length that was trained."""
    flags = {name: value for name, value in vars(args).items() if name != "overwrite"}
    trained = {name: value for name, value in arguments(args.load_from).items() if name == "max_seq_len"}
    return {"stage": "merge_lora", "parent": args.load_from, "tokens_seen": tokens_seen(args.load_from),
            "arguments": flags | trained}


def arguments(folder: Path) -> dict:
    """The flags that training.json says it was trained with; {} where there is none."""
    found = read_json_if_there(folder / "training.json").get("arguments")
    return found if isinstance(found, dict) else {}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--load_from", type=Path, metavar="DIR",
                        help="the base model, a folder or a .pth file (default: as the adapter says)")
    parser.add_argument("--lora", type=Path, nargs="+", required=True, metavar="DIR",
                        help="the adapter(s), folders or .pth files")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W",
                        help="how much of each; needed where there are several (default: 1)")
    parser.add_argument("--quantize", choices=("none", "nf4"),
                        help="merge into the base as 4 bits round it (default: as the adapter was trained)")
    parser.add_argument("--original", type=Path, metavar="DIR",
                        help="the unquantized model, to compare a base with that --load_from holds in 4 bits")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR",
                        help="the base's tokenizer (default: that of --load_from; for .pth files our own)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="to store the weights in; auto: as the base")
    add_rope_scaling(parser.add_argument)
    parser.add_argument("--out_dir", type=Path, required=True, metavar="DIR", help="the merged model")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something")
    args = parser.parse_args(argv)
    if args.weights is None:
        args.weights = [1.0] if len(args.lora) == 1 else []
    if len(args.weights) != len(args.lora):
        parser.error(f"--weights: {len(args.lora)} adapters need as many weights, not {len(args.weights)}")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
