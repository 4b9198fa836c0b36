"""The huge constant first text token of SDXL's CLIP encoders, as an exact reparametrization.

No LayerNorm of a pre-norm encoder sees the channel mean of its residual stream, so the mean can be scaled wherever it is written
and divided out wherever cross-attention reads. Little else can be done: the stacked key and value weights have full column rank, so
a state x can only become A x with one matrix A for all tokens, and the LayerNorms leave to A only the mean (and rotations). The
first token thus becomes huge exactly if its mean already stands out from the other tokens' means. ``prepare_first_token`` arranges
that once, before weights are stored, by a small and measured change; ``raise_first_token`` is then exact for every prompt.

A pipeline without such a first token has no exact twin with one. Real SDXL does not need it: its first token is huge already.
"""

from collections.abc import Iterator, Sequence

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextEmbeddings


def prepare_first_token(pipe: StableDiffusionXLPipeline, prompts: Sequence[str]) -> float:
    """Make the first text token the only one with a channel mean, in place, so that ``stress`` can raise it.

    This one step changes the function, slightly: it is part of making a pipeline, before its weights are stored. Every write of
    each CLIP encoder is centred (invisible to its LayerNorms) and position 0 gets a mean as large as its state's standard
    deviation. Cross-attention keeps reading the first token exactly; in place of the other tokens' lost means it gets their best
    linear prediction from the centred states (ridge regression over ``prompts``; a few hundred make it sharp).

    Returns the relative root-mean-square change, over ``prompts``, of what the key and value projections compute. Raises
    ``ValueError`` for a pipeline that is not SDXL's.
    """
    if not isinstance(pipe, StableDiffusionXLPipeline) or pipe.unet.encoder_hid_proj is not None:
        raise ValueError(
            "prepare_first_token: pipe must be a StableDiffusionXLPipeline whose UNet reads the text states directly, "
            f"got {type(pipe).__name__}. Other families have no constant first token to raise."
        )
    lost, signal = 0.0, 0.0
    with torch.no_grad():
        states = _text_states(pipe, prompts)
        for weight in (readers := _text_readers(pipe.unet)):
            signal += (states[:, 1:] @ weight.cpu().double().T).square().sum().item()
        for encoder, columns in _encoder_columns(pipe):
            mean = states[..., columns].mean(dim=-1)
            centred = states[..., columns] - mean[..., None]
            predict = _predict_mean(centred[:, 1:].flatten(0, 1), mean[:, 1:].flatten())
            missed = (mean[:, 1:] - centred[:, 1:] @ predict).square().sum().item()
            first, size = centred[0, 0], centred[0, 0].std().item()
            along = predict + (mean[0, 0] - first @ predict) / (size * len(first))
            for weight in readers:
                w = weight[:, columns].cpu().double()
                by_mean = w.sum(dim=1, keepdim=True)
                lost += missed * by_mean.square().sum().item()
                weight[:, columns] = (w - by_mean / len(first) + by_mean * along).to(weight)
            _scale_mean(encoder, 0.0)
            embeddings = next(m for m in encoder.modules() if isinstance(m, CLIPTextEmbeddings))
            embeddings.position_embedding.weight[0] += size
    return (lost / signal) ** 0.5


def _predict_mean(centred: Tensor, mean: Tensor) -> Tensor:
    """Ridge regression of the means [T] on the centred states [T, K]: coefficients [K] that sum to zero."""
    gram = centred.T @ centred
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    predict = torch.linalg.solve(gram + ridge, centred.T @ mean)
    return predict - predict.mean()


def raise_first_token(pipe: StableDiffusionXLPipeline, ratio: float, prompts: Sequence[str]) -> bool:
    """Scale the channel means, in place, until the first text token is ``ratio`` times all others of ``prompts``; exact.

    Returns whether it could: an encoder is left alone where ``ratio`` would raise the other tokens too, both where
    ``encoder_hid_proj`` stands between the encoders and cross-attention.
    """
    if pipe.unet.encoder_hid_proj is not None:
        return False
    raised = False
    with torch.no_grad():
        states = _text_states(pipe, prompts)
        largest = states[:, 1:].abs().max().item()
        for encoder, columns in _encoder_columns(pipe):
            mean = states[..., columns].mean(dim=-1)
            first, rest = mean[0, 0].abs().item(), mean[:, 1:].abs().max().item()
            if first < 4 * ratio * rest:
                continue
            factor = max(1.0, ratio * largest / first)
            _scale_mean(encoder, factor)
            for weight in _text_readers(pipe.unet):
                weight[:, columns] += (1 / factor - 1) * weight[:, columns].mean(dim=1, keepdim=True)
            raised = True
    return raised


def _text_readers(unet: UNet2DConditionModel) -> list[Tensor]:
    """Weights [N, K] of every linear that reads the text states."""
    cross = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    return [layer.weight.data for m in cross for layer in (m.to_k, m.to_v)]


def _text_states(pipe: StableDiffusionXLPipeline, prompts: Sequence[str]) -> Tensor:
    """Float64 states [B, T, K] that the cross-attentions read."""
    return pipe.encode_prompt(list(prompts), num_images_per_prompt=1, do_classifier_free_guidance=False)[0].cpu().double()


def _encoder_columns(pipe: StableDiffusionXLPipeline) -> Iterator[tuple[nn.Module, slice]]:
    """Each text encoder and the channels of the concatenated states that it writes."""
    start = 0
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        if encoder is not None:
            width = encoder.config.hidden_size
            yield encoder, slice(start, start + width)
            start += width


def _scale_mean(encoder: nn.Module, factor: float) -> None:
    """Multiply the channel mean of a CLIP encoder's residual stream wherever it is written; its LayerNorms cannot see this."""
    for module in encoder.modules():
        if isinstance(module, CLIPTextEmbeddings):
            for table in (module.token_embedding.weight.data, module.position_embedding.weight.data):
                table += (factor - 1) * table.mean(dim=1, keepdim=True)
        elif isinstance(module, CLIPEncoderLayer):
            for written in (*module.self_attn.out_proj.parameters(), *module.mlp.fc2.parameters()):
                written.data += (factor - 1) * written.mean(dim=0, keepdim=True)
