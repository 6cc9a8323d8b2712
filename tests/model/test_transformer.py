"""The network against transformers' own, and the equalities that hold whatever its weights are."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from common.errors import ModelError
from model import attention, transformer
from model.generate import KVCache
from model.quantize import count_parameters
from model.transformer import PRESETS, CausalLM, ModelConfig, preset


def small(seed=0, **changes) -> CausalLM:
    """A tiny model in eval mode, its norms and biases random too, so that none of them can be forgotten."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 97}
    model = CausalLM(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(rows=2, length=12):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(model) -> dict:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(left: dict, right: dict, tolerance=1e-5):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)


def qwen3_twin(model):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config
    twin = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim, intermediate_size=c.intermediate_size, rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings, rope_theta=c.rope_theta)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


# --- shape ---


@pytest.mark.parametrize(("name", "count"), [("26m", 25_829_888), ("64m", 63_912_192), ("104m", 104_030_976)])
def test_presets_have_the_published_sizes(name, count):
    with torch.device("meta"):
        assert count_parameters(CausalLM(preset(name))) == count


def test_unknown_preset_names_those_there_are():
    with pytest.raises(ModelError, match="micro, tiny, 26m, 64m, 104m"):
        preset("27m")
    assert preset("tiny") is PRESETS["tiny"]


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_size": 30}, "multiple of num_attention_heads"),
    ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
    ({"head_dim": 7}, "even"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"qk_norm": True, "attention_bias": True}, "choose one"),
    ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
])
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(ModelError, match=words):
        ModelConfig(**{"hidden_size": 32, "num_attention_heads": 4} | change)


def test_residual_writers_start_smaller():
    model = CausalLM(ModelConfig(hidden_size=256, num_hidden_layers=8, intermediate_size=512))
    block = model.model.layers[3]
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_copies_and_pickles_stay_tied():
    model = small()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
        assert torch.equal(twin(tokens()).logits, model(tokens()).logits)


# --- loss ---


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_transformers(tied):
    model = small(qk_norm=True, tie_word_embeddings=tied)
    twin = qwen3_twin(model)
    ids = tokens()
    labels = ids.clone()
    labels[0, :5] = labels[1, 8:] = -100
    ours, theirs = model(ids, labels), twin(ids, labels=labels)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert ours.num_targets == 7 + 7  # row 1 starts supervised, but nothing predicts its first token
    torch.testing.assert_close(ours.token_losses.sum() / ours.num_targets, ours.loss)
    ours.loss.backward()
    theirs.loss.backward()
    assert_same(gradients(model), gradients(twin))


def test_loss_is_the_same_in_chunks(monkeypatch):
    model, ids = small(), tokens()
    whole = model(ids, ids)
    whole.loss.backward()
    expected = gradients(model)
    monkeypatch.setattr(transformer, "LOSS_ROWS", 5)
    chunked = model(ids, ids)
    chunked.loss.backward()
    torch.testing.assert_close(chunked.loss, whole.loss)
    assert_same(gradients(model), expected)


def test_many_logits_are_computed_again_on_a_gpu(monkeypatch):
    """The same losses and gradients, to the bit, though the backward pass is given no logits."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as there, all tokens go to the head
    monkeypatch.setattr(transformer, "LOSS_ROWS", 5)

    def step(limit):
        """Shapes of what is kept for the backward pass, losses and gradients."""
        monkeypatch.setattr(transformer, "MAX_KEPT_LOGITS", limit)
        model, ids, shapes = small(), tokens(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x,
                                                      lambda x: x):
            output = model(ids, ids)
        output.loss.backward()
        return shapes, output.token_losses.detach(), gradients(model)

    kept, losses, expected = step(transformer.MAX_KEPT_LOGITS)
    kept_again, losses_again, again = step(0)
    logits = (5, small().config.vocab_size)
    assert logits in kept and logits not in kept_again
    assert torch.equal(losses, losses_again)
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_the_norm_of_a_gpu(monkeypatch):
    """PyTorch's own function, which a GPU takes, has the same result and gradients as the one by hand."""
    x, norm = torch.randn(3, 5, 32), transformer.RMSNorm(32, 1e-6)
    torch.nn.init.normal_(norm.weight)
    found = []
    for is_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
        x.requires_grad_().grad = norm.weight.grad = None
        y = norm(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, norm.weight.grad))
    for by_hand, of_pytorch in zip(*found, strict=True):
        torch.testing.assert_close(by_hand, of_pytorch)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [1, 12])
def test_no_target_is_loss_zero_and_zero_gradients(tied, length):
    model, ids = small(tie_word_embeddings=tied), tokens(length=length)
    output = model(ids, torch.full_like(ids, -100))
    assert output.loss.item() == 0 and output.token_losses.eq(0).all() and output.num_targets.item() == 0
    output.loss.backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()  # DDP waits for every one of them
    assert all(gradient.eq(0).all() for gradient in found.values())


def test_without_labels_there_is_no_loss():
    assert small()(tokens()).loss is None


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("targets", [1, 9])
def test_loss_by_hand(everywhere, targets, monkeypatch):
    """Every token can be a target, also 98 to 102; on a CPU, and (everywhere) as compiled and on a GPU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: everywhere)
    model, ids = small(vocab_size=128), torch.arange(94, 104)[None]
    labels = torch.full_like(ids, -100)
    labels[:, 1:1 + targets] = ids[:, 1:1 + targets]
    output = model(ids, labels)
    logs = output.logits[0].log_softmax(-1)
    by_hand = -sum(logs[t - 1, ids[0, t]] for t in range(1, 1 + targets))
    torch.testing.assert_close(output.token_losses.sum(), by_hand)
    torch.testing.assert_close(output.loss, by_hand / targets)
    assert output.num_targets == targets


def test_first_label_is_never_learnt():
    model, ids = small(), tokens()
    labels = ids.clone()
    labels[:, 0] = -100
    assert torch.equal(model(ids, ids).loss, model(ids, labels).loss)


# --- positions and masks ---


def seen(mask):
    return mask.squeeze(1).int().tolist()


def positions_and_visible(config, ids, document_ids=None, cache=None):
    positions = transformer.token_positions(ids, document_ids, cache)
    return positions, attention.visible_keys(config.sliding_window, ids, document_ids, cache)


def test_positions_and_masks_of_packed_documents():
    ids = torch.zeros(1, 5, dtype=torch.long)
    positions, mask = positions_and_visible(small().config, ids, torch.tensor([[7, 7, 7, 9, 9]]))
    assert positions.tolist() == [[0, 1, 2, 0, 1]]
    sevens = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert seen(mask) == [[*sevens, [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]]


def test_positions_and_masks_with_a_window():
    ids = torch.zeros(1, 4, dtype=torch.long)
    positions, mask = positions_and_visible(small(sliding_window=2).config, ids)
    assert positions.tolist() == [[0, 1, 2, 3]]
    assert seen(mask) == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]]


def test_positions_and_masks_over_a_cache():
    config, ids = small().config, torch.zeros(2, 4, dtype=torch.long)
    padded = KVCache(config, 2, 9, start=torch.tensor([0, 2]))
    positions, mask = positions_and_visible(config, ids, cache=padded)
    assert positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    whole = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    pads = [[1, 0, 0, 0], [0, 1, 0, 0]]  # each sees itself
    assert seen(mask) == [whole, [*pads, [0, 0, 1, 0], [0, 0, 1, 1]]]

    cache = KVCache(config, 2, 9, dtype=torch.bfloat16)
    assert {cache.k.dtype, cache.v.dtype} == {torch.bfloat16}
    for past, new, expected in ((0, 4, None), (3, 1, None), (3, 2, [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]])):
        cache.length = past
        positions, mask = positions_and_visible(config, ids[:, :new], cache=cache)
        assert positions.tolist() == [list(range(past, past + new))]
        assert mask is None if expected is None else seen(mask) == expected


# --- packing ---


@pytest.mark.parametrize("windows", [{}, {"sliding_window": 3, "full_attention_every": 2}])
def test_packed_documents_equal_documents_alone(windows):
    model = small(qk_norm=True, **windows)
    ids = tokens()
    document_ids = torch.tensor([[3] * 5 + [8] * 4 + [-1] * 3, [0] + [1] * 11])
    packed = model(ids, document_ids=document_ids).logits
    for row, start, end in ((0, 0, 5), (0, 5, 9), (0, 9, 12), (1, 0, 1), (1, 1, 12)):
        alone = model(ids[row:row + 1, start:end]).logits[0]
        torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-5, atol=1e-5)


def test_packed_gradients_equal_the_sum_of_documents_alone():
    model, ids = small(), tokens(1)
    labels = ids.clone()
    labels[0, 7] = -100  # the first token of the second document: its neighbour must not predict it
    output = model(ids, labels, document_ids=torch.tensor([[0] * 7 + [1] * 5]))
    output.token_losses.sum().backward()
    packed = gradients(model)
    for piece in (ids[:, :7], ids[:, 7:]):
        model(piece, piece).token_losses.sum().backward()
    assert_same(packed, gradients(model))


@pytest.mark.parametrize("packed", [False, True])
def test_cuda_is_not_asked_for_groups_that_its_kernels_lack(packed, monkeypatch):
    """The branch for a GPU, taken on a CPU: each query head with a copy of its keys and values."""
    model, ids = small(), tokens(3, 20)
    document_ids = torch.tensor([0] * 13 + [1] * 7).expand(3, 20) if packed else None
    expected = model(ids, document_ids=document_ids).logits
    pytorchs, heads = F.scaled_dot_product_attention, []

    def look(q, k, v, *rest, enable_gqa, **named):
        heads.append((q.size(1), k.size(1), v.size(1), enable_gqa))
        return pytorchs(q, k, v, *rest, enable_gqa=enable_gqa, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(model(ids, document_ids=document_ids).logits, expected)
    assert heads == [(4, 4, 4, False)] * 2
    if not packed:  # half precision has flash attention, which knows groups
        with torch.no_grad():
            model.bfloat16()(ids)
        assert heads[2:] == [(4, 2, 2, True)] * 2


@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_on_a_cpu_gives_the_same_training(packed):
    """`block_attention`, which only half precision takes, against PyTorch's own."""
    model = small().train()
    ids = tokens(3, 20)
    document_ids = torch.tensor([0] * 13 + [1] * 7).expand(3, 20) if packed else None
    model(ids, ids, document_ids).loss.backward()
    exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids, document_ids).loss
    loss.backward()
    for name, rough in gradients(model).items():
        assert F.cosine_similarity(rough.flatten(), exact[name].flatten(), dim=0) > 0.99, name


def test_norms_are_exact_under_autocast():
    """Rounded once, when they leave: what is summed in bfloat16 on the way would be off in every row."""
    norm, x = transformer.RMSNorm(512, 1e-6), torch.randn(64, 512)
    exact = F.rms_norm(x.double(), (512,), eps=1e-6)
    for training in (True, False):
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
        assert y.dtype == torch.bfloat16 and (y == exact.bfloat16()).float().mean() > 0.999


def test_logits_asked_for_outside_of_autocast():
    model, ids = small(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids)
    torch.testing.assert_close(output.logits, model(ids).logits, rtol=0.1, atol=0.1)


# --- cache ---


@pytest.mark.parametrize(("window", "every"), [(None, None), (4, None), (4, 2)])
@pytest.mark.parametrize("steps", [(12,), (1,) * 12, (5, 1, 3, 3), (1, 11)])
def test_cache_gives_the_logits_of_one_pass(steps, window, every):
    model, ids = small(sliding_window=window, full_attention_every=every), tokens()
    cache, pieces = KVCache(model.config, 2, 12), ids.split(steps, dim=1)
    with torch.no_grad():
        cached = torch.cat([model(piece, cache=cache).logits for piece in pieces], dim=1)
        torch.testing.assert_close(cached, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert cache.length == 12


@pytest.mark.parametrize("steps", [(12,), (8, 4), (5, 1, 3, 3)])
def test_left_padding_changes_nothing(steps):
    model, ids, pads = small(), tokens(3), torch.tensor([0, 3, 7])
    cache = KVCache(model.config, 3, 12, start=pads)
    with torch.no_grad():
        padded = torch.cat([model(piece, cache=cache).logits for piece in ids.split(steps, dim=1)], dim=1)
        assert padded.isfinite().all()
        for row, pad in enumerate(pads.tolist()):
            alone = model(ids[row:row + 1, pad:]).logits[0]
            torch.testing.assert_close(padded[row, pad:], alone, rtol=1e-5, atol=1e-5)


def test_cache_says_when_it_is_full_or_misused():
    model, ids = small(), tokens()
    with pytest.raises(ModelError, match="holds 8 tokens, too few for 12"):
        model(ids, cache=KVCache(model.config, 2, 8))
    with pytest.raises(ModelError, match="document_ids"):
        model(ids, document_ids=torch.zeros_like(ids), cache=KVCache(model.config, 2, 12))


# --- how it runs ---


@pytest.mark.parametrize("wanted, training, cached, times", [
    (True, True, False, 2), (False, True, False, 1), (True, False, False, 1), (True, True, True, 1)])
def test_blocks_run_twice_only_where_it_was_asked_for(wanted, training, cached, times, monkeypatch):
    model, calls = small(num_hidden_layers=1).train(training), []
    model.gradient_checkpointing = wanted
    forward = transformer.Block.forward
    monkeypatch.setattr(transformer.Block, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    cache = KVCache(model.config, 2, 12, dtype=torch.float32) if cached else None
    loss = model(tokens(), tokens(), cache=cache).loss
    if cached:  # for decoding: there is no way back through what is written in place
        assert cache.k[0].any()
    else:
        loss.backward()
    assert len(calls) == times


def test_gradient_checkpointing_gives_equal_gradients():
    model, ids = small(qk_norm=True).train(), tokens()
    model(ids, ids).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing = True
    model(ids, ids).loss.backward()
    assert_same(gradients(model), expected)


def test_gradient_checkpointing_reaches_a_layer_over_a_frozen_base():
    model, ids = small().train().requires_grad_(False), tokens()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.gradient_checkpointing = True
    model(ids, ids).loss.backward()
    assert gradients(model)["model.layers.0.mlp.up_proj.weight"].abs().sum() > 0


@pytest.mark.parametrize("autocast, packed, keeps_logits", [
    (False, False, True), (False, True, False), (True, False, False), (True, True, True)])
def test_compiles_to_one_graph(autocast, packed, keeps_logits, monkeypatch):
    torch._dynamo.reset()
    if not keeps_logits:
        monkeypatch.setattr(transformer, "MAX_KEPT_LOGITS", 0)
    model, ids = small(qk_norm=True).train(), tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    document_ids = torch.tensor([0] * 5 + [1] * 7).expand(2, 12) if packed else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = run(ids, labels, document_ids)
        output.loss.backward()
        results.append(gradients(model) | {"loss": output.loss.detach(), "n": output.num_targets})
    assert_same(*results, tolerance=2e-2 if autocast else 1e-5)


def test_positions_survive_bfloat16_weights():
    """Rotary tables are made in float32, so casting the model must not blur positions beyond 256."""
    model = small().to(torch.bfloat16)
    positions = torch.arange(1000, 1012)[None]
    cos, _ = transformer.rope_tables(model.config, positions, torch.float32)
    assert torch.equal(cos, transformer.rope_tables(small().config, positions, torch.float32)[0])
    assert model(tokens()).logits.dtype == torch.bfloat16
