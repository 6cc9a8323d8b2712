"""Old data: what is measured is never replayed, and replayed rows are the same however a run is cut up."""

import json
import re

import numpy as np
import pytest
import torch
from build import TokenSamples, make_batches
from safetensors.torch import load_file

import trainer.loop
from common.errors import UsageError
from model.generate import generate
from trainer.args import fine_tuning_parser, parse_args
from trainer.batches import shuffled_again
from trainer.distributed import Ranks
from trainer.loop import evaluate
from trainer.losses import cross_entropy
from trainer.retention import TwoDatasets, exact_answers, hold_out, measure

ALONE = Ranks(0, 1, torch.device("cpu"))


class Samples(TokenSamples):
    """Samples whose tokens tell which they are: sample i is [tag, tag, ...] and half of it supervised."""

    def __init__(self, tags):
        self.samples = []
        for tag in tags:
            ids = torch.full((4 + tag % 5,), tag)
            self.samples.append((ids, torch.where(torch.arange(len(ids)) >= 2, ids, -100)))
        self.lengths = np.array([len(ids) for ids, _ in self.samples])
        self.num_targets = self.lengths - 2
        self.num_bytes = self.num_targets * 3

    identity = "samples in memory"

    def where(self, sample):
        return f"the sample {self.samples[sample][0][0]}"

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[range(len(self))[index]]


@pytest.fixture
def flags(tmp_path):
    def parse(packing=True, **changes):
        values = {"name": "run", "out_dir": tmp_path, "batch_size": 4, "max_seq_len": 24} | changes
        words = [str(word) for k, v in values.items() for word in (f"--{k}", v)]
        return parse_args(fine_tuning_parser("a test"), words + ([] if packing else ["--no-packing"]))

    return parse


def mixed(args, ranks=ALONE, new=range(100, 140), old=range(200, 230)):
    """Batches of 40 new samples with old ones among them, and the numbers of the old that may be."""
    old = Samples(old)
    replayed, _ = hold_out(old, args.seed)
    data = TwoDatasets(Samples(new), old)
    return make_batches(data, np.arange(len(new)), args, 3, ranks, len(new) + replayed), replayed


def rows_of(batches, numbers):
    """The rows of these batches as tuples of tokens, padding away."""
    return [tuple(t for t in row.tolist() if t != 3) for n in numbers for micro in batches[n][0]
            for row in micro["input_ids"] if (row != 3).any()]


def test_both_know_where_a_sample_came_from():
    both = TwoDatasets(Samples([5, 6, 7]), Samples([8, 9]))
    assert [both.where(i) for i in range(5)] == [f"the sample {tag}" for tag in (5, 6, 7, 8, 9)]


# --- what is held out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_measured_samples_are_never_replayed_nor_their_copies(seed):
    tags = [20 + i % 17 for i in range(60)]  # each sample three or four times
    replayed, measured = hold_out(Samples(tags), seed)
    assert sorted([*replayed, *measured]) == list(range(60))
    assert not {tags[i] for i in replayed} & {tags[i] for i in measured}
    assert len({tags[i] for i in measured}) == 3  # a fifth of 17 different ones


def test_held_out_part_depends_on_the_seed_alone():
    data = Samples(range(20, 60))
    assert np.array_equal(hold_out(data, 3)[1], hold_out(data, 3)[1])
    assert not np.array_equal(hold_out(data, 3)[1], hold_out(data, 4)[1])


def test_too_few_to_hold_out():
    with pytest.raises(UsageError, match="4 different records are too few .* at least 5"):
        hold_out(Samples([7, 7, 8, 9, 10, 10]), 0)
    assert len(hold_out(Samples([7, 8, 9, 10, 11]), 0)[1]) == 1


# --- what is replayed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("replay", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_the_asked_part_of_every_epoch_is_old(flags, packing, replay):
    args = flags(packing, replay=replay, retain_data_path="x")
    batches, replayed = mixed(args)
    new_rows, held_out = len(batches.rows), {200 + i for i in set(range(30)) - set(replayed.tolist())}
    for epoch in range(3):
        rows = rows_of(batches, range(epoch * len(batches), (epoch + 1) * len(batches)))
        old = [row for row in rows if row[0] >= 200]
        new = [row for row in rows if row[0] < 200]
        assert len(new) == new_rows and {t for row in new for t in row} == set(range(100, 140))
        assert all(t >= 200 for row in old for t in row)  # a row is old or new
        wanted = max(1, round(replay * len(rows)))
        assert len(old) == pytest.approx(wanted, abs=0.51)
        assert not held_out & {t for row in old for t in row}


def test_nothing_is_replayed_twice_before_all_is_replayed_once(flags):
    args = flags(False, replay=0.2, retain_data_path="x")
    batches, replayed = mixed(args)
    assert batches.num_old == 10 and len(replayed) == 24
    counts = dict.fromkeys((200 + replayed).tolist(), 0)
    for epoch in range(12):
        for row in rows_of(batches, range(epoch * len(batches), (epoch + 1) * len(batches))):
            if row[0] >= 200:
                counts[row[0]] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts.values()) == {5}  # 12 epochs x 10 rows = 5 x 24


@pytest.mark.parametrize("size, count", [(7, 3), (3, 7), (5, 5), (1, 4)])
def test_endless_shuffle(size, count):
    whole = shuffled_again(size, 0, 10 * count, seed=1)
    for i in range(10):
        part = shuffled_again(size, i * count, count, seed=1)
        assert np.array_equal(part, whole[i * count:(i + 1) * count])
    for i in range(10 * count // size):
        assert sorted(whole[i * size:(i + 1) * size]) == list(range(size))


@pytest.mark.parametrize("world", [2, 3])
def test_batches_are_the_same_on_any_number_of_ranks_and_after_a_resume(flags, world):
    args = flags(replay=0.3, retain_data_path="x")
    alone = mixed(args)[0]
    ranks = [mixed(args, Ranks(r, world, torch.device("cpu")))[0] for r in range(world)]
    for number in (5, 0, 2 * len(alone) + 1):  # in any order, as a resumed run asks for them
        together = sorted(row for batches in ranks for row in rows_of(batches, [number]))
        assert together == sorted(rows_of(mixed(args)[0], [number])) == sorted(rows_of(alone, [number]))
        assert len({batches[number][1:] for batches in [alone, *ranks]}) == 1  # targets and tokens


def test_without_replay_nothing_changes(flags):
    data, args = Samples(range(100, 140)), flags()
    plain = make_batches(data, np.arange(40), args, 3, ALONE)
    assert plain.num_old == 0 and len(plain) == -(-len(plain.rows) // 4)


# --- what is measured --------------------------------------------------------------------------------------


def test_exact_answers_by_hand():
    head = torch.nn.Identity()
    labels = torch.tensor([-100, -100, 7, 8, -100, -100, 5, -100, 6])
    likeliest = torch.tensor([0, 7, 8, 3, 1, 4, 9, 6, 2])  # at each place, what comes next
    hidden = torch.nn.functional.one_hot(likeliest, 10).float()
    assert exact_answers(head, hidden, labels) == (3, 2)  # [7, 8] yes, [5] no, [6] yes
    assert exact_answers(head, hidden, torch.full((9,), -100)) == (0, 0)
    longer = torch.tensor([-100] + [7] * 65)
    hidden = torch.nn.functional.one_hot(torch.full((66,), 7), 10).float()
    assert exact_answers(head, hidden, longer) == (0, 0)
    assert exact_answers(head, hidden[:65], longer[:65]) == (1, 1)


class Dialogues(Samples):
    """Two turns each. Every other answer, 40 in all, is the one that the model itself would give."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(1)

        def words(most):
            return torch.randint(4, 50, (int(torch.randint(1, most, (), generator=generator)),),
                                 generator=generator).tolist()

        self.samples, number = [], 0
        for _ in range(40):
            ids, labels = [], []
            for _ in range(2):
                ids, wrong = ids + words(6), words(6)
                labels += [-100] * (len(ids) - len(labels))
                said = [t.item() for t in generate(model, torch.tensor([ids]), len(wrong), temperature=0.0)]
                answer = said if number % 2 else wrong
                number += 1
                ids, labels = ids + answer, labels + answer
            labels[0] = -100
            self.samples.append((torch.tensor(ids), torch.tensor(labels)))
        self.lengths = np.array([len(ids) for ids, _ in self.samples])
        self.num_targets = np.array([int((labels != -100).sum()) for _, labels in self.samples])
        self.num_bytes = self.num_targets


@pytest.mark.parametrize("packing", [False, True])
def test_exact_means_what_greedy_decoding_says(make_model, flags, packing):
    model, args = make_model(50).eval(), flags(packing, dtype="float32", max_seq_len=64)
    data = Dialogues(model)
    batches = make_batches(data, np.arange(len(data)), args, 3, ALONE)
    found = measure(model.train(), None, batches, args.dtype, ALONE)["old"]
    assert model.training
    right = []
    for ids, labels in data:
        on = (labels != -100).tolist()
        for start in (i for i in range(1, len(on)) if on[i] and not on[i - 1]):
            end = next((i for i in range(start, len(on)) if not on[i]), len(on))
            said = [t.item() for t in generate(model.eval(), ids[None, :start], end - start, temperature=0.0)]
            right.append(said == ids[start:end].tolist())
    assert found["answers"] == len(right) == 80 and found["exact"] == sum(right) / 80
    assert 40 <= sum(right) < 60
    expected = evaluate(model, batches, cross_entropy, torch.float32, ALONE)["eval_loss"]
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


# --- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old(workshop):
    words = "one two three four five six seven eight nine ten".split()
    turns = [[{"role": role, "content": word} for role in ("user", "assistant")] for word in words]
    return workshop.write("old.jsonl", [{"conversations": turn} for turn in turns])


@pytest.mark.parametrize("stage", ["full_sft", "lora"])
def test_table_and_exact_resume(stage, workshop, old, tmp_path, read_log):
    flags = {"retain_data_path": [old, workshop.chats], "replay": 0.25, "max_steps": 12, "save_interval": 4}
    whole = workshop.run(stage, *workshop.flags(stage, tmp_path / "whole", **flags))
    assert whole.code == 0, whole.err
    lines = [re.split(r"\s{2,}", line.strip()) for line in whole.out.splitlines() if " data " in line]
    assert [line[0].split()[0] for line in lines] == ["new", "old"]
    log = json.loads((tmp_path / "whole" / stage / "training.json").read_text(encoding="utf-8"))
    before, after = log["retention"]["before"], log["retention"]["after"]
    assert after["new"]["loss"] == pytest.approx(log["eval_loss"], rel=1e-5) != before["new"]["loss"]
    assert before["old"]["samples"] == after["old"]["samples"] == 10  # a fifth of 10 + 41
    assert all(f"{part[name]['loss']:.4f}" in whole.out for part in (before, after) for name in part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.loop, "learning_rate_factor", interrupted_at(6))
        with pytest.raises(RuntimeError):
            workshop.run(stage, *workshop.flags(stage, tmp_path / "cut", **flags))
    cut = workshop.run(stage, *workshop.flags(stage, tmp_path / "cut", **flags), "--resume")
    assert cut.code == 0 and "resumed at step 4" in cut.out
    ours, theirs = (load_file(next((tmp_path / n / stage).glob("*.safetensors"))) for n in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = json.loads((tmp_path / "cut" / stage / "training.json").read_text(encoding="utf-8"))
    assert again["retention"] == log["retention"]  # "before" is that of the weights it began with
    assert read_log(tmp_path / "cut" / stage) == read_log(tmp_path / "whole" / stage)


def test_other_old_data_is_noticed_even_where_none_is_replayed(workshop, old, tmp_path):
    changing = workshop.write("changing.jsonl", [json.loads(line) for line in old.read_text().splitlines()])
    flags = workshop.flags("lora", tmp_path, retain_data_path=[changing], max_steps=12, save_interval=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.loop, "learning_rate_factor", interrupted_at(6))
        with pytest.raises(RuntimeError):
            workshop.run("lora", *flags)
    changing.write_text("".join(old.read_text().splitlines(keepends=True)[:8]))
    ended = workshop.run("lora", *flags, "--resume")
    assert ended.code == 2
    assert re.search("and old data of 10 samples .* not .* and old data of 8 samples", ended.error)


def interrupted_at(number):
    real = trainer.loop.learning_rate_factor

    def factor(step, *rest):
        if step == number:
            raise RuntimeError("cut off")
        return real(step, *rest)

    return factor


def test_flags_that_cannot_be_honoured(workshop, old, tmp_path):
    def complaint(**changes):
        ended = workshop.run("lora", *workshop.flags("lora", tmp_path, **changes))
        assert ended.code == 2 and not list(tmp_path.iterdir())
        return ended.error

    assert "--replay needs --retain_data_path" in complaint(replay=0.1)
    assert "--replay must be a part of the whole" in complaint(replay=1, retain_data_path=old)
    assert "nowhere.jsonl" in complaint(retain_data_path="nowhere.jsonl")
    few = workshop.write("few.jsonl", [json.loads(line) for line in old.read_text().splitlines()[:3]])
    assert "3 different records are too few" in complaint(retain_data_path=few)
    assert "--eval_fraction has no effect" in complaint(eval_data_path=workshop.chats)
    assert "--wandb_project has no effect" in complaint(wandb_project="mine")
    assert "--lora_plus_ratio must be above 0" in complaint(lora_plus_ratio=0)
    assert "--lora_plus_ratio must be above 0" in complaint(lora_plus_ratio="nan")
