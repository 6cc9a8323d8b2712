"""GRPO: the model answers each prompt several times, and learns from which of its answers were better
(Shao et al. 2024, arXiv:2402.03300). A reader may skip this file.

    python trainer/train_grpo.py           # reads out/full_sft; built-in questions that say what is right
    python trainer/train_grpo.py --data_path my_prompts.jsonl --reward_file my.py:score --name grpo_mine

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

    from dataset.chat import ensure_template
    from trainer import losses, stage
    from trainer.distributed import join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.rehearsal import rehearse
    from trainer.rollouts import group_advantages, load_rollouts, reference_log_probs

    ranks = join_ranks(args.device)  # which process of torchrun this is, and its device
    if stage.is_finished(args.run_dir, args.resume, args.overwrite, ranks):
        return
    # The model that another stage left, and its tokenizer
    model, tokenizer = stage.load_weights(args.load_from, ranks, **vars(args))
    ensure_template(tokenizer)  # if a base model has no format for chats, it learns ours
    if args.lora_rank:
        stage.add_lora(model, ranks, **vars(args))  # from here on nothing but the adapters trains
    # The data: prompts, which the model of each moment answers, and rewards for the answers
    advantages = partial(group_advantages, divide=args.advantage == "group_std")
    reference = reference_log_probs(model, args.kl_beta, args.temperature)
    batches, eval_batches = load_rollouts(model, tokenizer, ranks, advantages, reference, **vars(args))
    if ranks.is_main:
        print(stage.what_trains(model))
    # What a token with an advantage contributes to the loss
    objective = {"reinforce": losses.reinforce,
                 "clipped": partial(losses.clipped_ratio, low=args.clip_low, high=args.clip_high),
                 "cispo": partial(losses.cispo, high=args.clip_high),
                 "gspo": partial(losses.gspo, low=args.clip_low, high=args.clip_high)}[args.policy_loss]
    loss = partial(losses.policy_loss, objective=objective, temperature=args.temperature,
                   kl_beta=args.kl_beta)
    batches, loss = rehearse(batches, loss, tokenizer, ranks, **vars(args))  # old chats, if there are some
    result = train(model, batches, loss, eval_batches, args, ranks)
    stage.save_result(model, tokenizer, args, result, ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = flags.rollout_parser(__doc__)
    add = parser.add_argument_group("GRPO").add_argument
    add("--policy_loss", choices=("clipped", "reinforce", "cispo", "gspo"), default="clipped",
        help="see trainer/losses.py; gspo needs smaller clips, such as 0.02 and 0.03")
    add("--advantage", choices=("group", "group_std"), default="group",
        help="reward minus the mean of its group; group_std: divided by the group's standard deviation")
    add("--mean_over", choices=("tokens", "answers", "constant"), default="tokens",
        help="each token counts the same, or each answer; constant: a token counts 1 / --max_new_tokens")
    add("--mask_cut_off", action="store_true", help="answers that were cut off are not trained")
    add("--clip_low", type=flags.fraction, default=0.2, metavar="F", help="a ratio is clipped below 1 - F")
    add("--clip_high", type=flags.positive, default=0.2, metavar="F", help="a ratio is clipped above 1 + F")
    # Many prompts with few answers each: every kind of question is asked in every rollout.
    parser.set_defaults(batch_size=256, group_size=4, updates_per_rollout=2, max_seq_len=256, stage="grpo",
                        world="grpo", name="grpo", load_from=flags.ROOT / "out/full_sft", learning_rate=3e-4,
                        weight_decay=0.0)
    flags.run_script(main, flags.parse_args(parser))
