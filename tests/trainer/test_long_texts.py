"""A model goes on at a longer length, and a new one may have a window in some layers."""

import json

from model.weights import load_model


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_pretraining_goes_on_at_a_longer_length(workshop, finished, tmp_path):
    before, _ = finished["pretrain"]  # rows of 64
    flags = ["--data_path", workshop.texts, "--load_from", before, "--out_dir", tmp_path, "--name", "long",
             "--max_seq_len", 256, "--max_steps", 2, "--batch_size", 2, "--device", "cpu"]
    ended = workshop.run("pretrain", *flags, "--rope_scaling", "yarn:4")
    assert ended.code == 0, ended
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert config_of(tmp_path / "long")["rope_scaling"] == scaling
    training = json.loads((tmp_path / "long" / "training.json").read_text(encoding="utf-8"))
    assert (training["arguments"]["rope_scaling"], training["arguments"]["max_seq_len"]) == ("yarn:4", 256)
    # The next stage needs no flag: the weights bring the scaling along.
    flags = ["--data_path", workshop.chats, "--load_from", tmp_path / "long", "--out_dir", tmp_path, "--name",
             "chat", "--max_seq_len", 256, "--max_steps", 2, "--batch_size", 2, "--device", "cpu"]
    assert workshop.run("full_sft", *flags).code == 0
    assert config_of(tmp_path / "chat")["rope_scaling"] == scaling


def test_a_new_model_with_a_window_in_some_layers(workshop, tmp_path):
    flags = workshop.flags("pretrain", tmp_path, num_hidden_layers=4, sliding_window=8, max_steps=8,
                           full_attention_every=2, rope_scaling="yarn:4:16")
    assert workshop.run("pretrain", *flags).code == 0
    config = load_model(tmp_path / "pretrain").config
    assert config.windows == [8, None, 8, None]
    assert config.rope_scaling["original_max_position_embeddings"] == 16
    written = config_of(tmp_path / "pretrain")
    assert written["architectures"] == ["Qwen3ForCausalLM"] and written["use_sliding_window"] is True
    assert written["layer_types"] == ["sliding_attention", "full_attention"] * 2


def test_what_cannot_be_is_one_line(workshop, finished, tmp_path):
    before, _ = finished["pretrain"]
    flags = workshop.flags("pretrain", tmp_path)
    for more, words in (
        (["--full_attention_every", 2], "need a --sliding_window"),
        (["--sliding_window", 0], "--sliding_window must be a positive integer"),
        (["--rope_scaling", "yarn:4"], "on which a new model was trained; name the tokens: yarn:4:512"),
        (["--rope_scaling", "yarn:0.5"], "--rope_scaling must be KIND:FACTOR"),
        (["--rope_scaling", "dynamic:2"], "--rope_scaling must be KIND:FACTOR"),
    ):
        ended = workshop.run("pretrain", *flags, *more)
        assert ended.code == 2 and words in ended.error, (more, ended)
    flags = ["--data_path", workshop.texts, "--load_from", before, "--out_dir", tmp_path]
    ended = workshop.run("pretrain", *flags, "--sliding_window", 8)
    assert "--sliding_window has no effect with --load_from" in ended.error
