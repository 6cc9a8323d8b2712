"""LoRA: exact at the start, alone in training, the same as PEFT's, and strict about files."""

import copy
import json
import math
import os
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import IDS, close, logits, ours, twins
from torch import nn

from common.errors import ModelError
from model import lora as L
from model.adapters import logit_shift, remove_lora, report_line, report_lora, set_lora
from model.fused import lora_linear
from model.low_rank import low_rank
from model.quantize import NF4Linear, quantize_model
from model.tokenizer_files import OWN_TOKENIZER, load_tokenizer
from model.transformer import CausalLM, preset
from model.weights import save_model

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def wake(model, seed=1, std=0.1):
    """Give every B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, L.LoRA):
                module.B.weight.normal_(0, std, generator=generator)
    return model


def base_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}


# ---- injection


def test_plain_model_keeps_its_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1024, 1024)

    net = Net()
    weight, x = net.linear.weight, torch.randn(3, 1024)
    before = net.linear(x)
    assert L.apply_lora(net, rank=16) == ["linear"]
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {
        "linear.weight": (1024, 1024),
        "linear.bias": (1024,),
        "linear.lora.A.weight": (16, 1024),
        "linear.lora.B.weight": (1024, 16),
    }
    assert net.linear.weight is weight and isinstance(net.linear, nn.Linear)
    assert torch.equal(net.linear(x), before)
    assert abs(net.linear.lora.A.weight.std().item() - 0.02) < 1e-3 and not net.linear.lora.B.weight.any()


def test_the_equation():
    layer = nn.Sequential(nn.Linear(6, 10))
    L.apply_lora(layer, rank=3, alpha=12)
    wake(layer)
    x, m = torch.randn(4, 5, 6), layer[0]
    expected = x @ m.weight.T + m.bias + (12 / 3) * (x @ m.lora.A.weight.T @ m.lora.B.weight.T)
    assert close(layer(x), expected)


def test_identity_at_the_start_bit_for_bit():
    model = ours()
    before, state = logits(model), base_state(model)
    L.apply_lora(model, rank=4, dropout=0.5)
    assert torch.equal(logits(model), before)  # also: a new adapter takes over eval mode
    assert all(torch.equal(v, state[k]) for k, v in base_state(model).items())


def test_published_count_of_26m():
    with torch.device("meta"):
        model = CausalLM(preset("26m"))
    names = L.apply_lora(model, rank=16, target_modules="square")
    assert len(names) == 16 and {n.split(".")[-1] for n in names} == {"q_proj", "o_proj"}
    assert L.count_line(model) == "26,092,032 parameters in all, 262,144 LoRA, 1.00 %"


@pytest.mark.parametrize(
    "targets, endings, count",
    [
        ("all-linear", set(ALL), 14),
        (["all-linear"], set(ALL), 14),
        ("square", {"q_proj", "o_proj"}, 4),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}, 4),
        ("q_proj", {"q_proj"}, 2),
        (["layers.1.mlp.up_proj"], {"up_proj"}, 1),
        (r".*\.(k|v)_proj", {"k_proj", "v_proj"}, 4),
        ([r"model\.layers\.0\..*"], set(ALL), 7),
        (["lm_head"], {"lm_head"}, 1),
    ],
)
def test_targets(targets, endings, count):
    names = L.apply_lora(ours(), rank=2, target_modules=targets)
    assert len(names) == count and {n.split(".")[-1] for n in names} == endings


def test_rank_equal_to_the_width_ends():
    model = ours()
    assert len(L.apply_lora(model, rank=32, target_modules="square")) == 4
    assert sum(isinstance(m, L.LoRA) for m in model.modules()) == 4
    assert len(L.apply_lora(ours(), rank=32)) == 14  # k and v are thinner, which is no reason to refuse


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rank=0), "rank"),
        (dict(rank=-1), "rank"),
        (dict(rank=2.5), "rank"),
        (dict(rank=33), "above the width"),
        (dict(alpha=-1), "alpha"),
        (dict(alpha=0), "alpha"),
        (dict(alpha=math.nan), "alpha"),
        (dict(dropout=1), "dropout"),
        (dict(dropout=-0.1), "dropout"),
        (
            dict(target_modules=["q_proj", "query"]),
            "'query'.*there is: q_proj, k_proj, v_proj, o_proj, gate_proj",
        ),
        (dict(target_modules="nothing.*"), "there is: q_proj"),
        (dict(target_modules="("), "regular expression"),
        (dict(target_modules=["proj"]), "there is"),
        (dict(target_modules=["norm"]), "there is"),
        (dict(target_modules=[]), "there is"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model = ours()
    with pytest.raises(ModelError, match=message) as error:
        L.apply_lora(model, **arguments)
    assert "\n" not in str(error.value) and not any(isinstance(m, L.LoRA) for m in model.modules())


def test_twice_is_an_error_and_so_is_none():
    model = ours()
    for function in (L.freeze_all_but_lora, L.merge_lora, L.unmerge_lora, L.count_line):
        with pytest.raises(ModelError, match="no LoRA"):
            function(model)
    L.apply_lora(model, rank=2)
    with pytest.raises(ModelError, match="already"):
        L.apply_lora(model, rank=2)


def test_special_linears_are_left_alone():
    attention = nn.MultiheadAttention(8, 2)  # its out_proj is read as a weight, never called
    with pytest.raises(ModelError, match="none at all"):
        L.apply_lora(attention, rank=2)


# ---- training


def train(model, steps=8, autocast=False):
    L.freeze_all_but_lora(model)
    model.train()
    optimizer = torch.optim.AdamW(L.lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # remembers casts: one context a step
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_lora_trains(checkpointing):
    model = ours()
    model.gradient_checkpointing = checkpointing
    L.apply_lora(model, rank=4)
    state = base_state(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, state[k]) for k, v in base_state(model).items())
    model(IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == (".lora." in name) for name, p in model.named_parameters())
    assert {id(p) for p in L.lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_dropout_only_in_training():
    model = wake_and(ours(), dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def wake_and(model, **kwargs):
    L.apply_lora(model, **{"rank": 4, **kwargs})
    return wake(model)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_over_a_bfloat16_base(autocast):
    model = ours().to(torch.bfloat16)
    L.apply_lora(model, rank=4)
    assert {p.dtype for p in L.lora_parameters(model)} == {torch.float32}
    losses = train(model, autocast=autocast)
    assert losses[-1] < losses[0] and model(IDS).logits.dtype == torch.bfloat16


def test_one_compiled_graph():
    model = wake_and(ours(num_hidden_layers=1))
    L.freeze_all_but_lora(model)
    expected = model(IDS, labels=IDS).loss.detach()
    compiled = torch.compile(lambda ids: model(ids, labels=ids).loss, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(compiled(IDS), expected, 0.1)
    loss = compiled(IDS)
    loss.backward()
    assert close(loss, expected) and all(p.grad is not None for p in L.lora_parameters(model))
    L.merge_lora(model)  # a switch recompiles and is not ignored
    with torch.no_grad():
        assert close(compiled(IDS), expected)
    set_lora(model, False)
    with torch.no_grad():
        assert close(compiled(IDS), ours(num_hidden_layers=1)(IDS, labels=IDS).loss)
    torch.compiler.reset()


def test_deepcopy_and_pickle():
    model = wake_and(ours(), dropout=0.1)
    for merged in (False, True):
        if merged:
            L.merge_lora(model)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(clone), logits(model))
            wake(clone, seed=9)
            assert not merged or torch.equal(logits(clone), logits(model))
            set_lora(clone, False)
            assert torch.equal(logits(clone), logits(ours()))


def test_ddp(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, single = wake_and(ours()), wake_and(ours())
        L.freeze_all_but_lora(model)
        single.load_state_dict(model.state_dict())
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(IDS, labels=IDS).loss.backward()
        single(IDS, labels=IDS).loss.backward()
        pairs = zip(L.lora_parameters(wrapped), L.lora_parameters(single), strict=True)
        assert all(close(a.grad, b.grad) for a, b in pairs)
        L.save_lora(wrapped, tmp_path / "a")  # the wrapper leaves no trace in the file
        keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert all(key.startswith("base_model.model.model.layers.") for key in keys)
        assert (
            L.load_lora(ours(), tmp_path / "a").matched == L.load_lora(wrapped, tmp_path / "a").matched == 14
        )
    finally:
        dist.destroy_process_group()


# ---- merging and switching


def test_merge_and_unmerge():
    model = wake_and(ours(), alpha=8)
    before, state = logits(model), base_state(model)
    L.merge_lora(model)
    merged = logits(model)
    L.merge_lora(model)
    assert (
        torch.equal(logits(model), merged)
        and close(merged, before)
        and not torch.equal(merged, logits(ours()))
    )
    model.train()
    model.eval()
    assert torch.equal(logits(model), merged)
    L.unmerge_lora(model)
    L.unmerge_lora(model)
    assert all(torch.equal(v, state[k]) for k, v in base_state(model).items())
    assert torch.equal(logits(model), before)


def test_off_and_on():
    model = wake_and(ours())
    on = logits(model)
    for merge in (False, True):
        if merge:
            L.merge_lora(model)
        set_lora(model, False)
        assert torch.equal(logits(model), logits(ours()))
        set_lora(model, True)
        assert torch.equal(logits(model), on)


def test_remove():
    model = wake_and(ours())
    on = logits(model)
    L.merge_lora(model)
    remove_lora(model)
    assert (
        torch.equal(logits(model), logits(ours())) and model.state_dict().keys() == ours().state_dict().keys()
    )
    assert not any(isinstance(m, L.LoRALinear) for m in model.modules())
    remove_lora(model)  # nothing to do
    wake_and(model)  # and the model takes another
    L.merge_lora(model)
    remove_lora(model, keep_merged=True)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert not torch.equal(logits(model), logits(ours())) and logits(model).shape == on.shape


def test_a_tied_head_is_not_merged():
    model = wake_and(ours(), target_modules=["q_proj", "lm_head"])
    state = base_state(model)
    with pytest.raises(ModelError, match="embed_tokens.weight = lm_head.weight"):
        L.merge_lora(model)
    assert all(torch.equal(v, state[k]) for k, v in base_state(model).items())
    L.merge_lora(wake_and(ours(tie_word_embeddings=False), target_modules=["lm_head"]))


# ---- PEFT


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "targets", ["all-linear", "square", ["k_proj"], r"model\.layers\.1\.(self_attn\.q|mlp\.up)_proj"]
)
def test_ours_in_peft(tmp_path, qk_norm, targets):
    model, reference = twins(qk_norm)
    names = L.apply_lora(model, rank=4, alpha=6, dropout=0.1, target_modules=targets)
    wake(model, std=0.5)
    L.save_lora(model, tmp_path, base="out/full_sft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft = PeftModel.from_pretrained(reference, tmp_path).eval()
    assert close(logits(peft), logits(model)) and not close(logits(model), logits(twins(qk_norm)[0]), 1e-4)
    assert {
        name.removeprefix("base_model.model.") for name, m in peft.named_modules() if hasattr(m, "lora_A")
    } == set(names)
    config = peft.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6, 0.1)
    assert config.base_model_name_or_path == "out/full_sft" and config.task_type == "CAUSAL_LM"
    if targets == "all-linear":
        assert (
            json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
            == ALL
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(use_rslora=True),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(init_lora_weights=False),
        dict(layers_to_transform=[1], layers_pattern="layers"),
        dict(exclude_modules=["k_proj", "down_proj"]),
        dict(rank_pattern={"q_proj": 2, "layers.0.mlp.up_proj": 6}, alpha_pattern={"q_proj": 5, "k_proj": 1}),
    ],
)
def test_peft_in_ours(tmp_path, options):
    model, reference = twins()
    peft = get_peft_model(
        reference, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL, **options})
    )
    generator = torch.Generator().manual_seed(4)
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=generator)
    peft.eval().save_pretrained(tmp_path / "theirs")
    expected = logits(peft)
    report = L.load_lora(model, tmp_path / "theirs")
    assert report.matched == len(report.names) > 0 and close(logits(model), expected)
    L.save_lora(model, tmp_path / "ours")  # whatever came in, goes out again
    again = PeftModel.from_pretrained(twins()[1], tmp_path / "ours").eval()
    assert close(logits(again), expected)


def test_an_adapter_over_the_head_with_a_copy_of_the_base(tmp_path):
    """PEFT stores the base's lm_head beside an adapter over it. The copy must be that of our base."""
    model, reference = twins()
    peft = get_peft_model(reference, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    expected = logits(peft.eval())
    peft.save_pretrained(tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    copy_key = "base_model.model.lm_head.base_layer.weight"
    assert torch.equal(state[copy_key], model.lm_head.weight)
    half = {key: tensor.bfloat16() for key, tensor in state.items()}
    save_file(half, tmp_path / "theirs" / "adapter_model.safetensors")
    L.load_lora(model, tmp_path / "theirs")
    assert close(logits(model), expected, 0.02) and not close(logits(model), logits(twins()[0]), 0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # the head alone got the adapter
    for changed in (state[copy_key] * 1.1, state[copy_key][1:].clone()):
        save_file(state | {copy_key: changed}, tmp_path / "theirs" / "adapter_model.safetensors")
        with pytest.raises(ModelError, match="another base model .other values in lm_head"):
            L.load_lora(twins()[0], tmp_path / "theirs")


@pytest.mark.parametrize("alpha, stored", [(6, "6"), (6.0, "6"), (1.5, "1.5")])
def test_a_whole_alpha_is_written_as_a_whole_number(tmp_path, alpha, stored):
    model = ours()
    L.apply_lora(model, rank=4, alpha=alpha)
    L.save_lora(model, tmp_path)
    text = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    assert f'"lora_alpha": {stored},' in text and '"r": 4,' in text


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
def test_others_may_read_an_adapter(tmp_path):
    L.save_lora(wake_and(ours()), tmp_path / "a")
    L.save_lora(wake_and(ours()), tmp_path / "a.pth")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode} == {(tmp_path / "a.pth").stat().st_mode}


@pytest.mark.parametrize(
    "options, key",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(modules_to_save=["norm"]), "modules_to_save"),
        (dict(bias="lora_only"), "bias"),
        (dict(bias="all"), "bias"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
        (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (dict(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
        (dict(target_parameters=["model.norm.weight"]), "target_parameters"),
        (dict(something_new={"a": 1}), "something_new"),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused_by_name(tmp_path, options, key):
    """Written by PEFT where it lets us, else into the config that it wrote."""
    model, reference = twins()
    made = {} if key in ("something_new", "target_parameters") else options
    get_peft_model(reference, LoraConfig(r=2, target_modules=["q_proj"], **made)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | options), encoding="utf-8")
    before = logits(model)
    with pytest.raises(ModelError, match=f"adapter_config.json sets {key} to") as error:
        L.load_lora(model, tmp_path)
    assert "\n" not in str(error.value) and torch.equal(logits(model), before)


def peft_twin(model, reference, **options):
    """PEFT's model with the adapters of ours, and both sides' trained parameters in the same order."""
    peft = get_peft_model(reference, LoraConfig(r=4, target_modules=ALL, **options))
    for name, module in peft.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A and "init_lora_weights" not in options:
            lora = model.get_submodule(name.removeprefix("base_model.model.")).lora
            module.lora_A["default"].weight.data.copy_(lora.A.weight)
            module.lora_B["default"].weight.data.copy_(lora.B.weight)
    return peft, list(L.lora_parameters(model)), [p for p in peft.parameters() if p.requires_grad]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_peft_gradients_and_losses(qk_norm):
    model, reference = twins(qk_norm)
    L.apply_lora(model, rank=4, alpha=8)
    _, mine, other = peft = peft_twin(model, reference, lora_alpha=8)
    L.freeze_all_but_lora(model)
    optimizers = [torch.optim.AdamW(group, lr=1e-3) for group in (mine, other)]
    first = model(IDS, labels=IDS).loss.item()
    for _ in range(50):
        losses = [model(IDS, labels=IDS).loss, peft[0](IDS, labels=IDS).loss]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        assert abs(losses[0] - losses[1]).item() < 1e-5
        assert all(close(a.grad, b.grad) for a, b in zip(mine, other, strict=True))
        for optimizer in optimizers:
            optimizer.step()
    assert losses[0] < first - 0.1


# ---- files


@pytest.mark.parametrize("name", ["adapter", "adapter.pth"])
@pytest.mark.parametrize("adapted", [False, True])
def test_round_trip(tmp_path, name, adapted):
    model = wake_and(ours(), alpha=8, dropout=0.2, target_modules=["q_proj", "down_proj"])
    L.save_lora(model, tmp_path / name)
    fresh = ours()
    if adapted:  # its own alpha stays, the effect is the file's
        L.apply_lora(fresh, rank=4, alpha=2, target_modules=["q_proj", "down_proj"])
    report = L.load_lora(fresh, str(tmp_path / name))
    assert close(logits(fresh), logits(model)) and report.matched == 4 and 0 < report.relative_norm < 10
    layers = [module for module in model.modules() if isinstance(module, L.LoRALinear)]
    update = sum((m.lora.scaling * m.lora.B.weight @ m.lora.A.weight).square().sum().item() for m in layers)
    weight = sum(m.weight.square().sum().item() for m in layers)
    assert abs(report.relative_norm - math.sqrt(update / weight)) < 1e-5


def test_no_effect_shows(tmp_path):
    model = ours()
    L.apply_lora(model, rank=2)
    L.save_lora(model, tmp_path / "a")
    assert L.load_lora(ours(), tmp_path / "a").relative_norm == 0


def test_plain_file_and_its_old_forms(tmp_path):
    model = wake_and(ours(), target_modules="square")
    L.save_lora(model, tmp_path / "new.pth")
    state = torch.load(tmp_path / "new.pth", weights_only=True)
    assert state.keys() == {k for k in model.state_dict() if "lora" in k}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    old = {f"module.{k.replace('self_attn', '_orig_mod.self_attn')}": v.half() for k, v in state.items()}
    torch.save(old, tmp_path / "old.pth")
    old = ours()
    assert L.load_lora(old, tmp_path / "old.pth").matched == 4
    assert close(logits(old), logits(model), 1e-2) and {p.dtype for p in L.lora_parameters(old)} == {
        torch.float32
    }


def test_a_kill_while_an_adapter_is_replaced_never_pairs_old_with_new(tmp_path, monkeypatch):
    """alpha stands in the config, the matrices in another file."""
    def read():
        model = ours()
        L.load_lora(model, tmp_path)
        return logits(model)

    replace, old, new = os.replace, wake_and(ours(), alpha=8), wake_and(ours(), alpha=2)
    L.save_lora(old, tmp_path)
    L.save_lora(old, tmp_path / "beside.pth")
    assert close(read(), logits(old))
    left = iter([True])

    def die(a, b):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr("common.files.os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        L.save_lora(new, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="no adapter_config.json in"):
        read()
    L.save_lora(new, tmp_path)
    assert close(read(), logits(new))


def test_a_kill_while_a_plain_file_is_replaced_leaves_the_old_one(tmp_path, monkeypatch):
    def die(a, b):
        raise KeyboardInterrupt

    old = wake_and(ours())
    L.save_lora(old, tmp_path / "a.pth")
    monkeypatch.setattr("common.files.os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        L.save_lora(wake_and(ours(), rank=2), tmp_path / "a.pth")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    fresh = ours()
    L.load_lora(fresh, tmp_path / "a.pth")
    assert close(logits(fresh), logits(old))


def test_folder_keeps_what_else_is_in_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")

    for seed in (1, 2):
        model = wake(wake_and(ours()), seed)
        L.save_lora(
            model,
            tmp_path,
            base=tmp_path / "base",
            tokenizer=load_tokenizer(OWN_TOKENIZER),
            training={"step": seed, "name": "种子"},
        )
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert json.loads((tmp_path / "training.json").read_text(encoding="utf-8")) == {"step": 2, "name": "种子"}
    fresh = ours()
    L.load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_a_failed_save_leaves_the_old_adapter(tmp_path):
    model = wake_and(ours())
    L.save_lora(model, tmp_path)
    with pytest.raises(TypeError):
        L.save_lora(wake(model, seed=5), tmp_path, training={("no", "text"): 1})
    fresh = ours()
    L.load_lora(fresh, tmp_path)
    assert close(logits(fresh), logits(wake(model))) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["adapter", "adapter.pth"])
def test_numbers_that_are_none_are_not_saved(tmp_path, name, value):
    model = wake_and(ours())
    L.save_lora(model, tmp_path / name)
    before = logits(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora.B.weight[3, 2] = value
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.lora[._]B.weight holds NaN or inf") as error:
        L.save_lora(model, tmp_path / name)
    assert "\n" not in str(error.value) and [file.name for file in tmp_path.iterdir()] == [name]
    fresh = ours()
    L.load_lora(fresh, tmp_path / name)  # what was there before
    assert close(logits(fresh), before)


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = wake_and(ours(), alpha=12)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    L.save_lora(model, tmp_path / "a.pth")
    L.save_lora(model, tmp_path / "a")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("view", [(10**6, 10**6), (4, 10**9)])
def test_a_view_that_claims_more_than_the_file(tmp_path, view):
    torch.save({"q.lora.A.weight": torch.ones(1).expand(view)}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match="claim to be larger"):
        L.load_lora(ours(), tmp_path / "x.pth")


def test_saving_while_merged_is_saving_the_same(tmp_path):
    model = wake_and(ours())
    L.merge_lora(model)
    L.save_lora(model, tmp_path)
    fresh = ours()
    L.load_lora(fresh, tmp_path)  # the marks are those of the base
    assert close(logits(fresh), logits(model))
    L.load_lora(model, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_another_base_is_refused_and_half_precision_is_not(tmp_path):
    model = wake_and(ours())
    L.save_lora(model, tmp_path)
    with pytest.raises(ModelError, match="another base model"):
        L.load_lora(ours(seed=1), tmp_path)
    near = ours()
    with torch.no_grad():
        near.model.layers[1].mlp.up_proj.weight.add_(torch.randn(48, 32) * 1e-3)  # a little more training
    with pytest.raises(ModelError, match="another base model.*layers.1.mlp.up_proj"):
        L.load_lora(near, tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        assert L.load_lora(ours().to(dtype), tmp_path).matched == 14


def broken(tmp_path, change):
    """A saved adapter with its tensors or config changed."""
    L.save_lora(wake_and(ours()), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    change(state, config)
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, c: s.pop(Q + "lora_B.weight"), r"q_proj lacks its lora B"),
        (lambda s, c: s.update({Q + "lora_magnitude_vector": torch.ones(32)}), "no LoRA matrix"),
        (
            lambda s, c: s.update({Q + "lora_A.weight": torch.ones(4, 31)}),
            r"q_proj lora A is \(4, 31\), not \(4, 32\)",
        ),
        (lambda s, c: s.update({Q + "lora_A.weight": torch.ones(3, 32)}), "q_proj .* rank 3, not the 4"),
        (
            lambda s, c: s.update(
                {
                    "base_model.model.model.layers.9.x.lora_A.weight": torch.ones(4, 32),
                    "base_model.model.model.layers.9.x.lora_B.weight": torch.ones(32, 4),
                }
            ),
            "layers.9.x",
        ),
        (lambda s, c: c.update(peft_type="IA3"), "type IA3"),
        (lambda s, c: c.pop("peft_type"), "type None"),
        (lambda s, c: s.clear(), "holds no LoRA"),
    ],
)
def test_bad_adapters_change_nothing(tmp_path, adapted, change, message):
    path, model = broken(tmp_path, change), ours()
    if adapted:
        wake_and(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ModelError, match=message) as error:
        L.load_lora(model, path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_strict_where_there_is_lora(tmp_path):
    L.save_lora(wake_and(ours(), target_modules=["q_proj"]), tmp_path / "q")
    for options, message in (
        (dict(rank=2, target_modules=["q_proj"]), "q_proj has LoRA rank 4, not 2"),
        (dict(target_modules=["q_proj", "o_proj"]), "lacks 2 of the model's LoRA layers"),
        (dict(target_modules=["layers.0.self_attn.q_proj"]), "layers.1.self_attn.q_proj"),
    ):
        with pytest.raises(ModelError, match=message):
            L.load_lora(wake_and(ours(), **options), tmp_path / "q")


class Bomb:
    def __reduce__(self):
        return (open, ("bomb_was_run", "w"))


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pth").write_bytes(b"not a file of torch")
    torch.save({"a.lora.A.weight": Bomb()}, tmp_path / "hostile.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"a.lora.A.weight": Bomb()}))
    torch.save([1, 2], tmp_path / "list.pth")
    L.save_lora(wake_and(ours()), tmp_path / "no_weights")
    (tmp_path / "no_weights" / "adapter_model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "model.pth")
    L.save_lora(wake_and(ours()), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:2000])
    L.save_lora(wake_and(ours()), tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    L.save_lora(wake_and(ours()), tmp_path / "text")
    (tmp_path / "text" / "adapter_config.json").write_text("{", encoding="utf-8")
    for name, message in (
        ("nowhere", "not found"),
        ("empty", "adapter_config.json"),
        ("junk.pth", "damaged"),
        ("hostile.pth", "damaged"),
        ("list.pth", "does not hold a state dict"),
        ("bare.pth", "refused"),
        ("no_weights", "adapter_model.safetensors is missing"),
        ("model.pth", "'model.norm.weight'"),
        ("cut.pth", "damaged"),
        ("cut", "damaged"),
        ("text", "adapter_config.json is not valid JSON"),
    ):
        with pytest.raises(ModelError, match=message) as error, warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of bare pickles before it refuses them
            L.load_lora(ours(), tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not (tmp_path / "bomb_was_run").exists()


def test_marks_of_the_base_are_in_the_weights_file(tmp_path):
    L.save_lora(wake_and(ours()), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        marks = json.loads(file.metadata()["base_fingerprint"])
    assert "model.embed_tokens.weight" in marks and not any("lora" in name for name in marks)


# ---- the fast forward pass


def gradients(model, reference=False):
    """The gradients of A, B and the inputs; `reference`: by the plain formula, which a training W takes."""
    L.freeze_all_but_lora(model)
    for module in model.modules():
        if isinstance(module, L.LoRALinear) and reference:
            module.weight.requires_grad_(True)
    embedded = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda m, x, y: embedded.append(y.detach().requires_grad_()) or embedded[0]
    )
    output = model(IDS, labels=IDS)
    output.loss.backward()
    hook.remove()
    return [output.loss.detach(), embedded[0].grad, *(p.grad for p in L.lora_parameters(model))]


@pytest.mark.parametrize("options", [{}, dict(rslora=True, alpha=7), dict(init="pissa", alpha=3)])
def test_fast_and_plain_agree(options):
    model = wake_and(ours(attention_bias=True), **options)
    for bias in (m.bias for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None):
        nn.init.normal_(bias)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L, "lora_linear", lambda *inputs: calls.append(1) or lora_linear(*inputs))
        fast, plain = gradients(copy.deepcopy(model)), gradients(copy.deepcopy(model), reference=True)
    assert len(calls) == 14  # the first took the fast way in every layer, the second in none
    assert all(close(a, b) for a, b in zip(fast, plain, strict=True))


@pytest.mark.parametrize("training, dropout, fast", [(True, 0.0, 1), (False, 0.5, 1), (True, 0.5, 0)])
def test_the_fast_way_is_taken_unless_it_drops_out(training, dropout, fast, monkeypatch):
    layer = nn.Sequential(nn.Linear(6, 10))
    L.apply_lora(layer, rank=3, dropout=dropout)
    L.freeze_all_but_lora(layer)
    calls = []
    monkeypatch.setattr(L, "lora_linear", lambda *inputs: calls.append(1) or lora_linear(*inputs))
    layer.train(training)(torch.randn(2, 6))
    assert len(calls) == fast


def test_what_a_lora_is_by_default_and_where_it_lies():
    lora = L.LoRA(6, 10, 3)
    assert (lora.alpha, lora.scaling, lora.dropout, lora.rslora) == (3.0, 1.0, 0.0, False)
    assert {p.device.type for p in L.LoRA(6, 10, 3, device="meta").parameters()} == {"meta"}
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {p.dtype for p in L.LoRA(6, 10, 3).parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    model = ours()
    L.apply_lora(model, rank=4, init="pissa")  # what it started at moves with it
    moved = model.to("meta").model.layers[0].self_attn.q_proj.lora
    assert {t.device.type for t in (moved.A.weight, moved.B.weight, moved.A0, moved.B0)} == {"meta"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_way_computes_the_plain_formula(bias, dtype):
    linear, a, b = nn.Linear(6, 10, bias=bias), torch.randn(3, 6).to(dtype), torch.randn(10, 3).to(dtype)
    x = torch.randn(2, 5, 6)
    y = lora_linear(x, linear.weight, linear.bias, a, b, 0.7)
    expected = linear(x) + 0.7 * x @ (b.float() @ a.float()).T
    assert y.dtype == dtype and close(y, expected, 1e-5 if dtype == torch.float32 else 0.2)


def test_fast_gradients_are_right():
    layer = nn.Sequential(nn.Linear(5, 7)).double()
    L.apply_lora(layer, rank=3, alpha=5)
    L.freeze_all_but_lora(layer)
    m = layer[0]
    x, a, b = (torch.randn(size).double().requires_grad_() for size in ((2, 4, 5), (3, 5), (7, 3)))
    assert torch.autograd.gradcheck(lora_linear, (x, m.weight, m.bias, a, b, 0.7))
    for shape in ((5,), (0, 5), (2, 3, 5)):
        y = m(torch.zeros(shape, dtype=torch.float64))
        assert y.shape == (*shape[:-1], 7)


def test_only_what_is_needed_is_kept():
    """Of x, of A x and of the parameters alone a step keeps memory, and W gets no gradient."""
    layer = nn.Sequential(nn.Linear(64, 48, bias=False))
    L.apply_lora(layer, rank=2)
    L.freeze_all_but_lora(layer)
    x, kept = torch.randn(32, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(32, 2)]
    y.sum().backward()
    assert layer[0].weight.grad is None and x.grad is None


def test_a_base_that_trains_gets_its_gradient():
    model = wake_and(ours())
    model(IDS, labels=IDS).loss.backward()  # nothing was frozen
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_graph_with_everything(init, dropout):
    """compile, gradient checkpointing, autocast, dropout, a bf16 base, a GradScaler's scale: together."""
    model = ours(num_hidden_layers=1).to(torch.bfloat16)
    model.gradient_checkpointing = True
    L.apply_lora(model, rank=4, dropout=dropout, init=init)
    L.freeze_all_but_lora(wake(model) if init == "gaussian" else model)
    compiled = torch.compile(lambda ids: model(ids, labels=ids).loss, backend="aot_eager", fullgraph=True)
    results = []
    for run in (lambda ids: model(ids, labels=ids).loss, compiled):
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(IDS)
        (loss * 1024).backward()
        results.append([loss.detach(), *(p.grad / 1024 for p in L.lora_parameters(model))])
        assert all(p.grad.dtype == torch.float32 for p in L.lora_parameters(model))
    assert all(close(a, b, 0.05) for a, b in zip(*results, strict=True)) or dropout  # other random numbers
    torch.compiler.reset()


def test_half_precision_with_a_grad_scaler():
    model, plain = ours(), ours()
    for m in (model, plain):
        L.apply_lora(m, rank=4)
        wake(m)
    plain.load_state_dict(model.state_dict())
    L.freeze_all_but_lora(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.AdamW(L.lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.float16):
            loss = model(IDS, labels=IDS).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # refuses float16 gradients
        if not losses:
            expected = gradients(plain)[2:]
            pairs = zip(L.lora_parameters(model), expected, strict=True)
            assert all(close(p.grad, gradient, 2e-3) for p, gradient in pairs)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**10 and losses[-1] < losses[0]  # no step was skipped for an overflow


# ---- other scales and other starts


def peft_gets(tmp_path, model, reference=None):
    """The logits of PEFT with what `model` saves, on a base that nobody touched."""
    L.save_lora(model, tmp_path)
    return logits(PeftModel.from_pretrained(reference or twins()[1], tmp_path).eval())


def test_rank_stabilised_scale(tmp_path):
    layer = nn.Sequential(nn.Linear(6, 10))
    L.apply_lora(layer, rank=4, alpha=6, rslora=True)
    wake(layer)
    x, m = torch.randn(2, 6), layer[0]
    update = x @ m.lora.A.weight.T @ m.lora.B.weight.T
    assert close(layer(x), x @ m.weight.T + m.bias + 6 / math.sqrt(4) * update)

    model = wake_and(twins()[0], alpha=6, rslora=True)
    assert close(peft_gets(tmp_path, model), logits(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["use_rslora"] is True and config["lora_alpha"] == 6
    again = twins()[0]
    L.load_lora(again, tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.model.layers[0].self_attn.q_proj.lora.rslora


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_and_trains_as_in_peft(tmp_path, rslora):
    model, reference = twins()
    before, state = logits(model), base_state(model)
    L.apply_lora(model, rank=4, alpha=8, rslora=rslora, init="pissa")
    assert close(logits(model), before)
    assert all(torch.equal(v, state[k]) for k, v in base_state(model).items())  # the base is not touched
    first = model.model.layers[0].self_attn.q_proj
    u, sigma, v = torch.linalg.svd(first.weight)
    nearest = u[:, :4] * sigma[:4] @ v[:4]
    assert close(first.lora.scaling * first.lora.B.weight @ first.lora.A.weight, nearest)
    assert close(first.lora.B.weight.norm(dim=0), first.lora.A.weight.norm(dim=1))

    peft, mine, other = peft_twin(
        model, reference, lora_alpha=8, use_rslora=rslora, init_lora_weights="pissa"
    )
    assert all(close(a, b) for a, b in zip(mine, other, strict=True))
    L.freeze_all_but_lora(model)
    optimizers = [torch.optim.AdamW(group, lr=1e-3) for group in (mine, other)]
    first_loss = model(IDS, labels=IDS).loss.item()
    for step in range(10):
        losses = [model(IDS, labels=IDS).loss, peft(IDS, labels=IDS).loss]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        assert abs(losses[0] - losses[1]).item() < 1e-4
        assert step or all(close(a.grad, b.grad) for a, b in zip(mine, other, strict=True))
        for optimizer in optimizers:
            optimizer.step()
    assert losses[0] < first_loss and not close(logits(model), before, 1e-2)

    assert close(peft_gets(tmp_path / "ours", model), logits(model))  # on the original base
    for name in ("ours", "ours.pth"):
        L.save_lora(model, tmp_path / name)
        fresh = twins()[0]
        L.load_lora(fresh, tmp_path / name)
        assert close(logits(fresh), logits(model)) and fresh.model.layers[0].mlp.up_proj.lora.rank == 8
    adapted = logits(model)
    L.merge_lora(model)
    assert close(logits(model), adapted)
    set_lora(model, False)
    assert torch.equal(logits(model), before)
    peft.save_pretrained(tmp_path / "theirs")  # as PEFT leaves it, it goes with PEFT's changed base alone
    with pytest.raises(ModelError, match="path_initial_model_for_weight_conversion"):
        L.load_lora(twins()[0], tmp_path / "theirs")


@pytest.mark.parametrize("before, after", [
    ("", "module."), ("", "_orig_mod."), ("", "module._orig_mod."), ("base_model.", "base_model._orig_mod."),
    ("layers.1.", "layers.1._fsdp_wrapped_module."), ("mlp.", "_checkpoint_wrapped_module.mlp."),
    (".weight", ".default.weight")])
def test_names_that_wrappers_left_in_an_adapter(tmp_path, before, after):
    def rename(state, config):
        for name in list(state):
            state[name.replace(before, after, 1)] = state.pop(name)

    L.save_lora(wake_and(ours()), tmp_path / "plain")
    models = ours(), ours()
    L.load_lora(models[0], broken(tmp_path / "wrapped", rename))
    L.load_lora(models[1], tmp_path / "plain")
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_what_peft_converts_loads(tmp_path):
    reference = twins()[1]
    peft = get_peft_model(
        reference, LoraConfig(r=4, lora_alpha=8, target_modules=ALL, init_lora_weights="pissa")
    )
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "start")
    generator = torch.Generator().manual_seed(4)
    for name, p in peft.named_parameters():
        if "lora_" in name:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
    expected = logits(peft.eval())
    peft.peft_config["default"].init_lora_weights = "pissa"
    peft.save_pretrained(
        tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    model = twins()[0]
    L.load_lora(model, tmp_path / "end")
    assert close(logits(model), expected)


def test_pissa_survives_copies_and_refuses_what_it_cannot():
    model = ours()
    L.apply_lora(model, rank=4, init="pissa")
    wake(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(clone), logits(model))
    assert not any("B0" in key or "A0" in key for key in model.state_dict())
    assert all(p.shape[0] == 4 or p.shape[1] == 4 for p in L.lora_parameters(model))
    for options, message in ((dict(rank=17), "above the width of the layers, 16"), (dict(init="x"), "init")):
        with pytest.raises(ModelError, match=message):
            L.apply_lora(ours(), **{"init": "pissa", **options})


def test_low_rank_is_the_nearest():
    matrix = torch.randn(20, 3) @ torch.randn(3, 12)
    b, a, kept = low_rank(matrix, 3)
    assert close(b @ a, matrix) and abs(kept - 1) < 1e-6
    sigma = torch.linalg.svdvals(matrix)
    b, a, kept = low_rank(matrix, 2)
    assert b.shape == (20, 2) and a.shape == (2, 12)
    assert abs((matrix - b @ a).norm() - sigma[2]) < 1e-4  # Eckart & Young
    assert abs(kept - (sigma[:2].square().sum() / sigma.square().sum())) < 1e-5
    assert low_rank(torch.zeros(4, 4), 1)[2] == 1
    for rank in (0, 13):
        with pytest.raises(ModelError, match="rank must be from 1 to 12"):
            low_rank(matrix, rank)


# ---- a 4-bit base


def dense(model):
    """The same model with the values that 4 bits hold, in plain layers."""
    plain = ours()
    state = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            state[f"{name}.weight"] = module.dequantize()
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("options", [{}, dict(dropout=0.1), dict(init="pissa", alpha=6)])
def test_over_a_4_bit_base(tmp_path, options):
    model = quantize_model(ours())
    before, twin = logits(model), dense(model)
    names = L.apply_lora(model, rank=4, **options)
    assert close(logits(model), before) and len(names) == 14
    assert options.get("init") or torch.equal(logits(model), before)
    L.apply_lora(twin, rank=4, **options)
    assert L.count_line(model) == L.count_line(twin)
    state = base_state(model)
    torch.manual_seed(0)
    losses = train(model)
    assert losses[-1] < losses[0] and all(torch.equal(v, state[k]) for k, v in base_state(model).items())
    model.eval()

    twin.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora." in k}, strict=False)
    assert close(logits(twin), logits(model))
    assert all(close(a, b) for a, b in zip(gradients(model), gradients(twin), strict=True))
    L.save_lora(model, tmp_path / "a")
    fresh = quantize_model(ours())
    report = L.load_lora(fresh, tmp_path / "a")
    assert report.matched == 14 and close(logits(fresh), logits(model))
    assert abs(report.relative_norm - report_lora(twin).relative_norm) < 1e-4
    assert L.load_lora(ours(), tmp_path / "a").matched == 14  # what both have in common is equal
    with pytest.raises(ModelError, match="another base model"):
        L.load_lora(quantize_model(ours(seed=1)), tmp_path / "a")

    adapted = logits(model)
    with pytest.raises(ModelError, match=r"4-bit weights \(model.layers.0.*scripts/merge_lora.py") as error:
        L.merge_lora(model)
    assert "\n" not in str(error.value) and torch.equal(logits(model), adapted)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(clone), adapted)
    set_lora(model, False)
    assert torch.equal(logits(model), before)
    remove_lora(model)
    assert torch.equal(logits(model), before) and type(model.model.layers[0].mlp.up_proj) is NF4Linear


# ---- what loading reports


def test_report_line(tmp_path):
    model = wake_and(ours())
    L.save_lora(model, tmp_path / "a")
    fresh = ours().train()
    line = report_line(fresh, "a", L.load_lora(fresh, tmp_path / "a"))
    shift = (logits(model) - logits(ours())).abs().max().item()
    change, kl = logit_shift(fresh)
    assert fresh.training and all(m.lora.enabled for m in fresh.modules() if isinstance(m, L.LoRALinear))
    assert "14/14 layers" in line and f"{change:.3g}" in line and "\n" not in line
    assert shift / 5 < change < shift * 5 and 0 < kl < change
    L.load_lora(fresh, tmp_path / "a")
    set_lora(model, False)
    assert logit_shift(model) == (change, kl)
    assert not model.model.layers[0].mlp.up_proj.lora.enabled

    L.save_lora(wake(model, std=0.0), tmp_path / "zero")
    fresh = ours()
    assert "changes nothing" in report_line(fresh, "zero", L.load_lora(fresh, tmp_path / "zero"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, c: c.update(r=8), "rank 4, not the 8 of adapter_config.json"),
        (lambda s, c: c.update(rank_pattern={"q_proj": 2}), "q_proj lora A has rank 4, not the 2"),
        (lambda s, c: c.update(rank_pattern={"(": 2}), "damaged"),
        (lambda s, c: c.update(rank_pattern={"(q.*)*x": 2}), "too involved"),
        (lambda s, c: c.update(alpha_pattern={".*.*.*x": 2}), "too involved"),
        (lambda s, c: c.update(alpha_pattern={"q_proj": None}), "alpha_pattern must give a number"),
        (lambda s, c: c.update(rank_pattern=[1]), "rank_pattern must give a number"),
        (lambda s, c: c.update(lora_alpha="x"), "lora_alpha must be a number in adapter_config.*not 'x'"),
        (lambda s, c: c.update(lora_alpha=None), "lora_alpha must be a number"),
        (lambda s, c: c.pop("lora_alpha"), "lora_alpha must be a number"),
        (lambda s, c: c.update(r="4"), "r must be a number"),
        (lambda s, c: c.clear(), "type None; only LORA"),
        (lambda s, c: c.pop("r"), "r must be a number"),
        (lambda s, c: s.update({Q + "lora_B.weight": torch.full((32, 4), math.inf)}), "lora_B.*infinity"),
        (lambda s, c: c.update(lora_alpha=0), "lora_alpha"),
        (lambda s, c: c.update(lora_alpha=True), "lora_alpha must be a number"),
        (lambda s, c: c.update(alpha_pattern={"q_proj": True}), "alpha_pattern must give a number"),
        (lambda s, c: c.update(use_rslora="false"), "use_rslora must be true or false"),
        (lambda s, c: c.update(init_lora_weights="OLoRA"), "OLoRA may go with a base that PEFT changed"),
        (lambda s, c: c.update(init_lora_weights="new"), "new may go with a base that PEFT changed"),
        (lambda s, c: s.update({Q + "lora.A.weight": torch.ones(4, 32)}), "q_proj has lora A twice"),
        (lambda s, c: s.update({"module." + Q + "lora_A.weight": torch.ones(4, 32)}), "holds tensors twice"),
        (lambda s, c: c.update(lora_alpha=math.nan), "lora_alpha"),
        (lambda s, c: c.update(lora_dropout=1), "lora_dropout"),
        (lambda s, c: c.update(lora_dropout=None), "lora_dropout must be a number"),
        (lambda s, c: s.update({Q + "lora_A.weight": torch.full((4, 32), math.nan)}), "NaN"),
        (lambda s, c: s.update({Q + "lora_A.weight": torch.ones(4)}), "no LoRA matrix"),
        (
            lambda s, c: s.update(
                {Q + "lora_A.weight": torch.ones(0, 32), Q + "lora_B.weight": torch.ones(32, 0)}
            ),
            "rank 0",
        ),
        (
            lambda s, c: s.update(
                {
                    Q + "lora.A.lora_A.weight": torch.ones(4, 32),
                    Q + "lora.A.lora_B.weight": torch.ones(4, 4),
                }
            ),
            "q_proj.lora.A",
        ),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_hostile_adapters_change_nothing(tmp_path, adapted, change, message):
    test_bad_adapters_change_nothing(tmp_path, adapted, change, message)


@pytest.mark.parametrize("text", ["[]", "null", '{"peft_type": "LORA", "alpha_pattern": 3}', "\ud800", ""])
def test_hostile_config(tmp_path, text):
    L.save_lora(wake_and(ours()), tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError) as error:
        L.load_lora(ours(), tmp_path)
    assert "\n" not in str(error.value)


def test_a_model_and_an_adapter_never_share_a_folder(tmp_path):
    """transformers would read both as one: the model with an adapter of another run on it."""
    model = ours()
    save_model(model, tmp_path / "model")
    L.save_lora(wake_and(model), tmp_path / "adapter")
    with pytest.raises(ModelError, match="model holds a model"):
        L.save_lora(model, tmp_path / "model")
    with pytest.raises(ModelError, match="adapter holds an adapter"):
        save_model(ours(), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert not (tmp_path / "model" / "adapter_config.json").exists()


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match="notes is a file"):
        L.save_lora(wake_and(ours()), tmp_path / "notes")
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "mine"
