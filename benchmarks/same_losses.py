"""Compare our losses with TRL's: the same weights, pairs, rollouts and rewards must give the same gradients.

    python benchmarks/same_losses.py                              # out/full_sft, in a temporary folder
    python benchmarks/same_losses.py --load_from out/quickstart/full_sft --folder ../elsewhere

The model answers a few prompts, and these answers are the rollouts and the pairs. Slightly changed copies of
it are the model that sampled, the reference and the teacher, so that no ratio is 1. Our own code computes the
loss and the gradients of every loss of trainer/losses.py. Then TRL's code does, in an environment of its own
(as in opens_elsewhere.py), where the model is one of transformers. The newest TRL has neither PPO nor label
smoothing for DPO any more, so a second environment has an older one.

GRPO and DPO are computed by TRL's trainers, all else by the loss functions of its trainers. They are given
log-probabilities (or logits) of transformers' model. A row is right if the losses differ by less than 1e-5,
and so do all gradients. Where the largest gradient is above 1, its 1e-5th part is allowed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Environment -> what pip installs for it
ENVIRONMENTS = {"TRL": ["trl"], "TRL 0.11": ["trl==0.11.4", "transformers==4.57.*"]}
TOLERANCE = 1e-5
TEMPERATURE, MAX_NEW_TOKENS = 1.5, 20
PROMPTS = ("What sound does a frog make?", "Put 8 34 29 in order.", "Who are you?", "Tell me a story.",
           "What is 7 plus 8?", "Is a lemon a food or a colour?")

# Case -> (our objective, its settings, weights, kl_beta, the settings of TRL's GRPOConfig)
CLIP = {"low": 0.2, "high": 0.28}
EPSILON = {"epsilon": 0.2, "epsilon_high": 0.28}
POLICY = {
    "grpo": ("clipped_ratio", CLIP, "answers", 0.0, {"loss_type": "grpo", **EPSILON}),
    "grpo, beta 0.1": ("clipped_ratio", CLIP, "answers", 0.1, {"loss_type": "grpo", "beta": 0.1, **EPSILON}),
    "bnpo": ("clipped_ratio", CLIP, "tokens", 0.0, {"loss_type": "bnpo", **EPSILON}),
    "dapo": ("clipped_ratio", CLIP, "tokens", 0.0, {"loss_type": "dapo", **EPSILON}),
    "dapo, beta 0.1": ("clipped_ratio", CLIP, "tokens", 0.1, {"loss_type": "dapo", "beta": 0.1, **EPSILON}),
    "dr_grpo": ("clipped_ratio", CLIP, "constant", 0.0, {"loss_type": "dr_grpo", **EPSILON}),
    "cispo": ("cispo", {"high": 0.1}, "tokens", 0.0, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "grpo, sequence (GSPO)": ("gspo", {"low": 0.02, "high": 0.03}, "answers", 0.0,
                              {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02,
                               "epsilon_high": 0.03}),
    # CISPO with ratio 1 is REINFORCE. TRL takes 1 where it is given no old log-probabilities.
    "cispo, ratio 1 (REINFORCE)": ("reinforce", {}, "tokens", 0.0,
                                   {"loss_type": "cispo", "epsilon_high": 5.0}),
}
PPO = {"low": 0.2, "high": 0.2, "value_clip": 0.2, "value_weight": 0.1}
GAMMA, DECAY, KL_BETA = 0.99, 0.95, 0.05

# Case -> (settings of our dpo, number of pairs). TRL's SFT term is a mean over the tokens of all chosen
# answers. Ours is a mean over pairs of such means. With one pair the two are the same.
PREFERENCE = {
    "sigmoid": ({"kind": "dpo", "beta": 0.1}, 6),
    "ipo": ({"kind": "ipo", "beta": 0.1}, 6),
    "sigmoid and sft (RPO)": ({"kind": "dpo", "beta": 0.1, "sft_weight": 0.3}, 1),
    "simpo": ({"kind": "simpo", "beta": 2.0, "margin": 0.8}, 6),
    "orpo, its odds ratio": ({"kind": "orpo", "beta": 0.1}, 6),
    "sigmoid, label smoothing": ({"kind": "dpo", "beta": 0.1, "label_smoothing": 0.2}, 6),
}
# Case -> (our divergence, its settings, temperature, beta of TRL's generalised Jensen-Shannon divergence)
TEACHER = {
    "gkd, beta 0 (forward)": ("forward_kl", {}, 1.0, 0),
    "gkd, beta 1 (reverse)": ("reverse_kl", {}, 1.0, 1),
    "gkd, beta 0.5": ("jensen_shannon", {"beta": 0.5}, 1.0, 0.5),
    "gkd, beta 0.1, T 2": ("jensen_shannon", {"beta": 0.1}, 2.0, 0.1),
}


# --- our side -----------------------------------------------------------------------------------------------


def make_cases(load_from: Path, folder: Path) -> None:
    """Writes folder/inputs.pt, and for each case folder/ours/CASE.pt with our loss and gradients."""
    import torch

    from model.weights import load_model, load_tokenizer, save_model

    torch.manual_seed(0)
    model, tokenizer = load_model(load_from), load_tokenizer(load_from)
    save_model(model, folder / "model", tokenizer)
    (folder / "ours").mkdir(exist_ok=True)
    answers = sampled_answers(model, tokenizer)
    pairs = pairs_of(model, answers)
    teacher = changed(model, 0.1)
    save_model(teacher, folder / "teacher", tokenizer)
    torch.save({"answers": answers, "pairs": pairs}, folder / "inputs.pt")
    for name, loss in our_losses(model, teacher, answers, pairs).items():
        model.zero_grad()
        value = loss(model)
        value.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": value.detach(), "gradients": gradients}, file_of(folder, name))


def file_of(folder: Path, case: str) -> Path:
    return folder / "ours" / f"{case.replace(' ', '_')}.pt"


def changed(model, amount: float):
    """A copy of the model with other weights: each moved by a part `amount` of its matrix's deviation."""
    import copy

    import torch

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                parameter += amount * parameter.std() * torch.randn_like(parameter)
    return other


def sampled_answers(model, tokenizer) -> dict:
    """A rollout batch as trainer/losses.py describes it: two answers to each prompt, with PPO's fields."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from dataset.chat import encode_chat
    from model.generate import generate
    from trainer.distributed import Ranks
    from trainer.losses import answer_log_probs
    from trainer.rollouts import group_advantages
    from trainer.values import add_value_head, judge_tokens

    rows, labels = [], []
    for number, prompt in enumerate(prompt for prompt in PROMPTS for _ in range(2)):
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)[0]
        written = generate(model, torch.tensor([ids]), MAX_NEW_TOKENS, TEMPERATURE, seed=number,
                           eos_token_id=tokenizer.eos_token_id)
        answer = [token.item() for token in written]
        rows.append(torch.tensor(ids + answer))
        labels.append(torch.tensor([-100] * len(ids) + answer))
    batch = {"input_ids": pad_sequence(rows, True, tokenizer.pad_token_id or 0),
             "labels": pad_sequence(labels, True, -100), "sums": {}}
    is_answer = batch["labels"] != -100
    lengths = is_answer.sum(dim=1)
    sampler, reference = changed(model, 0.1), changed(model, 0.15)
    head = add_value_head(sampler)
    torch.nn.init.normal_(head.weight, std=0.1)
    rewards = torch.randn(len(rows)).round(decimals=2)
    with torch.no_grad():
        batch["old_log_probs"], _ = answer_log_probs(sampler, batch, TEMPERATURE)
        batch["reference_log_probs"], _ = answer_log_probs(reference, batch, TEMPERATURE)
    advantages = group_advantages(rewards.view(-1, 2), divide=True).flatten()
    batch |= {"advantages": advantages[:, None] * is_answer, "rewards": rewards, "lengths": lengths}
    batch["token_weights"] = (len(rows) / lengths.sum()).expand(len(rows))

    judged = dict(batch)  # with values, returns and advantages as train_ppo.py computes them
    judge_tokens([judged], model=sampler, ranks=Ranks(0, 1, torch.device("cpu")), dtype=torch.float32,
                 kl_beta=KL_BETA, gamma=GAMMA, gae_decay=DECAY)
    # The value head has learnt since then.
    return batch | {"values": judged["values"], "returns": judged["returns"],
                    "ppo_advantages": judged["advantages"], "head_weight": head.weight.detach() * 0.9,
                    "head_bias": head.bias.detach() + 0.1}


def pairs_of(model, answers: dict) -> dict:
    """The two answers to each prompt as a pair: first the chosen sides of all pairs, then the rejected."""
    import torch

    rows = torch.arange(len(answers["labels"])).view(-1, 2).T.flatten()
    batch = {name: answers[name][rows] for name in ("input_ids", "labels")}
    with torch.no_grad():
        token_losses = changed(model, 0.1)(batch["input_ids"], batch["labels"]).token_losses
    return batch | {"reference_log_probs": -token_losses.sum(dim=1)}


def some_pairs(pairs: dict, count: int) -> dict:
    """The first `count` of the pairs."""
    return {name: values.unflatten(0, (2, -1))[:, :count].flatten(0, 1) for name, values in pairs.items()}


def our_losses(model, teacher, answers: dict, pairs: dict) -> dict:
    """Case -> a function of the model, which returns the mean loss over the units."""
    import torch

    from trainer import losses
    from trainer.values import add_value_head

    rows, lengths = len(answers["labels"]), answers["lengths"]
    weights = {"answers": 1 / lengths, "tokens": (rows / lengths.sum()).expand(rows),
               "constant": torch.full((rows,), 1 / MAX_NEW_TOKENS)}

    def policy(model, objective, settings, kind, kl_beta):
        loss = partial(losses.policy_loss, objective=partial(getattr(losses, objective), **settings),
                       temperature=TEMPERATURE, kl_beta=kl_beta)
        total, named = loss(model, answers | {"weights": weights[kind]})
        assert named.get("clipped", 1) > 0, "nothing is clipped, so nothing of the clipping is compared"
        return total / rows

    def ppo(model):
        head = add_value_head(model)
        head.weight.data, head.bias.data = answers["head_weight"].clone(), answers["head_bias"].clone()
        batch = answers | {"weights": weights["tokens"], "advantages": answers["ppo_advantages"]}
        return losses.ppo(model, batch, value_head=head, temperature=TEMPERATURE, **PPO)[0] / rows

    def preference(model, settings, count):
        return losses.dpo(model, some_pairs(pairs, count), **settings)[0] / count

    def distillation(model, divergence, settings, temperature):
        batch = {"input_ids": answers["input_ids"], "labels": answers["labels"], "document_ids": None}
        loss, _ = losses.distillation(model, batch, teacher=teacher, weight=1.0, temperature=temperature,
                                      divergence=partial(getattr(losses, divergence), **settings))
        return loss / lengths.sum()

    found = {name: partial(policy, objective=objective, settings=settings, kind=kind, kl_beta=kl_beta)
             for name, (objective, settings, kind, kl_beta, _) in POLICY.items()}
    found |= {name: partial(preference, settings=settings, count=count)
              for name, (settings, count) in PREFERENCE.items()}
    found |= {name: partial(distillation, divergence=divergence, settings=settings, temperature=temperature)
              for name, (divergence, settings, temperature, _) in TEACHER.items()}
    return found | {"ppo": ppo}  # ppo comes last: it gives the model a value head


# --- TRL's side: each function runs in an environment of TRL's, and yields (case, loss, parameters) ---------


def as_trl(answers: dict):
    """A rollout batch as TRL has it, prompts padded on the left and answers on the right.

    Also returns the function that moves (B, T) values of ours to the places of TRL's answers.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    is_answer = answers["labels"] != -100
    prompts = [row[:place.int().argmax()] for row, place in zip(answers["input_ids"], is_answer, strict=True)]
    flipped = pad_sequence([prompt.flip(0) for prompt in prompts], True, 0).flip(1)

    def moved(values, fill=0):
        rows = [row[place] for row, place in zip(values, is_answer, strict=True)]
        return pad_sequence(rows, True, fill)

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    prompt_mask = (torch.arange(flipped.size(1)).flip(0)[None] < lengths[:, None]).long()
    return {"prompt_ids": flipped, "prompt_mask": prompt_mask, "completion_ids": moved(answers["input_ids"]),
            "completion_mask": moved(is_answer.long())}, moved


def trl_grpo(folder: Path, inputs: dict):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    answers = inputs["answers"]
    batch, moved = as_trl(answers)
    batch["advantages"] = moved(answers["advantages"])[:, 0]
    batch["num_items_in_batch"] = answers["lengths"].sum()
    for case, (_, _, _, _, settings) in POLICY.items():
        config = GRPOConfig(str(folder / "trl"), temperature=TEMPERATURE, per_device_train_batch_size=2,
                            num_generations=2, steps_per_generation=1, use_cpu=True, bf16=False, report_to=[],
                            gradient_checkpointing=False, max_completion_length=MAX_NEW_TOKENS, **settings)
        trainer = GRPOTrainer(str(folder / "model"), [lambda completions, **_: [0.0] * len(completions)],
                              config, Dataset.from_list([{"prompt": "Hello"}] * 4),
                              processing_class=AutoTokenizer.from_pretrained(folder / "model"))
        trainer.current_gradient_accumulation_steps = 1  # in training the Trainer sets it
        logs = {} if "ratio 1" in case else {"old_per_token_logps": moved(answers["old_log_probs"])}
        logs["ref_per_token_logps"] = moved(answers["reference_log_probs"])
        model = trainer.model.train()
        yield case, trainer._compute_loss(model, batch | logs), model.named_parameters()


def trl_ppo(folder: Path, inputs: dict):
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.ppo_trainer import PPOTrainer

    answers = inputs["answers"]
    batch, moved = as_trl(answers)
    mask = batch["completion_mask"]
    config = SimpleNamespace(kl_penalty="kl", whiten_rewards=False, gamma=GAMMA, lam=DECAY,
                             cliprange=PPO["low"], cliprange_value=PPO["value_clip"],
                             vf_coef=PPO["value_weight"], ratio_threshold=1e9)
    trainer = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=KL_BETA))
    trainer._kl_penalty = partial(PPOTrainer._kl_penalty, trainer)
    old, old_values = moved(answers["old_log_probs"]), moved(answers["values"])
    rewards, _, _ = PPOTrainer.compute_rewards(trainer, answers["rewards"], old,
                                               moved(answers["reference_log_probs"]), mask)
    values, advantages, returns = PPOTrainer.compute_advantages(trainer, old_values, rewards, mask)
    for name, theirs in (("ppo_advantages", advantages), ("returns", returns)):
        assert torch.allclose(theirs * mask, moved(answers[name]), atol=TOLERANCE), name

    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    head = torch.nn.Linear(answers["head_weight"].size(1), 1)
    head.weight.data, head.bias.data = answers["head_weight"], answers["head_bias"]
    logits, states = logits_of_answers(model, batch)
    log_probs = (logits / TEMPERATURE).log_softmax(-1)
    log_probs = log_probs.gather(2, batch["completion_ids"][..., None]).squeeze(2)
    policy, value, _ = PPOTrainer.loss(trainer, old, values, logits, head(states).squeeze(2), log_probs, mask,
                                       advantages, returns)
    named = {f"value_head.{name}": parameter for name, parameter in head.named_parameters()}
    yield "ppo", policy + value, [*model.named_parameters(), *named.items()]


def logits_of_answers(model, batch: dict):
    """Logits and last states before each token of TRL's answers."""
    import torch

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    before = slice(batch["prompt_ids"].size(1) - 1, -1)
    return output.logits[:, before].float(), output.hidden_states[-1][:, before]


def trl_dpo(folder: Path, inputs: dict):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    text = [{"prompt": "a", "chosen": "b", "rejected": "c"}]  # a trainer wants data, which is never read
    for case, loss_types in (("sigmoid", {"loss_type": ["sigmoid"]}), ("ipo", {"loss_type": ["ipo"]}),
                             ("sigmoid and sft (RPO)", {"loss_type": ["sigmoid", "sft"],
                                                        "loss_weights": [1.0, 0.3]})):
        settings, count = PREFERENCE[case]
        pairs = some_pairs(inputs["pairs"], count)
        config = DPOConfig(str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], beta=settings["beta"],
                           gradient_checkpointing=False, **loss_types)
        trainer = DPOTrainer(str(folder / "model"), args=config, train_dataset=Dataset.from_list(text),
                             processing_class=AutoTokenizer.from_pretrained(folder / "model"))
        trainer.precompute_ref_logps = True
        chosen, rejected = pairs["reference_log_probs"].chunk(2)
        mask, seen = masks(pairs)
        batch = {"input_ids": pairs["input_ids"], "attention_mask": seen, "completion_mask": mask,
                 "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        model = trainer.model.train()
        yield case, trainer._compute_loss(model, batch, False), model.named_parameters()


def masks(pairs: dict):
    """(1 on the tokens of the answers, 1 on all tokens that are no padding), (2 P, T) each."""
    mask = (pairs["labels"] != -100).long()
    return mask, (mask.flip(1).cumsum(1).flip(1) > 0).long()  # nothing follows an answer but padding


def trl_simpo_and_orpo(folder: Path, inputs: dict):
    import torch
    from transformers import AutoModelForCausalLM
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    pairs, here = inputs["pairs"], SimpleNamespace(device="cpu")
    for case, trainer in (("simpo", CPOTrainer), ("orpo, its odds ratio", ORPOTrainer)):
        settings, _ = PREFERENCE[case]
        model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
        logits = model(input_ids=pairs["input_ids"], attention_mask=masks(pairs)[1]).logits.float()
        log_probs = trainer.get_batch_logps(logits, pairs["labels"], average_log_prob=True).chunk(2)
        if case == "simpo":
            given = SimpleNamespace(alpha=0.0, loss_type="simpo", beta=settings["beta"], accelerator=here,
                                    simpo_gamma=settings["margin"], label_smoothing=0.0)
            loss = CPOTrainer.cpo_loss(given, *log_probs)[0].mean()
        else:  # TRL adds the cross-entropy of the prompt and the chosen answer, which our recipe does not
            given = SimpleNamespace(beta=torch.tensor(settings["beta"]), accelerator=here)
            loss = -ORPOTrainer.odds_ratio_loss(given, *log_probs)[0].mean()
        yield case, loss, model.named_parameters()


def trl_label_smoothing(folder: Path, inputs: dict):
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_trainer import DPOTrainer

    case, pairs = "sigmoid, label smoothing", inputs["pairs"]
    settings, _ = PREFERENCE[case]
    given = SimpleNamespace(reference_free=False, f_divergence_type="reverse_kl", loss_type="sigmoid",
                            accelerator=SimpleNamespace(device="cpu"), beta=settings["beta"],
                            label_smoothing=settings["label_smoothing"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    logits = model(input_ids=pairs["input_ids"], attention_mask=masks(pairs)[1]).logits.float()
    log_probs, _ = DPOTrainer.get_batch_logps(logits, pairs["labels"])
    losses, _, _ = DPOTrainer.dpo_loss(given, *log_probs.chunk(2), *pairs["reference_log_probs"].chunk(2))
    yield case, losses.mean(), model.named_parameters()


def trl_gkd(folder: Path, inputs: dict):
    import torch
    from transformers import AutoModelForCausalLM
    from trl.experimental.gkd import GKDTrainer

    answers = inputs["answers"]
    seen = {"input_ids": answers["input_ids"], "attention_mask": masks(answers)[1]}
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager")
                        for name in ("teacher", "model"))
    with torch.no_grad():
        taught = teacher(**seen).logits[:, :-1]
    for case, (_, _, temperature, beta) in TEACHER.items():
        logits, labels = student(**seen).logits[:, :-1], answers["labels"][:, 1:]
        loss = GKDTrainer.generalized_jsd_loss(logits, taught, labels, beta, temperature,
                                               num_items_in_batch=answers["lengths"].sum())
        # Ours has the factor T^2, so that gradients don't shrink with the temperature. TRL's has none.
        yield case, temperature**2 * loss, student.named_parameters()


CHECKS = {"TRL": [trl_grpo, trl_dpo, trl_simpo_and_orpo, trl_gkd], "TRL 0.11": [trl_ppo, trl_label_smoothing]}


def run_checks(environment: str, folder: Path) -> None:
    """Prints a line of JSON for each case. This runs in an environment of TRL's, without our code."""
    import torch

    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    for check in CHECKS[environment]:
        for case, loss, parameters in check(folder, inputs):
            ours = torch.load(file_of(folder, case), weights_only=True)
            parameters = dict(parameters)
            loss.backward()
            theirs = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            assert theirs.keys() == ours["gradients"].keys(), theirs.keys() ^ ours["gradients"].keys()
            row = {"case": case, "ours": ours["loss"].item(), "theirs": loss.item(),
                   "gradient": max(g.abs().max().item() for g in theirs.values()),
                   "difference": max((g - ours["gradients"][name]).abs().max().item()
                                     for name, g in theirs.items())}
            print("\n" + json.dumps({"environment": environment, **row}), flush=True)
            for parameter in parameters.values():
                parameter.grad = None


def is_right(row: dict) -> bool:
    return (abs(row["ours"] - row["theirs"]) < TOLERANCE and row["gradient"] > 0
            and row["difference"] < TOLERANCE * max(1, row["gradient"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_from", type=Path, metavar="DIR", default=ROOT / "out" / "full_sft")
    parser.add_argument("--folder", type=Path, metavar="DIR",
                        help="where environments are made and kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    parser.add_argument("--check", choices=ENVIRONMENTS, help=argparse.SUPPRESS)  # in an environment of TRL's
    args = parser.parse_args()
    if args.check:
        return run_checks(args.check, args.folder)
    from benchmarks.opens_elsewhere import make_environment

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_cases(args.load_from, folder)
        rows = []
        for environment, packages in ENVIRONMENTS.items():
            python = make_environment(folder / "environments" / environment.replace(" ", "_"), packages)
            if python is None:
                print(f"{environment} can't be installed")
                continue
            variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}
            command = [python, "-P", __file__, "--folder", folder, "--check", environment]
            done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=variables)
            rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"env')]
            if done.returncode:
                sys.exit(f"{environment}: ended with exit code {done.returncode}")
    print(f"{'':9}{'case':28}{'our loss':>12}{'TRL':>12}{'largest gradient':>18}{'largest difference':>20}")
    for row in rows:
        print(f"{row['environment']:9}{row['case']:28}{row['ours']:12.6f}{row['theirs']:12.6f}"
              f"{row['gradient']:18.5f}{row['difference']:20.1e}{'' if is_right(row) else '  NOT EQUAL'}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if rows and all(map(is_right, rows)) else 1)


if __name__ == "__main__":
    main()
