"""Experts: transformers' classes and a naive loop over tokens give the same; what the router must pay."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from common.errors import ModelError
from model.adapters import Adapters
from model.generate import generate
from model.gguf import gguf_name, write_model
from model.int8 import quantize_int8
from model.lora import (
    apply_lora,
    cast_frozen,
    freeze_all_but_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    save_lora,
    unmerge_lora,
)
from model.moe import Reorder, routing_sums
from model.one_token import prepare_to_decode
from model.quantize import dequantize_model, quantize_model
from model.transformer import PRESETS, CausalLM, ModelConfig
from model.weights import load_model, load_tokenizer, save_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, intermediate_size=48, max_position_embeddings=64)
OURS = dict(SHAPE, qk_norm=True, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
            rope_theta=1e4, initializer_range=0.2)
IDS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))
FOREIGN = {
    "qwen": {}, "qwen, normalised": {"norm_topk_prob": True}, "qwen, top 1": {"num_experts_per_tok": 1},
    "qwen, some layers": {"mlp_only_layers": [0]}, "qwen, every second": {"decoder_sparse_step": 2},
    "qwen, window": {"use_sliding_window": True, "sliding_window": 4},
    "mixtral": {}, "mixtral, window": {"sliding_window": 4}}


def ours(seed=0, **changes) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(ModelConfig(**{**OURS, **changes})).eval()


def theirs(name: str):
    torch.manual_seed(0)
    shape = SHAPE | {"num_experts_per_tok": 2, "head_dim": 16, "initializer_range": 0.2} | FOREIGN[name]
    if name.startswith("qwen"):
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_experts=4, moe_intermediate_size=24)).eval()
    return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4)).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def distance(a, b) -> float:
    return (a - b).abs().max().item()


def opened(path):
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, trust_remote_code=False).eval()


# --- what a mixture computes --------------------------------------------------------------------------------


def by_token(layer, x):
    """The formula of MixtureOfExperts, one token after the other."""
    y = torch.zeros_like(x)
    for row, place in torch.cartesian_prod(torch.arange(x.size(0)), torch.arange(x.size(1))).tolist():
        token = x[row, place]
        p = F.softmax(layer.gate.weight @ token, dim=0)
        best = p.argsort(descending=True)[:layer.experts_per_token]
        total = p[best].sum() if layer.normalise else 1.0
        for expert in best.tolist():
            y[row, place] += p[expert] / total * layer.experts[expert](token)
    return y


@pytest.mark.parametrize("changes", [
    {}, {"num_experts_per_tok": 1}, {"norm_topk_prob": True}, {"num_experts_per_tok": 4},
    {"num_experts": 9, "num_experts_per_tok": 3}], ids=str)
def test_it_equals_a_loop_over_tokens_gradients_included(changes):
    layer = ours(**changes).model.layers[1].mlp
    x = torch.randn(2, 5, 32, requires_grad=True)
    y, scores = layer(x)
    assert scores.shape == (2, 5, layer.gate.weight.size(0)) and scores.dtype == torch.float32
    found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    expected = by_token(layer, x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()], allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-4, rtol=1e-4)


def test_an_expert_without_a_token_gets_a_gradient_of_zeros():
    layer = ours(num_experts_per_tok=1).model.layers[0].mlp
    layer.gate.weight.data.zero_()
    layer.gate.weight.data[2] = 1.0
    y, _ = layer(torch.rand(2, 5, 32))  # all positive: everything goes to expert 2
    y.sum().backward()
    for number, expert in enumerate(layer.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None and parameter.grad.any() == (number == 2)


def test_grouped_products_are_those_of_one_expert_after_the_other():
    """In bfloat16, as a GPU computes them; here on a CPU. One of the experts has no token."""
    layer = ours(hidden_size=64).model.layers[0].mlp
    counts, rows = torch.tensor([3, 0, 8, 5]), torch.randn(16, 64)
    found = []
    for way in (layer.grouped, layer.one_by_one):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = way(rows, counts)
        y.float().square().sum().backward()
        found.append([y, *(parameter.grad for expert in layer.experts for parameter in expert.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    assert not layer.can_group(rows)  # not on a CPU, where it would be slower


def test_reorder_has_the_gradient_of_indexing():
    rows, order = torch.randn(6, 3, dtype=torch.double, requires_grad=True), torch.randperm(6)
    assert torch.equal(Reorder.apply(rows, order, order.argsort()), rows[order])
    assert torch.autograd.gradcheck(lambda x: Reorder.apply(x, order, order.argsort()), rows)


@pytest.mark.parametrize("changes", [{"num_experts_per_tok": 1}, {}, {"norm_topk_prob": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_the_text_teaches_every_router_from_the_first_step(changes, checkpointing, coefficient):
    """The gradient of the loss of tokens alone, without what balancing asks for."""
    model = ours(**changes, router_aux_loss_coef=coefficient, initializer_range=0.02).train()
    model.gradient_checkpointing = checkpointing
    model(IDS, labels=IDS).loss.backward()
    for block in model.model.layers:
        assert block.mlp.gate.weight.grad.norm() > 1e-6


def test_top_1_with_normalised_gates_teaches_the_router_nothing():
    """Why train_pretrain.py refuses it: MiniMind's experts are set up so (its issue 858)."""
    model = ours(num_experts_per_tok=1, norm_topk_prob=True).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(block.mlp.gate.weight.grad.norm() < 1e-6 for block in model.model.layers)


def test_checkpointing_autocast_copies_and_a_cache_change_nothing():
    model = ours().train()
    model(IDS, labels=IDS).loss.backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    other.gradient_checkpointing = True
    output = other(IDS, labels=IDS)
    (output.loss + 0 * output.routing[0]).backward()
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS, labels=IDS)
    assert output.loss.item() == pytest.approx(model(IDS, labels=IDS).loss.item(), rel=0.05)
    rows = torch.stack(list(generate(model.eval(), IDS, 8, temperature=0)), dim=1)
    expected = IDS
    for _ in range(8):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(rows, expected[:, -8:])


@pytest.mark.parametrize("quantize", [None, quantize_int8])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_fast_way_to_decode_uses_the_same_experts(quantize, rows):
    plain, fast = (ours(hidden_size=64, moe_intermediate_size=96) for _ in range(2))
    for model in (plain, fast):
        if quantize:
            quantize(model)
    prepare_to_decode(fast)
    assert fast.one_token is not None
    prompts = IDS[:rows]
    steps = [torch.stack(list(generate(model, prompts, 12, temperature=0))) for model in (plain, fast)]
    assert torch.equal(*steps)


# --- what a router must pay ---------------------------------------------------------------------------------


def naive_sums(config, scores, labels, document_ids) -> dict:
    """The definitions in the docstring of routing_sums, one document after the other."""
    balance = entropy = z = 0.0
    load = torch.zeros(len(scores), config.num_experts)
    for row in range(len(labels)):
        for document in document_ids[row].unique().tolist():
            places = (document_ids[row] == document).nonzero().flatten()
            targets = [place.item() for place in places[1:] if labels[row, place] != -100]
            if not targets:
                continue
            tokens = torch.arange(places[0].item(), max(targets))
            for layer, of_layer in enumerate(scores):
                p = F.softmax(of_layer[row, tokens], dim=-1)
                chosen = p.topk(config.num_experts_per_tok).indices
                f = F.one_hot(chosen, config.num_experts).sum((0, 1)) / chosen.numel()
                balance += len(targets) * config.num_experts * (f * p.mean(0)).sum() / len(scores)
                entropy += len(targets) * -(p * p.log()).sum(-1).mean() / len(scores)
                z += len(targets) * of_layer[row, tokens].logsumexp(-1).square().mean() / len(scores)
                load[layer] += len(targets) * f
    penalty = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
    return {"penalty": penalty, "balance": balance, "router_entropy": entropy, "router_load": load}


def some_labels():
    """(labels, document_ids): documents of all kinds, one without a label, and padding."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.where(torch.rand(3, 12, generator=generator) < 0.5, 7, -100)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] * 3 + [1] * 6 + [-1] * 3])
    labels[2, :3] = labels[2, 9:] = -100
    return labels, documents


def test_sums_by_their_definition():
    labels, documents = some_labels()
    config = ModelConfig(**OURS)
    scores = torch.randn(2, 3, 12, 4, requires_grad=True)
    penalty, sums = routing_sums(config, scores, labels, documents)
    for name, value in naive_sums(config, scores, labels, documents).items():
        torch.testing.assert_close({"penalty": penalty, **sums}[name], value.detach() if name != "penalty"
                                   else value, atol=1e-5, rtol=1e-5, msg=name)
    gradient, = torch.autograd.grad(penalty, scores)
    naive, = torch.autograd.grad(naive_sums(config, scores, labels, documents)["penalty"], scores)
    torch.testing.assert_close(gradient, naive, atol=1e-6, rtol=1e-5)


def test_a_document_pays_the_same_alone_padded_or_packed_and_sums_add_up():
    labels, documents = some_labels()
    config, scores = ModelConfig(**OURS), torch.randn(2, 3, 12, 4)
    whole = routing_sums(config, scores, labels, documents)
    total, sums = torch.zeros(()), {}
    for row in range(3):
        for document in documents[row].unique().tolist():
            places = (documents[row] == document).nonzero().flatten()
            alone, its_labels = scores[:, row:row + 1, places], labels[row, places].clone()[None]
            its_labels[0, 0] = -100
            padded = F.pad(alone, (0, 0, 0, 4), value=3.0), F.pad(its_labels, (0, 4), value=-100)
            of_document = routing_sums(config, *padded)
            total = total + of_document[0]
            sums = {name: value + sums.get(name, 0) for name, value in of_document[1].items()}
            torch.testing.assert_close(of_document[0], routing_sums(config, alone, its_labels)[0])
    torch.testing.assert_close(whole[0], total)
    for name, value in whole[1].items():
        torch.testing.assert_close(value, sums[name], msg=name)


def test_the_limits_of_balance_and_entropy():
    config = replace(ModelConfig(**OURS), num_experts_per_tok=1, router_z_loss_coef=0.0)
    labels = torch.full((1, 9), 5)
    even = torch.eye(4).repeat(2, 1)[None, None] * 30  # 8 tokens, each sure of its expert, two for each
    even = F.pad(even, (0, 0, 0, 1))
    penalty, sums = routing_sums(config, even, labels)
    assert sums["balance"].item() == pytest.approx(8) and sums["router_entropy"].item() < 1e-6
    assert sums["router_load"].tolist() == [[2.0] * 4] and penalty.item() == pytest.approx(8 * 0.01)
    same = torch.zeros(1, 1, 9, 4)
    same[..., 2] = 30
    assert routing_sums(config, same, labels)[1]["balance"].item() == pytest.approx(8 * 4)
    unsure = routing_sums(config, torch.zeros(1, 1, 9, 4), labels)[1]
    assert unsure["router_entropy"].item() == pytest.approx(8 * math.log(4))


def test_validation_pays_nothing():
    model = ours()
    assert model(IDS, labels=IDS).routing is None
    assert model.train()(IDS, labels=IDS).routing is not None and model(IDS).routing is None
    assert CausalLM(ModelConfig(**SHAPE)).train()(IDS, labels=IDS).routing is None


# --- on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [True, False], ids=["a tensor for each expert", "fused"])
@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_others(name, original, tmp_path):
    """Theirs is read, ours is written, and theirs reads that: all three give the same logits."""
    reference = theirs(name)
    reference.save_pretrained(tmp_path / "theirs", save_original_format=original)
    assert any(key.endswith("gate_up_proj") for key in load_file(tmp_path / "theirs/model.safetensors")) \
        != original
    model = load_model(tmp_path / "theirs")
    assert distance(logits(model), logits(reference)) < 1e-5
    save_model(model, tmp_path / "ours")
    again = opened(tmp_path / "ours")
    assert type(again) is type(reference)
    assert distance(logits(again), logits(reference)) < 1e-5
    assert load_model(tmp_path / "ours").config == model.config


def test_it_opens_as_transformers_4_wrote_its_config(tmp_path):
    """num_experts in the place of num_local_experts, and no rope_parameters."""
    theirs("qwen").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert distance(logits(load_model(tmp_path)), logits(theirs("qwen"))) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": True}, {"tie_word_embeddings": False},
                                     {"moe_intermediate_size": None}], ids=str)
def test_our_own_open_as_qwen3_moe(changes, tmp_path):
    model = ours(**changes, router_aux_loss_coef=0.03)
    save_model(model, tmp_path)
    reference = opened(tmp_path)
    assert type(reference) is Qwen3MoeForCausalLM and reference.config.router_aux_loss_coef == 0.03
    assert distance(logits(model), logits(reference)) < 1e-4
    size = model.config.expert_size
    assert load_model(tmp_path).config == replace(model.config, moe_intermediate_size=size)


def test_a_state_dict_of_minimind(tmp_path):
    """One expert for each token, with normalised gates; the shape of the router says how many there are."""
    model = ours(num_experts_per_tok=1, norm_topk_prob=True, rope_theta=1e6)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    again = load_model(tmp_path / "x.pth")
    assert again.config.num_experts == 4 and again.config.norm_topk_prob and again.config.expert_size == 24
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("changes, complaint", [
    ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_experts 4"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a positive"),
    ({"num_local_experts": "4"}, "num_local_experts must be a whole number, not '4'"),
    ({"moe_intermediate_size": None}, "moe_intermediate_size must be a positive"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step must be"),
    ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of whole numbers"),
    ({"mlp_only_layers": [0]}, "has no model.layers.0.mlp.down_proj"),
    ({"router_aux_loss_coef": "much"}, "router_aux_loss_coef must be a number"),
    ({"num_local_experts": 5}, "has no model.layers.0.mlp.experts.4"),
    ({"num_local_experts": 60000, "num_hidden_layers": 9000}, "9000 layers with 540000000 experts"),
    ({"num_local_experts": 0}, "has no model.layers.0.mlp.down_proj"),
], ids=str)
def test_a_config_that_makes_no_sense_or_does_not_fit(changes, complaint, tmp_path):
    theirs("qwen").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=complaint):
        load_model(tmp_path)


def test_what_no_class_can_hold_is_refused():
    with pytest.raises(ModelError, match="experts need qk_norm"):
        ModelConfig(num_experts=4)
    with pytest.raises(ModelError, match="experts need qk_norm"):
        ModelConfig(num_experts=4, norm_topk_prob=True, mlp_only_layers=(1,))
    with pytest.raises(ModelError, match="a window in some layers only"):
        ModelConfig(num_experts=4, qk_norm=True, sliding_window=4, full_attention_every=2)
    assert ModelConfig(num_experts=4, norm_topk_prob=True).has_experts(0)


def test_presets_are_as_large_as_their_names_say():
    def sizes(name):
        with torch.device("meta"):
            model = CausalLM(PRESETS[name])
        total = sum(parameter.numel() for parameter in model.parameters())
        experts = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
        return total, total - experts * 3 // 4

    total, active = sizes("198m-a64m")
    assert round(total / 1e6) == 198 and round(active / 1e6) == 64
    dense, routers = sizes("tiny")[0], 4 * 8 * 128
    assert sizes("tiny-moe")[1] == dense + routers


def test_gguf(tmp_path):
    """transformers' reader and gguf's own open it; llama.cpp has no norm_topk_prob that is false."""
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    # 768: transformers' reader leaves this size at its default.
    shape = {"vocab_size": 6400, "norm_topk_prob": True, "initializer_range": 0.1}
    model = ours(**shape, moe_intermediate_size=768)
    write_model(model, tokenizer, tmp_path / "x.gguf", "F32", "name", [2, 0])
    assert torch.equal(logits(load_model(tmp_path / "x.gguf")), logits(model))
    assert gguf_name("model.layers.0.mlp.experts.3.up_proj.weight") == "blk.0.ffn_up_exps.weight"
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", local_files_only=True,
                                                     trust_remote_code=False)
    assert distance(logits(reference), logits(model)) < 1e-4
    fields = gguf.GGUFReader(tmp_path / "x.gguf")
    assert fields.get_field("qwen3moe.expert_used_count").contents() == 2
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN3MOE]}
    assert {tensor.name.replace("blk.0", "blk.{bid}").replace("blk.1", "blk.{bid}").removesuffix(".weight")
            for tensor in fields.tensors} <= known

    mixtral = ours(**shape, qk_norm=False)
    write_model(mixtral, tokenizer, tmp_path / "m.gguf", "Q8_0", "name", [2, 0])
    again = load_model(tmp_path / "m.gguf")
    assert again.config.num_experts == 4 and not again.config.qk_norm
    assert distance(logits(again), logits(mixtral)) < 0.3
    for changes, complaint in (({"norm_topk_prob": False}, "adds up to 1"),
                               ({"mlp_only_layers": (0,)}, "some layers have no experts")):
        with pytest.raises(ModelError, match=complaint):
            write_model(ours(**shape | changes), tokenizer, tmp_path / "y.gguf", "F32", "name", [2, 0])


# --- adapters -----------------------------------------------------------------------------------------------

BASES = {"experts": {}, "some layers": {"mlp_only_layers": [0]},
         "mixtral": {"qk_norm": False, "norm_topk_prob": True}}


def randomise(parameters):
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", r".*experts\.1\.up_proj"], "down_proj",
                                     ["gate_proj"]], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_an_adapter_of_ours_gives_the_same_in_peft(base, targets, tmp_path):
    model = ours(**BASES[base])
    save_model(model, tmp_path / "base")
    names = apply_lora(model, 3, alpha=5, target_modules=targets)
    assert not any(name.endswith("mlp.gate") for name in names)  # the router gets none
    randomise(lora_parameters(model))
    save_lora(model, tmp_path / "lora", base=tmp_path / "base")
    peft = PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "lora")
    assert distance(logits(peft), logits(model)) < 1e-5
    again = load_model(tmp_path / "base")
    assert set(load_lora(again, tmp_path / "lora").names) == set(names)
    assert torch.equal(logits(again), logits(model))
    merge_lora(again)
    assert distance(logits(again), logits(model)) < 1e-4
    unmerge_lora(again)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True}], ids=str)
def test_an_adapter_of_pefts_gives_the_same_here(settings, tmp_path):
    base = ours()
    save_model(base, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    peft = get_peft_model(opened(tmp_path / "base"), config)
    randomise(parameter for name, parameter in peft.named_parameters() if "lora_" in name)
    peft.save_pretrained(tmp_path / "lora")
    load_lora(base, tmp_path / "lora")
    assert distance(logits(peft), logits(base)) < 1e-5


def test_a_frozen_router_stays_in_float32():
    """A rounded one would send some tokens to other experts than the one that is saved."""
    model = ours()
    apply_lora(model, 2)
    freeze_all_but_lora(model)
    cast_frozen(model, torch.bfloat16)
    mlp = model.model.layers[0].mlp
    assert mlp.gate.weight.dtype == torch.float32 and mlp.experts[1].up_proj.weight.dtype == torch.bfloat16


def test_adapters_over_experts_that_can_not_be_are_refused(tmp_path):
    model = ours()
    with pytest.raises(ModelError, match="dropout over experts"):
        apply_lora(model, 2, dropout=0.1)
    apply_lora(model, 2)
    randomise(lora_parameters(model))
    save_lora(model, tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    save_file(state | {key: state[key][:-1].contiguous()}, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="don't fit 4 experts"):
        load_lora(ours(), tmp_path / "lora")
    save_file(state, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="parts of experts: this model has none"):
        load_lora(CausalLM(ModelConfig(**SHAPE)), tmp_path / "lora")
    adapters = Adapters(ours())
    adapters.load(tmp_path / "lora")
    assert adapters.fit_together(["lora", "lora"]) and not adapters.fit_together(["lora", None])
    with pytest.raises(ModelError, match="can't differ between the rows"):
        adapters.use_rows(["lora", None])


def test_4_bits(tmp_path):
    """Experts in 4 bits compute and carry adapters; the router stays as it is; they are not saved."""
    model = ours(hidden_size=64, moe_intermediate_size=64)
    gate = model.model.layers[0].mlp.gate.weight
    rounded = dequantize_model(quantize_model(copy.deepcopy(model)))
    quantize_model(model)
    assert model.model.layers[0].mlp.gate.weight is gate
    assert distance(logits(model), logits(rounded)) < 1e-4
    with pytest.raises(ModelError, match="experts in 4 bits are not saved"):
        save_model(model, tmp_path)
    apply_lora(model, 2)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(model))
