"""Which words go to which expert: a model with experts reads texts, and a table says what its routers choose.

    python scripts/show_experts.py out/my_experts          # of the world's texts those that are held out
    python scripts/show_experts.py out/my_experts --data_path my_text.jsonl --plot experts.png
    python scripts/show_experts.py out/my_lora             # an adapter, over the model that it changes

For each expert: its share of the tokens (1.00 is a fair share), and the words that go there most surely, each
with the share of its tokens that chose this expert. --plot draws the load of all experts, by layer, and over
the run where its log is there.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, add_rope_scaling, count, run_script
from common.errors import DataError, UsageError

RARE = 5  # words that occur less often are not listed: chance alone decides where they go


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    import torch

    from model.adapters import report_line
    from model.lora import load_lora
    from model.lora_files import CONFIG, base_of
    from model.weights import load_model, load_tokenizer

    is_adapter = (args.model / CONFIG).is_file()
    folder = is_adapter and base_of(args.model) or args.model
    model, tokenizer = load_model(folder, rope_scaling=args.rope_scaling), load_tokenizer(folder)
    if not model.config.num_experts:
        raise UsageError(f"{args.model} has no experts: train_pretrain.py --preset tiny-moe makes some")
    if is_adapter:
        print(report_line(model, args.model, load_lora(model, args.model)))
    texts = read_texts(args)
    length = min(512, model.config.max_position_embeddings)
    rows = [ids[:length] for text in texts if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])]
    chosen, words = route(model, rows[:args.texts])
    load = torch.stack([torch.bincount(of_layer.flatten(), minlength=model.config.num_experts)
                        for of_layer in chosen]).double()  # (L, E)
    load /= load.sum(dim=1, keepdim=True)
    names = [layer for layer in range(model.config.num_hidden_layers) if model.config.has_experts(layer)]
    print(f"{len(words):,} tokens of {min(len(rows), args.texts):,} texts")
    for place, layer in enumerate(names):
        print(f"\nlayer {layer}")
        for expert in range(model.config.num_experts):
            share = load[place, expert].item() * model.config.num_experts
            there = favourites(words, chosen[place], expert, tokenizer, args.words)
            print(f"  expert {expert}   {share:.2f}   {there}")
    if args.plot:
        draw(load, names, args)
        print(f"\nplot  {args.plot}")


def read_texts(args) -> list[str]:
    """The texts of the files, or of the world's held-out file; of a chat the contents of its messages."""
    from dataset.messages import to_messages
    from dataset.prompts import holds_chat
    from dataset.records import read_records

    paths = args.data_path
    if not paths:
        from dataset.synthetic import ensure_world

        paths = [ensure_world(ROOT / "out" / "world")["pretrain_eval"]]
    texts = []
    for path, line, record in read_records(paths):
        try:
            is_text = isinstance(record.get("text"), str) and not holds_chat(record)
            messages = [{"content": record["text"]}] if is_text else to_messages(record)[0]
            texts.append("\n".join(str(message["content"]) for message in messages))
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None
        if len(texts) == args.texts:
            break
    if not texts:
        raise UsageError("there is no text to read")
    return texts


def route(model, rows: list[list[int]]):
    """(the experts chosen in each layer (L, N, k), the N tokens) of rows of token ids."""
    import torch

    chosen = [[] for block in model.model.layers if block.has_experts]
    with torch.inference_mode():
        for row in rows:
            _, scores = model.model(torch.tensor([row]))
            for of_layer, found in zip(scores, chosen, strict=True):
                found.append(of_layer[0].topk(model.config.num_experts_per_tok, dim=-1).indices)
    return torch.stack([torch.cat(found) for found in chosen]), [token for row in rows for token in row]


def favourites(words: list[int], chosen, expert: int, tokenizer, how_many: int) -> str:
    """The words that go to the expert most surely, as 'the' 98%  'a' 91%; the most frequent ones first."""
    everywhere = Counter(words)
    here = Counter(word for word, experts in zip(words, chosen.tolist(), strict=True) if expert in experts)
    shares = {word: here[word] / everywhere[word] for word in here if everywhere[word] >= RARE}
    best = sorted(shares, key=lambda word: (-round(shares[word], 2), -everywhere[word]))[:how_many]
    found = "  ".join(f"{tokenizer.decode([word])!r} {shares[word]:.0%}" for word in best)
    return found or "(no frequent word)"


def draw(load, names: list[int], args) -> None:
    """The load as a picture: experts by layer, and, where the run's log has it, over the steps of the run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from trainer.runs import read_run

    loads = []
    if (args.model / "metrics.jsonl").is_file():
        loads = read_run(args.model).router_loads
    figure = Figure(figsize=(9 if loads else 5, 0.5 * len(names) + 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if loads else 1, squeeze=False)[0]
    fair = load.size(1)
    picture = axes[0].imshow((load * fair).numpy(), vmin=0, vmax=2, cmap="viridis", aspect="auto")
    axes[0].set(xlabel="expert", ylabel="layer", title="tokens of these texts",
                xticks=range(fair) if fair <= 16 else [], yticks=range(len(names)), yticklabels=names)
    if loads:
        steps = [step for step, _ in loads]
        for place, layer in enumerate(names):
            least = [min(found[place]) * fair for _, found in loads]
            most = [max(found[place]) * fair for _, found in loads]
            axes[1].fill_between(steps, least, most, alpha=0.25, label=f"layer {layer}")
        axes[1].axhline(1, color="black", linewidth=0.8)
        axes[1].set(xlabel="step", title="least to most used expert in training", ylim=(0, None))
        axes[1].legend(frameon=False, fontsize=8)
    figure.colorbar(picture, ax=axes[0], label="1 is a fair share")
    figure.savefig(args.plot, dpi=130)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL",
                        help="the folder of a model with experts, or of an adapter over one")
    add_rope_scaling(parser.add_argument)
    parser.add_argument("--data_path", nargs="+", type=Path, metavar="FILE",
                        help="records to read (default: the world's held-out texts)")
    parser.add_argument("--texts", type=count, default=200, metavar="N", help="of them are read at most")
    parser.add_argument("--words", type=count, default=8, metavar="N", help="listed for each expert")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the load (default: none)")
    args = parser.parse_args(argv)
    if args.plot and (args.plot.suffix != ".png" or not args.plot.parent.is_dir()):
        parser.error(f"--plot {args.plot}: name a file that ends with .png, in a folder that is there")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
