"""Running known text through a model in one pass, whichever kind of language model it is."""

import torch
from torch import Tensor
from transformers import PretrainedConfig


def taught(config: PretrainedConfig, tokens_BT: Tensor, *, reads_last: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of a forward pass over windows of text, and the tokens that its logits are about.

    An encoder-decoder reads the first half of each window, and is made to write the second.

    Args:
        config: of the model.
        tokens_BT: [B, T] int64, T at least 2.
        reads_last: whether the last token is read, too, from which nothing is predicted.

    Returns:
        arguments, and written_BW [B, W]: the logits at one position predict the token at the next.
    """
    read = slice(None) if reads_last else slice(-1)
    if not config.is_encoder_decoder:
        return {"input_ids": tokens_BT[:, read]}, tokens_BT
    half = tokens_BT.shape[1] // 2
    start_B1 = tokens_BT.new_full((len(tokens_BT), 1), start_token(config))
    written_BW = torch.cat([start_B1, tokens_BT[:, half:]], dim=1)
    return {"input_ids": tokens_BT[:, :half], "decoder_input_ids": written_BW[:, read]}, written_BW


def start_token(config: PretrainedConfig) -> int:
    """What a decoder is given before the first token that it writes."""
    start: int | None = getattr(config, "decoder_start_token_id", None)
    return config.pad_token_id or 0 if start is None else start
