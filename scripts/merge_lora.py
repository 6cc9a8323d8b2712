"""Fold an adapter into its base: a plain model directory that needs no LoRA code and is as fast as the base.

    python scripts/merge_lora.py --load_from out/full_sft --lora out/lora_clinic --out_dir out/clinic

Runs on a CPU: W + (alpha / rank) B A in float32, checked against the adapted model's logits, then stored in
the precision of the base (--dtype changes that), with the base's tokenizer and chat template.

An adapter of QLoRA was trained over a 4-bit base, so that base, dequantized, is what it is merged into,
whether --load_from holds it in 4 bits or not; the script says how far it is from the unquantized one.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.args import HelpFormatter, run_script


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    import torch

    from model.lora import load_lora, merge_lora, remove_lora
    from model.weights import load_model, load_tokenizer, save_model

    check_out_dir(args)
    dtype = getattr(torch, stored_dtype(args.load_from) if args.dtype == "auto" else args.dtype)
    tokenizer = load_tokenizer(args.tokenizer or args.load_from)
    model = load_model(args.load_from)
    dequantize(model, args)
    report = load_lora(model, args.lora)
    print(f"{args.lora}: {report.matched} layers, {report.relative_norm:.4f} of the weights they change")

    adapted = logits(model)
    base = {name: model.get_submodule(name).weight.detach().clone() for name in report.names}
    merge_lora(model)
    remove_lora(model, keep_merged=True)
    print(f"merged in float32: the logits, up to {adapted.abs().max():.1f} in size, differ from the adapted "
          f"model's by at most {farthest(model, adapted):.1e}")
    if dtype != torch.float32:
        update, lost = 0.0, 0.0
        for name, before in base.items():
            merged = model.get_submodule(name).weight.detach()
            update += (merged - before).square().sum().item()
            lost += (merged - merged.to(dtype).float()).square().sum().item()
        model.to(dtype)
        print(f"rounded to {str(dtype).removeprefix('torch.')}: by {(lost / update)**0.5:.1%} of the update; "
              f"logits now differ by at most {farthest(model, adapted):.1e} (--dtype float32 rounds nothing)")
    save_model(model, args.out_dir, tokenizer, training=describe(args))
    print(f"saved {args.out_dir}")


def dequantize(model, args):
    """Make the base the one that the adapter was trained over, in float32, and say what its 4 bits lost."""
    from model.quantize import NF4Linear, dequantize_model, quantize_model
    from model.transformer import ModelError
    from model.weights import load_model

    stored = any(isinstance(module, NF4Linear) for module in model.modules())
    if stored and args.quantize == "none":
        raise ModelError(f"--quantize none: {args.load_from} holds 4 bits; name the unquantized model")
    trained = read_json(args.lora / "training.json").get("arguments", {}).get("quantize", "none")
    if args.quantize == "nf4" or (args.quantize is None and trained == "nf4" and not stored):
        quantize_model(model)
    elif not stored:
        if args.original:
            raise ModelError(f"--original: {args.load_from} is not quantized, it is the original itself")
        return
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    dequantize_model(model)
    original = args.original if stored else args.load_from
    if original is None:
        print("the base is a 4-bit one, dequantized; --original DIR tells how far it is from the unquantized")
        return
    before, after = load_model(original).state_dict(), model.state_dict()
    if missing := [name for name in names if name not in before or before[name].shape != after[name].shape]:
        raise ModelError(f"--original {original}: another model than the base: {missing[0]} is not alike")
    lost = sum((after[name] - before[name]).square().sum() for name in names)
    size = sum(before[name].square().sum() for name in names)
    print(f"the base is a 4-bit one, dequantized: its linear layers differ from {original}'s by "
          f"{(lost / size).sqrt():.2%} of their size")


def check_out_dir(args):
    """Raises ModelError where writing would destroy something."""
    from model.transformer import ModelError

    if args.out_dir.resolve() in (args.load_from.resolve(), args.lora.resolve()):
        raise ModelError(f"--out_dir {args.out_dir} is the base or an adapter; name another folder")
    if args.out_dir.is_dir() and any(args.out_dir.iterdir()) and not args.overwrite:
        raise ModelError(f"--out_dir {args.out_dir} holds something; name another folder, or add --overwrite")


def stored_dtype(folder: Path) -> str:
    """The precision that a model directory is stored in, as its config.json says."""
    config = read_json(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in ("bfloat16", "float16") else "float32"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


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
    arguments = {name: value for name, value in vars(args).items() if name != "overwrite"}
    trained = read_json(args.load_from / "training.json").get("arguments", {})
    if "max_seq_len" in trained:
        arguments["max_seq_len"] = trained["max_seq_len"]
    return {"stage": "merge_lora", "parent": args.load_from, "adapter": args.lora, "arguments": arguments}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--load_from", type=Path, required=True, metavar="DIR", help="the base model")
    parser.add_argument("--lora", type=Path, required=True, metavar="DIR", help="the adapter (or a .pth)")
    parser.add_argument("--quantize", choices=("none", "nf4"),
                        help="merge into the base as 4 bits round it (default: as the adapter was trained)")
    parser.add_argument("--original", type=Path, metavar="DIR",
                        help="the unquantized model, to compare a base with that --load_from holds in 4 bits")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="where the base has none of its own")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="to store the weights in; auto: as the base")
    parser.add_argument("--out_dir", type=Path, required=True, metavar="DIR", help="the merged model")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
