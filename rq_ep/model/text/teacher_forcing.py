"""Teacher forcing: known text through a decoder or an encoder-decoder in one forward pass.

Axes: B windows, T tokens of a window, W tokens that an encoder-decoder writes.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig


def teacher_forcing_inputs(
    config: PretrainedConfig, tokens_BT: Tensor, *, include_last: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of a forward pass over windows of text, and the tokens that its logits predict.

    An encoder-decoder reads the first half of each window, and its decoder is given the second.

    Args:
        config: of the model.
        tokens_BT: [B, T] int64, T at least 2.
        include_last: whether the last token is an input too, although nothing follows it that its logits could predict.

    Returns:
        arguments, and written_BW [B, W]: the logits at one position predict the token at the next.
    """
    inputs = slice(None) if include_last else slice(-1)
    if not config.is_encoder_decoder:
        return {"input_ids": tokens_BT[:, inputs]}, tokens_BT
    half = tokens_BT.shape[1] // 2
    start_B1 = tokens_BT.new_full((len(tokens_BT), 1), decoder_start_token(config))
    written_BW = torch.cat([start_B1, tokens_BT[:, half:]], dim=1)
    return {"input_ids": tokens_BT[:, :half], "decoder_input_ids": written_BW[:, inputs]}, written_BW


def decoder_start_token(config: PretrainedConfig) -> int:
    """The token before the first one that a decoder writes."""
    start: int | None = getattr(config, "decoder_start_token_id", None)
    return config.pad_token_id or 0 if start is None else start
