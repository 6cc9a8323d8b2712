"""The network, its adapters, decoding, and reading and writing of weights; imports nothing of ours from elsewhere."""
