"""Tokenizers without a token that ends a text, without padding, and with gaps between their ids."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "inference"))

from small_chat_model import turns, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import DataError, ModelError
from dataset.lm_dataset import PretrainDataset, SFTDataset, collate
from inference.chat_model import ChatModel, Sampling
from inference.scoring import score
from model.tokenizer_files import vocabulary_size
from model.transformer import CausalLM, ModelConfig
from model.weights import load_tokenizer, save_model
from trainer.stage import load_weights

CHATML = {"<|im_start|>": 900, "<|im_end|>": 907}
GREEDY = Sampling(temperature=0, max_new_tokens=4)


def save(folder: Path, specials: dict, vocab_size: int, gap: int = 1, **options) -> Path:
    """A model whose byte-level tokenizer has an id for every byte, each `gap` after the one before."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: gap * index for index, letter in enumerate(letters)} | specials
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=32, vocab_size=vocab_size))
    save_model(model, folder, PreTrainedTokenizerFast(tokenizer_object=backend, **options))
    return folder


def test_ids_with_gaps_are_trained_scored_and_chatted_with(tmp_path):
    folder = save(tmp_path / "gaps", CHATML, 908, gap=3, eos_token="<|im_end|>")
    tokenizer = load_tokenizer(folder)
    assert vocabulary_size(tokenizer) == 908 > len(tokenizer)
    model, _ = load_weights(folder, SimpleNamespace(is_main=True))
    data = write(tmp_path / "t.jsonl", turns("hi", "yo"))
    dataset = SFTDataset(data, tokenizer, cache_dir=tmp_path / "cache")
    model(**collate(dataset, [[0]], 0)).loss.backward()
    result = score(ChatModel(folder), [data], GREEDY)
    assert result["n"]["all"] == 1 and result["loss"] > 0


def test_ids_with_gaps_beyond_the_weights_are_refused(tmp_path):
    """258 tokens fit into 300 entries by their number, and not by their ids."""
    folder = save(tmp_path / "small", CHATML, 300, gap=3)
    for load in (lambda folder: load_weights(folder, SimpleNamespace(is_main=True)), ChatModel):
        with pytest.raises(ModelError, match="tokenizer needs 908 rows of the embedding, .* 300"):
            load(folder)


def test_without_an_end_of_text_chats_are_trained_and_scored_and_texts_refused(tmp_path):
    folder = save(tmp_path / "no_end", CHATML, 908)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id is None and tokenizer.pad_token_id is None
    chats = write(tmp_path / "c.jsonl", turns("hi", "yo"))
    texts = write(tmp_path / "t.jsonl", {"text": "hi"})
    assert len(SFTDataset(chats, tokenizer, cache_dir=tmp_path / "cache")) == 1
    with pytest.raises(DataError, match="neither <|endoftext|> nor an eos token"):
        PretrainDataset(texts, tokenizer, cache_dir=tmp_path / "cache")
    chat_model = ChatModel(folder)
    assert score(chat_model, [chats], GREEDY)["n"]["all"] == 1
    with pytest.raises(DataError, match="neither <|endoftext|> nor an eos token"):
        score(chat_model, [texts], GREEDY)


def test_without_any_token_that_ends_an_answer_nothing_can_be_asked(tmp_path):
    with pytest.raises(ModelError, match="no token in its tokenizer .* ends an answer"):
        ChatModel(save(tmp_path / "none", {}, 300))
