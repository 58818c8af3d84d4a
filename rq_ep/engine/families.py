"""Which models continuous batching can serve, and with which attention."""

from transformers import PretrainedConfig, PreTrainedModel

from rq_ep.core.errors import UserError


def check_servable(config: PretrainedConfig) -> None:
    """Refuse a model that continuous batching cannot run, or whose attention the paged KV cache cannot hold.

    Raises:
        UserError: multi-head latent attention (MLA): its keys and values differ in width, the cache has one width.
            An encoder-decoder, which continues no prompt.
    """
    if config.is_encoder_decoder:
        raise UserError(
            f"model type {config.model_type!r} is an encoder-decoder, which cannot be served over HTTP: use "
            "rq_ep.load(...).generate(...), or serve a decoder-only model"
        )
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UserError(
            f"model type {text.model_type!r} uses multi-head latent attention (MLA), which the server's KV cache "
            "cannot hold yet: use rq_ep.load(...).generate(...), or serve a model of another type"
        )


def set_attention(model: PreTrainedModel, attn_implementation: str | None) -> str:
    """Choose the attention of a model and return its name; by default sdpa, or eager for families without it.

    Raises:
        UserError: transformers does not know the implementation, or not for this family.
    """
    chosen = attn_implementation or ("sdpa" if model._supports_sdpa else "eager")
    if chosen not in ("sdpa", "eager") and "flash" not in chosen:
        raise UserError(f"--attn-implementation {chosen}: continuous batching runs on sdpa, eager or a flash variant")
    try:
        model.set_attn_implementation(chosen)
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--attn-implementation {chosen}: {reason}") from None
    return chosen
