"""Makes an adapter of what fine-tuning changed: the best of rank r between two models of the same shape.

    python scripts/extract_lora.py out/pretrain out/full_sft --rank 16 --out_dir out/lora_of_sft
    python scripts/extract_lora.py out/pretrain out/full_sft --energy 0.9 --out_dir out/lora_of_sft
    python scripts/merge_lora.py --load_from out/pretrain --lora out/lora_of_sft --out_dir out/sft_at_rank_16

Nothing is trained: B A is the truncated SVD of W_tuned - W_base, and no other matrix of that rank is nearer
to the change (Eckart & Young 1936). --energy gives each layer the least rank that keeps that share of its
change. Norms, embeddings and biases have no adapter: the table says how much they changed. docs/lora.md has
the pictures. With a 4-bit BASE and its original as TUNED, the adapter takes back as much of the quantization
as it can.

Writes an adapter in PEFT's format, and energy.json: the table, with the singular values of every layer.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, add_rope_scaling, run_script
from common.errors import ModelError
from common.files import write_whole


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    import json

    from model.lora import apply_lora, save_lora
    from model.quantize import dequantize_model
    from model.weights import load_model

    if args.out_dir.resolve() in (args.base.resolve(), args.tuned.resolve()):
        raise ModelError(f"--out_dir {args.out_dir} is one of the two models; name another folder")
    if args.out_dir.suffix == ".pth" or args.out_dir.is_file():
        raise ModelError(f"--out_dir {args.out_dir} must be a folder, new or empty")
    if args.out_dir.is_dir() and any(args.out_dir.iterdir()) and not args.overwrite:
        raise ModelError(f"--out_dir {args.out_dir} holds something; name another folder, or add --overwrite")
    base = dequantize_model(load_model(args.base, rope_scaling=args.rope_scaling))
    tuned = dequantize_model(load_model(args.tuned))
    check_same_shape(base, tuned, args)
    names = apply_lora(base, 1 if args.rank is None else args.rank, target_modules=args.target_modules)
    rows = [fill(base.get_submodule(name), tuned.get_submodule(name).weight, args) for name in names]
    if not any(row["change"] for row in rows):
        raise ModelError(f"{args.base} and {args.tuned} are equal in every layer of --target_modules")
    layers = {name: row for name, row in zip(names, rows, strict=True)}
    rest = changes_outside(base, tuned, layers)
    training = {"stage": "extract_lora", "parent": str(args.base), "tuned": str(args.tuned)}
    save_lora(base, args.out_dir, base=args.base, training=training)
    write_whole(args.out_dir / "energy.json", json.dumps({"layers": layers, "not_held": rest}) + "\n")
    print_table(layers, rest)
    print(f"saved {args.out_dir}")


def check_same_shape(base, tuned, args):
    """Raises ModelError at the first weight that the two do not have in common."""
    here, there = ({name: list(p.shape) for name, p in model.named_parameters()} for model in (base, tuned))
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise ModelError(f"not the same shape: {name} is {here.get(name, 'missing')} in {args.base}, "
                             f"{there.get(name, 'missing')} in {args.tuned}")
    for name in ("rope_theta", "rope_scaling", "rms_norm_eps", "windows"):
        a, b = getattr(base.config, name), getattr(tuned.config, name)
        if a != b:
            raise ModelError(f"not the same model: {name} is {a} in {args.base}, {b} in {args.tuned}")


def fill(linear, tuned_weight, args) -> dict:
    """Gives an adapted layer the best B and A for its change. Returns its row of the table."""
    from model.lora import LoRA
    from model.low_rank import low_rank

    change = tuned_weight.float() - linear.weight.float()  # (out, in)
    b, a, _ = low_rank(change, min(change.shape))  # of full rank: a lower rank is its first columns and rows
    sigma = b.square().sum(0)  # each column is a unit vector times sqrt(sigma)
    kept = energy_kept(sigma.double())  # kept[r - 1]: at rank r
    wanted = args.rank or int((kept < args.energy).sum()) + 1
    rank = min(wanted, len(sigma))
    linear.lora = LoRA(linear.in_features, linear.out_features, rank)  # apply_lora gave all layers one rank
    linear.lora.B.weight.data.copy_(b[:, :rank])
    linear.lora.A.weight.data.copy_(a[:rank])
    return {"rank": rank, "kept": kept[rank - 1].item(), "change": size(change, linear.weight),
            "singular_values": [float(f"{s:.6g}") for s in sigma.tolist()]}


def energy_kept(sigma):
    """The share of the sum of sigma^2 in the first 1, 2, ... singular values; 1 where nothing changed."""
    import torch

    energy = sigma.square().cumsum(0)
    return energy / energy[-1] if energy[-1] else torch.ones_like(energy)


def size(change, weight) -> float:
    """|change| / |weight|, both Frobenius norms."""
    return (change.norm() / weight.float().norm().clamp(min=1e-30)).item()


def changes_outside(base, tuned, held) -> dict:
    """{name: |change| / |weight|} of every weight that changed and that no adapter holds."""
    theirs, rest = dict(tuned.named_parameters()), {}
    for name, weight in base.named_parameters():
        if ".lora." not in name and name.removesuffix(".weight") not in held:
            change = size(theirs[name].detach() - weight.detach(), weight.detach())
            if change:
                rest[name] = change
    return rest


def print_table(layers: dict, rest: dict) -> None:
    width = max(map(len, [*layers, *rest]))
    print(f"{'layer':<{width}}  |change| / |weight|   rank   energy kept")
    for name, row in layers.items():
        print(f"{name:<{width}}  {row['change']:>19.4f}  {row['rank']:>5}  {row['kept']:>11.1%}")
    energies = [[sigma**2 for sigma in row["singular_values"]] for row in layers.values()]
    kept = sum(sum(energy[:row["rank"]]) for energy, row in zip(energies, layers.values(), strict=True))
    print(f"{'all of them':<{width}}  {'':>19}  {'':>5}  {kept / sum(map(sum, energies)):>11.1%}")
    if rest:
        print("not held by the adapter:")
    for name, change in rest.items():
        print(f"{name:<{width}}  {change:>19.4f}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("base", type=Path, metavar="BASE", help="the model before")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="the model after")
    rank = parser.add_mutually_exclusive_group()
    rank.add_argument("--rank", type=int, metavar="R", help="of every layer (default: 16)")
    rank.add_argument("--energy", type=float, metavar="E", help="part of the change to keep, 0 to 1")
    parser.add_argument("--target_modules", nargs="+", default="all-linear", metavar="NAME",
                        help="all-linear (all but the head), square, name suffixes such as q_proj o_proj, "
                             "or a regular expression")
    add_rope_scaling(parser.add_argument)  # of the base: the tuned model's config names its own
    parser.add_argument("--out_dir", type=Path, required=True, metavar="DIR", help="the adapter")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something")
    args = parser.parse_args(argv)
    if args.energy is not None and not 0 < args.energy <= 1:
        parser.error(f"--energy must be above 0 and at most 1, not {args.energy}")
    if args.rank is None and args.energy is None:
        args.rank = 16
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
