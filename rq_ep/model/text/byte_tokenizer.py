"""A byte-level tokenizer, whose tokens are the 256 bytes: it needs no training and encodes every text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD, BOS, EOS = 256, 257, 258
VOCAB_SIZE = 260  # 259 tokens; a multiple of four keeps the rows of the output matrix aligned
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ message['role'] + '\\n' + message['content'] + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"""


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer: token i is byte i; pad, bos and eos follow, which no text is encoded to.

    Args:
        max_length: longest sequence of the model, in tokens.
    """
    # BPE without merges, over the printable characters by which ByteLevel represents bytes.
    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|bos|>", "<|eos|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "<|eos|>" in a text is seven characters, not the end
    )
