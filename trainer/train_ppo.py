"""PPO: the model answers prompts, and learns from each token that did better than its value head expected.

    python trainer/train_ppo.py            # reads out/full_sft; built-in questions that say what is right
    python trainer/train_ppo.py --data_path my_prompts.jsonl --reward_file my.py:score --name ppo_mine

metrics.jsonl and loss.png lie beside the weights. `torchrun --nproc_per_node 2` in the place of
`python` is the same run on two processes. After a stop the same command with --resume goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer import args as flags


def main(args):
    # Imported here and not above, so that --help and the complaint about a mistyped flag come at once.
    from functools import partial

    from common.device import choose_dtype
    from dataset.chat import ensure_template
    from trainer import stage
    from trainer.distributed import join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.losses import ppo
    from trainer.rehearsal import rehearse
    from trainer.rollouts import load_rollouts, reference_log_probs
    from trainer.values import add_value_head, judge_tokens, rewards_differ

    ranks = join_ranks(args.device)  # which process of torchrun this is, and its device
    if stage.is_finished(args.run_dir, args.resume, args.overwrite, ranks):
        return
    # The model that another stage left, and its tokenizer
    model, tokenizer = stage.load_weights(args.load_from, ranks, **vars(args))
    ensure_template(tokenizer)  # if a base model has no format for chats, it learns ours
    if args.lora_rank:
        stage.add_lora(model, ranks, **vars(args))  # from here on nothing but the adapters trains
    reference = reference_log_probs(model, args.kl_beta, args.temperature)
    if ranks.is_main:
        print(stage.what_trains(model), "and a value head")
    value_head = add_value_head(model)
    # The data: prompts, which the model of each moment answers, and rewards for the answers. Every answer is
    # trained; what each of its tokens was worth is judged by the value head.
    judge = partial(judge_tokens, model=model, ranks=ranks, dtype=choose_dtype(args.dtype, ranks.device),
                    kl_beta=args.kl_beta, gamma=args.gamma, gae_decay=args.gae_decay)
    batches, eval_batches = load_rollouts(model, tokenizer, ranks, rewards_differ, reference, judge,
                                          **vars(args))
    loss = partial(ppo, value_head=value_head, temperature=args.temperature, low=args.clip_low,
                   high=args.clip_high, value_clip=args.value_clip, value_weight=args.value_weight)
    batches, loss = rehearse(batches, loss, tokenizer, ranks, **vars(args))  # old chats, if there are some
    result = train(model, batches, loss, eval_batches, args, ranks)
    del model.value_head  # nobody needs it to write answers
    stage.save_result(model, tokenizer, args, result, ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = flags.rollout_parser(__doc__)
    add = parser.add_argument_group("PPO").add_argument
    add("--clip_low", type=flags.fraction, default=0.2, metavar="F", help="a ratio is clipped below 1 - F")
    add("--clip_high", type=flags.positive, default=0.2, metavar="F", help="a ratio is clipped above 1 + F")
    add("--value_clip", type=flags.positive, default=0.2, metavar="F",
        help="how far a value may move in the updates of one rollout")
    add("--value_weight", type=flags.positive, default=0.1, metavar="F", help="of the value head's loss")
    add("--gamma", type=flags.part, default=1.0, metavar="F", help="what a reward one token later is worth")
    add("--gae_decay", type=flags.part, default=0.95, metavar="F",
        help="1: the rewards alone judge a token; 0: the value head does, from the next token on")
    parser.set_defaults(batch_size=256, group_size=1, updates_per_rollout=4, max_seq_len=256, stage="ppo",
                        world="grpo", name="ppo", load_from=flags.ROOT / "out/full_sft", learning_rate=3e-4,
                        weight_decay=0.0)
    flags.run_script(main, flags.parse_args(parser))
