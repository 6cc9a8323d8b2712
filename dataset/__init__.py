"""From files on disk to token ids: records, the prompt format, datasets, packing and the embedded world."""
