import math

import pytest
import torch
from projects import fixed_tokenizer, make_texts

from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer
from codellama.recipe import Stage
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.model_file import ModelFile
from codellama.train.validate import validate

TEXTS = [*make_texts(9, 3), "", "é = '日本 🎉'\n", "  indented\n"]


class Texts(list):
    def text(self, index):
        return self[index]

    def sha256(self, index):
        return str(index)


@pytest.fixture(scope="module")
def model():
    model = Transformer(ModelConfig(32, 2, 4, 2, 64, fixed_tokenizer().vocab_size))
    model.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


def stage_with(**values):
    return Stage(steps=1, batch_tokens=4096, peak_lr=1e-3, dtype="float32", **values)


def by_hand(model, tokenizer, texts, seq_len):
    """Nats, tokens and bytes, one piece of one document at a time and in float64."""
    nats = n_tokens = at = 0
    for text in texts:
        ids = tokenizer.encode(text, bos=True, eos=True)
        begin = 0
        while begin < len(ids) - 1:
            end = min(len(ids), begin + seq_len - (at + begin) % seq_len)
            piece = torch.tensor([ids[begin:end]])
            with torch.no_grad():
                chances = model(piece)[0].double().log_softmax(-1)
            for place, following in enumerate(ids[begin + 1 : end + 1]):
                nats -= chances[place, following].item()
                n_tokens += 1
            begin = end
        at += len(ids)
    return nats, n_tokens, sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("seq_len", [16, 64, 4096])
def test_equals_a_computation_by_hand(model, seq_len):
    tokenizer = fixed_tokenizer()
    stage = stage_with(seq_len=seq_len, micro_batch=1, validation_tokens=100_000)
    found = validate(model, tokenizer, Texts(TEXTS), stage)
    nats, n_tokens, n_bytes = by_hand(model, tokenizer, TEXTS, seq_len)
    assert found["validation_loss"] == pytest.approx(nats / n_tokens, rel=1e-5)
    assert found["validation_bits_per_byte"] == pytest.approx(
        nats / math.log(2) / n_bytes, rel=1e-5
    )


def test_vocabulary_without_a_space_in_front(model):
    tokenizer = Tokenizer(ModelFile(fixed_tokenizer().file.pieces, add_dummy_prefix=False))
    stage = stage_with(seq_len=64, micro_batch=4, validation_tokens=100_000)
    found = validate(model, tokenizer, Texts(TEXTS), stage)
    nats, _, n_bytes = by_hand(model, tokenizer, TEXTS, 64)
    assert found["validation_bits_per_byte"] == pytest.approx(
        nats / math.log(2) / n_bytes, rel=1e-5
    )


def test_documents_are_scored_once_however_many_tokens_are_asked_for(model):
    results = [
        validate(
            model,
            fixed_tokenizer(),
            Texts(TEXTS),
            stage_with(seq_len=32, micro_batch=4, validation_tokens=n_tokens),
        )
        for n_tokens in (8_000, 1_000_000)
    ]
    assert results[0] == results[1]


def test_stops_where_asked(model):
    texts = ["x = 1\n" * 50, *TEXTS]
    stage = stage_with(seq_len=32, micro_batch=2, validation_tokens=96)
    (found, same) = (
        validate(model, fixed_tokenizer(), Texts(t), stage) for t in (texts, texts[:1])
    )
    assert found == same  # three rows, all of the first document


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_micro_batches_make_no_difference(model, micro_batch):
    one, other = (
        validate(
            model,
            fixed_tokenizer(),
            Texts(TEXTS),
            stage_with(seq_len=32, micro_batch=size, validation_tokens=600),
        )
        for size in (2, micro_batch)
    )
    assert one == pytest.approx(other, rel=1e-6)


def test_a_model_that_guesses_needs_the_logarithm_of_the_vocabulary():
    tokenizer = fixed_tokenizer()
    model = Transformer(ModelConfig(32, 1, 4, 2, 64, tokenizer.vocab_size))  # all zero
    torch.nn.init.zeros_(model.lm_head.weight)
    found = validate(model, tokenizer, Texts(TEXTS), stage_with(seq_len=64, micro_batch=1))
    assert found["validation_loss"] == pytest.approx(math.log(tokenizer.vocab_size))


def test_bfloat16_stays_close(model):
    stage = stage_with(seq_len=64, micro_batch=2)
    exact = validate(model, fixed_tokenizer(), Texts(TEXTS), stage)
    rounded = validate(
        model, fixed_tokenizer(), Texts(TEXTS), stage.model_copy(update={"dtype": "bfloat16"})
    )
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact
