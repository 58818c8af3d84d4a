import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rq_ep.model.text.byte_tokenizer import BOS, EOS, PAD, VOCAB_SIZE, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Saved and loaded again, as users meet it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(512).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(alphabet="<|eos|> \n\t'nt"))
def test_tokens_are_the_bytes_and_decode_to_the_text(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_lie_behind_the_bytes(tokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD, BOS, EOS)
    assert len(tokenizer) <= VOCAB_SIZE
    assert tokenizer.decode([65, EOS, 66], skip_special_tokens=True) == "AB"
    assert tokenizer("<|eos|>").input_ids == list(b"<|eos|>")


def test_bytes_that_are_no_text_do_not_stop_decoding(tokenizer) -> None:
    assert tokenizer.decode([0xE6, 0xBC]) == "\ufffd"


def test_chat_template_alternates_roles_and_texts(tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "system\nBe brief.\nuser\nHi\nassistant\n"
