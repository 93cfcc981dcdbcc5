import json

import pytest

from codellama.tokenizer import Tokenizer
from codellama.tokenizer.chat import TAGS, dialog_example, dialog_prompt, stop_ids


def dialog(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.fixture(scope="session")
def llama_inst(llama_file):
    return Tokenizer.load(llama_file, variant="7b-instruct")


def test_the_model_card_of_70b(shared_data, llama_70b):
    card = json.loads((shared_data / "llama-tokenizer" / "model-card-70b-dialog.json").read_text())
    assert llama_70b.encode_dialog(card["chat"]) == card["ids"]
    assert len(card["ids"]) == 49
    # The system message is put in where it is missing, with nothing in it.
    start = [1, 7562, 29901, 1788, 32_015, 7562, 29901, 1404, 13, 13, 3824, 1404, 2346, 32_015]
    assert llama_70b.encode_dialog(card["chat"][1:])[: len(start)] == start


def test_destinations_are_part_of_the_header(llama_70b):
    messages = dialog("First user query", "Model response to first query", "Second user query")
    plain = llama_70b.encode_dialog(messages)
    messages[1]["destination"] = "user"
    header = [7562, 29901, 20_255]
    at = next(n for n in range(len(plain)) if plain[n : n + 3] == header) + 3
    expected = [*plain[:at], 13, 14_994, 3381, 29901, 1404, *plain[at:]]
    assert llama_70b.encode_dialog(messages) == expected


def test_inst_prompts(llama_inst):
    e = llama_inst.encode
    assert llama_inst.encode_dialog(dialog("  Hi \n")) == [1, *e("[INST] Hi [/INST]")]
    assert llama_inst.encode_dialog(dialog("Hi"))[:4] == [1, 518, 25580, 29962]
    assert llama_inst.encode_dialog(dialog("Hi", " Hello. ", "Bye", system=" Be\n")) == [
        *[1, *e("[INST] <<SYS>>\n Be\n\n<</SYS>>\n\nHi [/INST] Hello. "), 2],
        *[1, *e("[INST] Bye [/INST]")],
    ]
    assert stop_ids(llama_inst) == (2,)


def test_examples_begin_with_the_prompt_and_learn_from_answers_only(small_tokenizer, small_source):
    messages = dialog("Hi", " Hello. ", "Bye", "See you", system="Be kind")
    for t in (small_tokenizer, small_source):
        prompt = dialog_prompt(t, messages[:-1])
        ids, mask = dialog_example(t, messages)
        assert ids[: len(prompt)] == prompt
        assert len(ids) == len(mask)
        assert all(mask[len(prompt) :])
        assert ids[-1] == stop_ids(t)[-1]
        learned = [i for i, learn in zip(ids, mask, strict=True) if learn]
        assert learned.count(ids[-1]) == 2
        assert t.decode(learned).split() in (["Hello.", "See", "you"], ["Hello.See", "you"])
    assert stop_ids(small_tokenizer) == (2,)
    assert stop_ids(small_source) == (2, small_source.step_id)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("where", range(3))
def test_tags_are_refused(small_tokenizer, small_source, tag, where):
    messages = dialog("a", "b", "c")
    messages[where]["content"] = f"x{tag}"
    for t in (small_tokenizer, small_source):
        with pytest.raises(ValueError, match=f"message {where}: special tags are not allowed"):
            t.encode_dialog(messages)
        with pytest.raises(ValueError, match="special tags"):
            dialog_example(t, [*messages, {"role": "assistant", "content": "d"}])


def test_tags_in_system_texts_and_destinations_are_refused(small_source):
    with pytest.raises(ValueError, match="message 0: special tags"):
        small_source.encode_dialog(dialog("a", system="<<SYS>>"))
    with pytest.raises(ValueError, match="message 0: special tags"):
        small_source.encode_dialog([{"role": "user", "content": "a", "destination": "<step>"}])


def test_other_special_texts_are_plain_text(small_tokenizer, small_source):
    content = "<s> </s> <PRE> ▁<PRE> <EOT> <unk> <<SYS [INST"
    for t in (small_tokenizer, small_source):
        ids = t.encode_dialog(dialog(content))
        assert ids.count(t.bos_id) == 1
        assert not {t.unk_id, t.eos_id, t.prefix_id, t.eot_id}.intersection(ids)
        assert content in t.decode(ids)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "the dialog is empty"),
        (dialog(system="x"), "last message must be of role 'user', not 'system'"),
        (dialog("a", "b"), "last message must be of role 'user', not 'assistant'"),
        (dialog("a", "b")[1:], "message 0: role 'assistant' where 'user' is due"),
        ([*dialog("a"), *dialog("b")], "message 1: role 'user' where 'assistant' is due"),
        ([*dialog("a"), *dialog(system="b")], "message 1: role 'system' where 'assistant' is due"),
        ([{"role": "tool", "content": "x"}], "message 0: unknown role 'tool'; accepted: system, "),
        ([{"content": "x"}], "message 0: unknown role None"),
        ([{"role": "user"}], "message 0: expected a role and a content"),
        ([{"role": "user", "content": None}], "message 0: expected a role and a content"),
        (["hello"], "message 0: expected a role and a content"),
    ],
)
def test_dialogs_out_of_order_are_refused(small_tokenizer, small_source, messages, error):
    for t in (small_tokenizer, small_source):
        with pytest.raises(ValueError, match=error):
            t.encode_dialog(messages)


def test_examples_must_end_with_an_answer(small_tokenizer):
    with pytest.raises(ValueError, match="last message must be of role 'assistant', not 'user'"):
        dialog_example(small_tokenizer, dialog("a"))


def test_empty_answers_are_possible(small_tokenizer, small_source):
    for t in (small_tokenizer, small_source):
        ids, mask = dialog_example(t, dialog("a", ""))
        assert mask[-1]
        assert ids[-1] == stop_ids(t)[-1]
