"""Draws the pictures of docs/lora.md: what low rank is, and how much of our own fine-tuning is of low rank.

    bash scripts/quickstart.sh     # makes what the next line draws: pretrain, full_sft and held-out chats
    python benchmarks/draw_lora.py
    python benchmarks/draw_lora.py --base out/pretrain --tuned out/full_sft --data_path my_test.jsonl

Several pairs go into one picture: each --tuned was trained from the --base at its place in the list, and
--data_path is held out from that training. --lora names adapters trained on any of the bases, at any ranks.
The numbers are printed, too. The end of docs/lora.md has the command that drew the pictures there. Readers of
the code may skip this file.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import COLORS, new_figure, save_picture
from common.cli import ROOT, Parser, run_script
from common.errors import ModelError
from common.files import read_json_if_there

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
LAYER = "self_attn.q_proj.weight"  # of the last block: the layer whose change is drawn
MAX_CHAT_TOKENS = 2048  # a longer held-out chat is cut
CHATS_AT_ONCE = 32  # in a forward pass


def main(args):
    import torch

    args.out_dir.mkdir(parents=True, exist_ok=True)
    pairs = [load_pair(*paths) for paths in zip(args.base, args.tuned, args.data_path, strict=True)]
    give_adapters(pairs, args.lora or [])
    torch.manual_seed(0)
    draw_product(args.out_dir / "lora_product.png")
    draw_change(pairs[-1], args.out_dir / "lora_change.png")
    draw_energy(pairs, args.out_dir / "lora_energy.png")
    draw_loss(pairs, args.out_dir / "lora_loss.png")
    print(f"saved {args.out_dir}/lora_product.png, lora_change.png, lora_energy.png, lora_loss.png")


# --- the numbers --------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A model before and after fine-tuning, and the data that shows how well the fine-tuning went."""

    name: str
    base: object  # CausalLM
    tuned: object
    changes: dict  # {weight: (U, sigma, V^T) of W_tuned - W_base}, for the layers that "all-linear" means
    dataset: object  # SFTDataset
    pad_token_id: int
    adapters: list[Path] = field(default_factory=list)  # trained on this base


def load_pair(base_path: Path, tuned_path: Path, data_path: Path) -> Pair:
    """Raises ModelError and DataError for files that cannot be read, and for two models that are no pair."""
    import torch

    from dataset.lm_dataset import SFTDataset
    from model.weights import load_model, load_tokenizer

    base, tuned, tokenizer = load_model(base_path), load_model(tuned_path), load_tokenizer(tuned_path)
    before, after = base.state_dict(), tuned.state_dict()
    if {name: w.shape for name, w in before.items()} != {name: w.shape for name, w in after.items()}:
        raise ModelError(f"{base_path} and {tuned_path} are not of the same shape")
    linears = [f"{name}.weight" for name, module in base.named_modules()
               if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    changes = {name: torch.linalg.svd(after[name] - before[name], full_matrices=False) for name in linears}
    dataset = SFTDataset(data_path, tokenizer, min(MAX_CHAT_TOKENS, base.config.max_position_embeddings))
    name = f"{base_path.name} → {tuned_path.name}{optimizer_of(tuned_path)}"
    return Pair(name, base, tuned, changes, dataset, tokenizer.eos_token_id)


def give_adapters(pairs: list[Pair], adapters: list[Path]) -> None:
    """Gives each pair the adapters that were trained on its base. Others do not load.

    Raises ModelError for an adapter that belongs to no pair.
    """
    from model.lora import read_lora

    for path in adapters:
        problem = None
        for pair in pairs:
            try:
                read_lora(pair.base, path)
                pair.adapters.append(path)
            except ModelError as error:
                problem = error
        if not any(path in pair.adapters for pair in pairs):
            raise ModelError(f"--lora fits no --base: {problem}")


def optimizer_of(folder: Path) -> str:
    """As " (muon)", if training.json names it."""
    optimizer = read_json_if_there(folder / "training.json").get("arguments", {}).get("optimizer")
    return f" ({optimizer})" if optimizer else ""


def energy_kept(sigmas) -> list[float]:
    """Singular values of several matrices -> the share of the sum of sigma^2 at rank 1, 2, ... of each."""
    import torch

    longest = max(map(len, sigmas))
    energy = sum(torch.nn.functional.pad(sigma.square(), (0, longest - len(sigma))) for sigma in sigmas)
    return (energy.cumsum(0) / energy.sum()).tolist()


def truncated(svd, rank: int):
    """The nearest matrix of that rank."""
    u, sigma, vh = svd
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank]


def cut(pair: Pair, rank: int, rest_too: bool):
    """The base with the best change of that rank in every linear layer.

    rest_too: with the norms and the embedding of the tuned model, which no adapter holds.
    """
    import copy

    state = dict((pair.tuned if rest_too else pair.base).state_dict())
    for name, svd in pair.changes.items():
        state[name] = pair.base.state_dict()[name] + truncated(svd, rank)
    model = copy.deepcopy(pair.base)
    model.load_state_dict(state)
    return model


def held_out_loss(pair: Pair, model) -> float:
    """In nats per supervised token."""
    from dataset.lm_dataset import collate
    from model.held_out import mean_loss

    order = sorted(range(len(pair.dataset)), key=pair.dataset.lengths.__getitem__)  # by length: less padding
    rows = [[sample] for sample in order]
    batches = (collate(pair.dataset, rows[first:first + CHATS_AT_ONCE], pair.pad_token_id)
               for first in range(0, len(rows), CHATS_AT_ONCE))
    loss, _ = mean_loss(model, batches)
    return loss


def ranks_up_to(full: int) -> list[int]:
    return [rank for rank in RANKS if rank < full] + [full]


def print_by_rank(name: str, what: str, by_rank) -> None:
    print(f"{name}: {what}: " + ", ".join(f"rank {rank} {value:.3f}" for rank, value in by_rank))


# --- the pictures -------------------------------------------------------------------------------------------


def show(ax, matrix, limit: float, title: str) -> None:
    ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)


def draw_product(path: Path) -> None:
    """A 6 x 7 matrix of rank 2 as the product of 6 x 2 and 2 x 7."""
    import torch

    b = torch.tensor([[1, 0], [2, 1], [0, 1], [1, -1], [-1, 2], [1, 1]])
    a = torch.tensor([[1, 2, 0, -1, 1, 0, 2], [0, 1, 3, 1, -1, 2, 0]])
    figure, axes = new_figure(8.2, 2.9, columns=3, width_ratios=(7, 2, 7))
    for ax, matrix, title in zip(axes[0], (b @ a, b, a), ("W: 6 × 7 = 42 numbers", "B: 6 × 2", "A: 2 × 7"),
                                 strict=True):
        show(ax, matrix, 9, title)
        for row, column in torch.cartesian_prod(*map(torch.arange, matrix.shape)).tolist():
            ax.text(column, row, f"{matrix[row, column]}".replace("-", "−"), ha="center", va="center")
    for ax, x, sign in zip(axes[0, 1:], (-0.35, -0.1), "=·", strict=True):
        ax.text(x, 0.5, sign, transform=ax.transAxes, fontsize=22, ha="center", va="center")
    save_picture(figure, path)


def draw_change(pair: Pair, path: Path) -> None:
    """One layer's change as an image, beside the nearest images of rank 1, 4 and 16."""
    name = [name for name in pair.changes if name.endswith(LAYER)][-1]
    svd = pair.changes[name]
    sigma, kept, corner = svd[1], energy_kept([svd[1]]), slice(0, 48)
    limit = 3 * truncated(svd, len(sigma)).std().item()
    figure, axes = new_figure(9, 2.75, columns=4)
    show(axes[0, 0], truncated(svd, len(sigma))[corner, corner], limit, "the whole change")
    for ax, rank in zip(axes[0, 1:], (1, 4, 16), strict=True):
        title = f"rank {rank}: {kept[min(rank, len(kept)) - 1]:.0%} of the energy"
        show(ax, truncated(svd, rank)[corner, corner], limit, title)
    figure.suptitle(f"{name.removesuffix('.weight')}, {pair.name}", fontsize=10)
    save_picture(figure, path)


def draw_energy(pairs: list[Pair], path: Path) -> None:
    """Left: singular values of one layer's change. Right: the energy that a rank keeps over all layers."""
    import torch

    lines = []
    for pair, color in zip(pairs, COLORS * len(pairs), strict=False):
        lines.append((pair.name, {name: sigma for name, (_, sigma, _) in pair.changes.items()}, color, "-"))
    shapes = {name: pairs[0].base.get_parameter(name).shape for name in pairs[0].changes}
    random = {name: torch.linalg.svdvals(torch.randn(shape)) for name, shape in shapes.items()}
    lines.append(("random numbers", random, "#777777", ":"))
    layer = [name for name in shapes if name.endswith(LAYER)][-1]
    figure, axes = new_figure(9.5, 3.7, columns=2)
    left, right = axes[0]
    for name, sigmas, color, style in lines:
        sigma, kept = sigmas[layer], energy_kept(list(sigmas.values()))
        left.plot(range(1, len(sigma) + 1), sigma / sigma[0], style, color=color)
        right.plot(range(1, len(kept) + 1), kept, style, color=color, label=name)
        print_by_rank(name, "energy kept", [(rank, kept[rank - 1]) for rank in ranks_up_to(len(kept))])
    layer = layer.removesuffix(".weight").removeprefix("model.")
    left.set(xlabel="singular value, the largest first", ylabel="size (the largest = 1)", ylim=(0, 1.03))
    left.set_title(f"one layer: {layer}", fontsize=11)
    right.set(xlabel="rank kept in every layer", ylabel="share of the energy kept", ylim=(0, 1.03))
    right.set_title("all linear layers", fontsize=11)
    right.legend(frameon=False, fontsize=9)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    save_picture(figure, path)


def draw_loss(pairs: list[Pair], path: Path) -> None:
    """Held-out loss of each change cut to a rank, and of adapters trained at a rank."""
    figure, axes = new_figure(0.5 + 3.4 * len(pairs), 3.9, columns=len(pairs), sharey=True)
    lines = {}  # of the legend
    for ax, pair in zip(axes[0], pairs, strict=True):
        ranks = ranks_up_to(max(len(sigma) for _, sigma, _ in pair.changes.values()))
        curves = [("the change, cut to a rank", "o-", COLORS[1],
                   [(rank, held_out_loss(pair, cut(pair, rank, False))) for rank in ranks]),
                  ("the same, norms and embedding changed in full", "o-", COLORS[0],
                   [(rank, held_out_loss(pair, cut(pair, rank, True))) for rank in ranks])]
        if pair.adapters:
            points = sorted(loss_of_adapter(pair, adapter) for adapter in pair.adapters)
            curves.append(("an adapter trained at that rank", "s-", COLORS[2], points))
        for name, style, color, points in curves:
            ax.plot(*zip(*points, strict=True), style, color=color, markersize=4.5, label=name)
            print_by_rank(pair.name, f"loss of {name}", points)
        for name, model, color in (("before fine-tuning", pair.base, "#999999"),
                                   ("after full fine-tuning", pair.tuned, "black")):
            loss = held_out_loss(pair, model)
            ax.axhline(loss, color=color, linestyle="--", linewidth=1, label=name)
            print(f"{pair.name}: loss {name} {loss:.3f}")
        ax.set(xlabel="rank", xscale="log", yscale="log")
        ax.set_xticks(ranks, ranks)
        ax.minorticks_off()
        ax.margins(y=0.1)
        lines |= {line.get_label(): line for line in ax.lines}
        ax.set_title(pair.name, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("held-out loss (nats per token)")
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False,
                  fontsize=9)
    save_picture(figure, path)


def loss_of_adapter(pair: Pair, path: Path) -> tuple[int, float]:
    """(its largest rank, held-out loss of the base with it)."""
    from model.adapters import remove_lora
    from model.lora import LoRA, load_lora

    load_lora(pair.base, path)
    rank = max(module.rank for module in pair.base.modules() if isinstance(module, LoRA))
    loss = held_out_loss(pair, pair.base)
    remove_lora(pair.base)
    return rank, loss


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    made = ROOT / "out" / "quickstart"
    parser.add_argument("--base", type=Path, nargs="+", metavar="DIR",
                        help="models before fine-tuning (default: out/quickstart/pretrain)")
    parser.add_argument("--tuned", type=Path, nargs="+", metavar="DIR",
                        help="the same after it (default: out/quickstart/full_sft)")
    parser.add_argument("--data_path", type=Path, nargs="+", metavar="FILE",
                        help="held-out chats for each (default: out/quickstart/world/sft_eval.jsonl)")
    parser.add_argument("--lora", type=Path, nargs="+", metavar="DIR",
                        help="adapters trained on these bases")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "pictures", metavar="DIR",
                        help="where the pictures go")
    args = parser.parse_args(argv)
    args.base = args.base or [made / "pretrain"]
    args.tuned = args.tuned or [made / "full_sft"]
    args.data_path = args.data_path or [made / "world" / "sft_eval.jsonl"]
    if not len(args.base) == len(args.tuned) == len(args.data_path):
        parser.error(f"--base, --tuned and --data_path go together, one of each for a pair: there are "
                     f"{len(args.base)}, {len(args.tuned)} and {len(args.data_path)}")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
