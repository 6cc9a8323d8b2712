"""The network, its adapters, decoding, and the reading and writing of weights."""
