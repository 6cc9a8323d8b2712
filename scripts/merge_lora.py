"""Fold an adapter into its base: a plain model directory that needs no LoRA code and is as fast as the base.

    python scripts/merge_lora.py --load_from out/full_sft --lora out/lora_clinic --out_dir out/clinic
    python scripts/merge_lora.py --load_from out/full_sft --lora out/lora_clinic out/lora_identity \
        --weights 0.7 0.3 --out_dir out/both

Runs on a CPU: W + (alpha / rank) B A in float32, checked against the adapted model's logits, then stored in
the precision of the base (--dtype changes that), with the base's tokenizer and chat template.

An adapter of QLoRA was trained over a 4-bit base, so that base, dequantized, is what it is merged into,
whether --load_from holds it in 4 bits or not; the script says how far it is from the unquantized one.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.args import Parser, run_script


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    import torch

    from model.adapters import Adapters, report_line
    from model.lora import merge_lora, remove_lora, report_lora
    from model.weights import load_model, load_tokenizer, save_model

    check_out_dir(args)
    model = load_model(args.load_from)
    dtype = getattr(torch, stored_dtype(args.load_from) if args.dtype == "auto" else args.dtype)
    tokenizer = load_tokenizer(args.tokenizer or args.load_from)
    in_4_bits, original = quantize(model, args)
    adapters = Adapters(model)
    names = [adapters.load(path, str(path)) for path in args.lora]
    adapters.use(dict(zip(names, args.weights, strict=True)))  # their sum, as one adapter
    report = report_lora(model)
    print(report_line(model, " + ".join(names), report))

    adapted, update, lost = logits(model), 0.0, 0.0
    if in_4_bits:
        dequantize(model, report.names)
        compare(model, in_4_bits, original)
    merge_lora(model)
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


def quantize(model, args) -> tuple[list[str], Path | None]:
    """Make the base the one that the adapter was trained over.

    Returns the layers that are in 4 bits then, and where their original weights lie, if that is known.
    """
    from model.quantize import NF4Linear, quantize_model
    from model.transformer import ModelError

    def in_4_bits():
        return [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]

    if stored := in_4_bits():
        if args.quantize:
            raise ModelError(f"--quantize {args.quantize}: {args.load_from} is stored in 4 bits")
        return stored, args.original
    if args.original:
        raise ModelError(f"--original: {args.load_from} is not quantized, it is the original itself")
    trained = {str(arguments(path).get("quantize", "none")) for path in args.lora}
    if len(trained) > 1 and not args.quantize:
        raise ModelError("some adapters were trained over 4 bits and some were not: choose with --quantize")
    if args.quantize == "nf4" or (not args.quantize and trained == {"nf4"}):
        quantize_model(model)
    return in_4_bits(), args.load_from


def dequantize(model, adapted: list[str]) -> None:
    """4-bit layers become plain ones, and keep their adapters."""
    from model.lora import apply_lora, remove_lora
    from model.quantize import dequantize_model

    loras = {name: model.get_submodule(name).lora for name in adapted}
    remove_lora(model)
    dequantize_model(model)
    apply_lora(model, rank=1, target_modules=adapted)
    for name, lora in loras.items():
        model.get_submodule(name).lora = lora


def compare(model, names: list[str], original: Path | None) -> None:
    """Say what 4 bits lost in these layers. Raises ModelError where the original is another model."""
    from model.transformer import ModelError
    from model.weights import load_model

    if original is None:
        print("the base is a 4-bit one, dequantized; --original DIR tells how far it is from the unquantized")
        return
    weights, lost, size = load_model(original).state_dict(), 0.0, 0.0
    for name in names:
        before, after = weights.get(f"{name}.weight"), model.get_submodule(name).weight.detach()
        if before is None or before.shape != after.shape:
            raise ModelError(f"--original {original}: not the base's original: {name} is not alike")
        lost += (after - before).square().sum().item()
        size += before.square().sum().item()
    print(f"the base is a 4-bit one, dequantized: its linear layers differ from {original}'s by "
          f"{(lost / size)**0.5:.2%} of their size")


def check_out_dir(args):
    """Raises ModelError where writing would destroy something."""
    from model.transformer import ModelError

    if args.out_dir.resolve() in [path.resolve() for path in (args.load_from, *args.lora)]:
        raise ModelError(f"--out_dir {args.out_dir} is the base or an adapter; name another folder")
    if args.out_dir.is_file():
        raise ModelError(f"--out_dir {args.out_dir} is a file; name a folder")
    if args.out_dir.is_dir() and any(args.out_dir.iterdir()) and not args.overwrite:
        raise ModelError(f"--out_dir {args.out_dir} holds something; name another folder, or add --overwrite")


def stored_dtype(folder: Path) -> str:
    """The precision that a model directory is stored in, as its config.json says."""
    from model.files import read_json

    config = read_json(folder / "config.json") if folder.is_dir() else {}
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in ("bfloat16", "float16") else "float32"


def logits(model):
    """Of a few tokens that any model has: (B, T, V)."""
    import torch

    ids = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits.float()


def farthest(model, expected) -> float:
    return (logits(model) - expected).abs().max().item()


def describe(args) -> dict:
    """training.json. The base's max_seq_len holds on: chat keeps within the length that was trained."""
    flags = {name: value for name, value in vars(args).items() if name != "overwrite"}
    trained = {name: value for name, value in arguments(args.load_from).items() if name == "max_seq_len"}
    return {"stage": "merge_lora", "parent": args.load_from, "arguments": flags | trained}


def arguments(folder: Path) -> dict:
    """What training.json says it was trained with; {} where there is none."""
    from model.files import read_json

    file = folder / "training.json"
    found = read_json(file).get("arguments") if file.exists() else {}
    return found if isinstance(found, dict) else {}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--load_from", type=Path, required=True, metavar="DIR", help="the base model")
    parser.add_argument("--lora", type=Path, nargs="+", required=True, metavar="DIR",
                        help="the adapter(s), folders or .pth files")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W",
                        help="how much of each; needed where there are several (default: 1)")
    parser.add_argument("--quantize", choices=("none", "nf4"),
                        help="merge into the base as 4 bits round it (default: as the adapter was trained)")
    parser.add_argument("--original", type=Path, metavar="DIR",
                        help="the unquantized model, to compare a base with that --load_from holds in 4 bits")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="where the base has none of its own")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="to store the weights in; auto: as the base")
    parser.add_argument("--out_dir", type=Path, required=True, metavar="DIR", help="the merged model")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something")
    args = parser.parse_args(argv)
    args.weights = args.weights or [1.0] * (len(args.lora) == 1)
    if len(args.weights) != len(args.lora):
        parser.error(f"--weights: {len(args.lora)} adapters need as many weights, not {len(args.weights)}")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
