"""Every way to compute attention gives what the definition gives: softmax(Q K^T / sqrt(D)) V."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from model import attention as A
from model.generate import KVCache
from model.transformer import ModelConfig

CONFIG = ModelConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
WINDOW = ModelConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, sliding_window=3)
TWO_DOCUMENTS = [[0, 0, 0, 0, 0, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3, 3, 5, 5]]
OTHER_DOCUMENTS = [[0, 0, 0, 0, 0, 1, 1, 1, 1], [3, 3, 3, 5, 5, 5, 5, 5, 5]]


def heads(tokens=9, keys=None, batch=2):
    """q with 4 heads; k and v with 2."""
    torch.manual_seed(0)
    sizes = (4, tokens), (2, keys or tokens), (2, keys or tokens)
    return [torch.randn(batch, count, length, 8, requires_grad=True) for count, length in sizes]


def everything_before(tokens=9):
    return torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()


def assert_same(ours, exact, inputs):
    """The results and their gradients are the same."""
    torch.testing.assert_close(ours, exact)
    weight = torch.randn_like(exact)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), inputs),
                    torch.autograd.grad((exact * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_definition_by_hand():
    """Three tokens, one head of two numbers: the second token sees two keys, the third all three."""
    q = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]])
    k, v = torch.tensor([[[[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]]]]), torch.tensor([[[[1.0], [10.0], [100.0]]]])
    y = A.plain_attention(q, k, v, everything_before(3)).flatten().tolist()
    assert y[0] == 1.0  # the first token sees itself alone
    assert y[1] == pytest.approx((1 + 10) / 2)  # both keys give 2 / sqrt(2)
    e = [math.exp(score / math.sqrt(2)) for score in (2, 1, 2)]
    assert y[2] == pytest.approx((e[0] * 1 + e[1] * 10 + e[2] * 100) / sum(e))


def test_neighbouring_query_heads_share_a_key_value_head():
    q, k, v = heads()
    y = A.plain_attention(q, k, v, everything_before())
    for head, shared in enumerate((0, 0, 1, 1)):
        alone = A.plain_attention(q[:, [head]], k[:, [shared]], v[:, [shared]], everything_before())
        torch.testing.assert_close(y[:, [head]], alone)


@pytest.mark.parametrize("config", [CONFIG, WINDOW])
@pytest.mark.parametrize("documents", [None, TWO_DOCUMENTS])
def test_the_ordinary_way(config, documents):
    inputs, ids = heads(), torch.zeros(2, 9, dtype=torch.long)
    documents = None if documents is None else torch.tensor(documents)
    visible = A.visible_keys(config.sliding_window, ids, documents)
    exact = A.plain_attention(*inputs, everything_before() if visible is None else visible)
    assert_same(A.attention(*inputs, A.AttentionMask(visible)), exact, inputs)


@pytest.mark.parametrize("documents, config, first", [
    (None, CONFIG, [0, 0, 0]), (TWO_DOCUMENTS, CONFIG, [0, 0, 5]), (OTHER_DOCUMENTS, CONFIG, [0, 0, 3]),
    (None, WINDOW, [0, 2, 6])])
def test_blocks_of_queries(monkeypatch, documents, config, first):
    monkeypatch.setattr(A, "QUERIES_PER_BLOCK", 4)
    inputs, ids = heads(), torch.zeros(2, 9, dtype=torch.long)
    documents = None if documents is None else torch.tensor(documents)
    visible = A.visible_keys(config.sliding_window, ids, documents)
    blocks = A.causal_blocks(config, visible, 2, 9, torch.float32)
    exact = A.plain_attention(*inputs, everything_before() if visible is None else visible)
    assert_same(A.attention(*inputs, A.AttentionMask(visible, blocks)), exact, inputs)
    assert [keys.start for keys, _ in blocks] == first  # keys that no query of a block sees are left out


@pytest.mark.parametrize("start", [None, torch.tensor([0, 3])])
@pytest.mark.parametrize("config", [CONFIG, WINDOW])
def test_one_new_token_over_a_cache(start, config):
    inputs, cache = heads(tokens=1, keys=9), KVCache(config, 2, 12, start=start)
    cache.length = 8
    ids = torch.zeros(2, 1, dtype=torch.long)
    mask = A.make_mask(config, config.sliding_window, ids, None, cache, torch.float32)
    assert mask.blocks is not None
    visible = torch.ones(1, 1, 1, 9, dtype=torch.bool) if mask.visible is None else mask.visible
    for way in (mask, A.AttentionMask(mask.visible)):
        assert_same(A.attention(*inputs, way), A.plain_attention(*inputs, visible), inputs)


@pytest.mark.parametrize("documents", [None, TWO_DOCUMENTS])
def test_repeated_heads_for_cuda(documents, monkeypatch):
    """The way of a GPU, taken on a CPU: each query head with a copy of its keys and values."""
    inputs, ids = heads(), torch.zeros(2, 9, dtype=torch.long)
    visible = A.visible_keys(None, ids, None if documents is None else torch.tensor(documents))
    asked, pytorchs = [], F.scaled_dot_product_attention

    def watch(q, k, v, *rest, enable_gqa, **named):
        asked.append((q.size(1), k.size(1), v.size(1), enable_gqa))
        return pytorchs(q, k, v, *rest, enable_gqa=enable_gqa, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    exact = A.plain_attention(*inputs, everything_before() if visible is None else visible)
    assert_same(A.attention(*inputs, A.AttentionMask(visible)), exact, inputs)
    assert asked == [(4, 4, 4, False)]


def test_which_way_is_taken():
    """On a CPU: blocks for training in half precision, and for one new token over a cache."""
    ids, cache = torch.zeros(2, 9, dtype=torch.long), KVCache(CONFIG, 2, 12)
    assert A.make_mask(CONFIG, None, ids, None, None, torch.bfloat16).blocks is not None
    assert A.make_mask(CONFIG, None, ids, None, None, torch.float32).blocks is None
    with torch.no_grad():
        assert A.make_mask(CONFIG, None, ids, None, None, torch.bfloat16).blocks is None
    assert A.make_mask(CONFIG, None, ids[:, :3], None, cache, torch.bfloat16).blocks is None
    assert A.make_mask(CONFIG, None, ids[:, :1], None, cache, torch.float32).blocks is not None
    long = torch.zeros(1, A.MAX_BLOCKED_TOKENS + 1, dtype=torch.long)
    assert A.make_mask(CONFIG, None, long, None, None, torch.bfloat16).blocks is None


# --- flex_attention: PyTorch computes no gradient of it on a CPU, so benchmarks/gpu.py compares those -------


FLEX = ModelConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


def long_documents():
    """Two rows of 300 tokens: one of three documents and padding, one of a single document."""
    return torch.tensor([[0] * 100 + [1] * 7 + [2] * 150 + [-1] * 43, [0] * 300])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("documents", [None, long_documents()])
def test_flex_attention_of_a_gpu(window, documents):
    from torch.nn.attention.flex_attention import create_mask

    ids = torch.zeros(2, 300, dtype=torch.long)
    mask = A.flex_mask(window, ids, documents)
    visible = A.visible_keys(window, ids, documents)
    visible = everything_before(300) if visible is None else visible
    said = create_mask(mask.mask_mod, 2, 1, 300, 300, device="cpu")
    assert torch.equal(said, visible.expand(2, -1, -1, -1))
    with torch.no_grad():
        inputs = [x.repeat(1, 1, 1, 2) for x in heads(tokens=300)]  # heads of 16 numbers
        found = A.attention(*inputs, A.AttentionMask(None, flex=mask))
        torch.testing.assert_close(found, A.plain_attention(*inputs, visible))


def test_a_compiled_model_has_flex_attention_in_its_one_graph():
    def packed(documents, *inputs):
        mask = A.flex_mask(None, torch.zeros(2, 300, dtype=torch.long), documents)
        return A.attention(*inputs, A.AttentionMask(None, flex=mask))

    with torch.no_grad():
        inputs = [x.repeat(1, 1, 1, 2) for x in heads(tokens=300)]
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        exact = A.plain_attention(*inputs, A.visible_keys(None, torch.zeros(2, 300), long_documents()))
        torch.testing.assert_close(compiled(long_documents(), *inputs), exact)


def test_rows_of_all_lengths_share_a_kernel(monkeypatch):
    """PyTorch compiles a function eight times at most. This backend compiles nothing and counts."""
    compilations, of_pytorch = [], torch.compile

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(of_pytorch, backend=backend))
    kernel = A.flex_kernel.__wrapped__(torch.device("cpu"))
    compilations.clear()
    for rows, length in ((2, 300), (2, 290), (2, 511), (1, 300), (2, 384), (3, 400), (4, 256), (1, 257)):
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = A.flex_mask(None, ids, torch.arange(length).expand(rows, -1) // 100)
        with torch.no_grad():
            inputs = [x.repeat(1, 1, 1, 2) for x in heads(length, batch=rows)]
            kernel(*inputs, block_mask=mask, enable_gqa=True)
    assert len(compilations) <= 3  # two rows, one row, any number of rows; as many again without gradients


def test_blocks_between_two_documents_are_skipped():
    documents = torch.tensor([[0] * 512 + [1] * 512])
    mask = A.flex_mask(None, torch.zeros(1, 1024, dtype=torch.long), documents)
    # Of 8 x 8 blocks a causal mask needs 36, two documents of 4 blocks need 10 each.
    assert mask.sparsity() == pytest.approx(100 * (1 - 20 / 64))


def test_when_a_gpu_takes_flex_attention(monkeypatch):
    ids, documents = torch.zeros(1, A.MIN_FLEX_TOKENS, dtype=torch.long), object()
    cache, half = KVCache(FLEX, 1, 12), torch.bfloat16
    assert not A.takes_flex(FLEX, None, ids, documents, None, half)  # on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(A, "flex_kernel", lambda device: "a kernel")
    assert A.takes_flex(FLEX, None, ids, documents, None, half)
    assert A.takes_flex(FLEX, 40, ids, None, None, half)
    for no in ((FLEX, None, ids, None, None, half), (FLEX, None, ids[:, :-1], documents, None, half),
               (FLEX, None, ids, documents, None, torch.float32), (FLEX, None, ids, documents, cache, half),
               (CONFIG, None, ids, documents, None, half)):  # heads of 8 are too small
        assert not A.takes_flex(*no)
    monkeypatch.setattr(A, "flex_kernel", lambda device: None)  # PyTorch cannot compile here
    assert not A.takes_flex(FLEX, None, ids, documents, None, half)


def test_a_gpu_without_a_compiler_takes_masks():
    A.flex_kernel.cache_clear()
    assert A.flex_kernel(torch.device("cuda")) is None or torch.cuda.is_available()
