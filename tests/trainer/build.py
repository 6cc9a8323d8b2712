"""What several tests of the trainer build in the same way."""

from dataset.lm_dataset import collate
from trainer.batches import Batches


class TokenSamples:
    """What Batches asks of a dataset whose loss is a mean over supervised tokens."""

    num_units = property(lambda self: self.num_targets)

    def collate(self, rows, pad_token_id) -> dict:
        return collate(self, rows, pad_token_id)


def make_batches(dataset, samples, args, pad_token_id, ranks, replayed=None) -> Batches:
    """Batches with the settings that the parsed flags `args` name."""
    return Batches(dataset, samples, ranks, batch_size=args.batch_size, max_seq_len=args.max_seq_len,
                   seed=args.seed, pad_token_id=pad_token_id, micro_batch_size=args.micro_batch_size,
                   packing=args.packing, replayed=replayed, replay=args.replay)
