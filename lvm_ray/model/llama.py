"""The decoder: a stock LLaMA that speaks picture tokens.

`build` gives a `transformers.LlamaForCausalLM` with attention bias, an untied head and no special tokens: every code is an
ordinary one, code 0 included. Only the input embedding may differ from stock: with `embedding: codebook` a token's
vector is its frozen codebook vector through one trained linear layer (paper section 3.1), which `export` folds into a
plain table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from lvm_ray.model.shape import Shape
from lvm_ray.recipe_sections import ModelSection

INITIAL_GAIN = 0.7
INITIAL_HEAD = 0.5
# How much likelier an aligned head of a fresh model finds its place than the places beside it, as log-odds.
ALIGNED_CONTRAST = 1.5
ALIGNED_PART = 0.75  # of the heads


class CodebookEmbedding(nn.Module):
    """Tokens [B, T] -> vectors [B, T, D]: the frozen codebook through a trained linear layer without bias.

    The layer's name contains "embed", which keeps DeepSpeed's Muon away from it: an embedding is AdamW's.
    """

    codebook_VE: torch.Tensor

    def __init__(self, codebook_VE: torch.Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("codebook_VE", codebook_VE.detach().float().clone(), persistent=False)
        self.embed_projection = nn.Linear(codebook_VE.shape[1], width, bias=False)
        # Vectors of unit variance over the whole codebook, whatever its scale: small models start to learn at once.
        scale = self.codebook_VE.pow(2).sum(dim=1).mean().sqrt().item()
        nn.init.normal_(self.embed_projection.weight, std=1 / max(scale, 1e-6))

    def table(self) -> torch.Tensor:
        """Every code's vector: [V, D]."""
        projected: torch.Tensor = self.embed_projection(self.codebook_VE.to(self.embed_projection.weight.dtype))
        return projected

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        # A batch has more tokens than the codebook has codes, so the codes are projected and not the tokens.
        return F.embedding(tokens_BT, self.table())


def build(section: ModelSection, codebook_VE: torch.Tensor, tokens: int, image_tokens: int, seed: int) -> LlamaForCausalLM:
    """A fresh model in fp32, the same for the same seed.

    codebook_VE   float [V, E], the tokenizer's; with `embedding: table` only V counts
    tokens        of a sentence: the longest input
    image_tokens  of a picture: where aligned heads look
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = LlamaForCausalLM(shape_of(section, len(codebook_VE), tokens).config())
        _initialise(llama)
        if section.embedding == "codebook":
            llama.model.embed_tokens = CodebookEmbedding(codebook_VE, section.width)
            _codebook_head(llama, codebook_VE)
    if section.aligned_heads:
        align_heads(llama, image_tokens)
    return llama


def inherit(student: LlamaForCausalLM, teacher: LlamaForCausalLM, layers: Sequence[int]) -> None:
    """Start a student from some layers of a teacher of its width, and from its embedding, last norm and head (as DistilBERT
    does, Sanh et al. 2019).

    The teacher comes as exported, its embedding a plain table; a codebook embedding takes the projection that gives this
    table. Both in fp32. Biases that the teacher does not have, as LVM's models, start at zero, which is the same.
    """
    with torch.no_grad():
        for own, layer in zip(student.model.layers, layers, strict=True):
            own.load_state_dict(_with_biases(teacher.model.layers[layer].state_dict(), own))
        student.model.norm.load_state_dict(teacher.model.norm.state_dict())
        student.lm_head.load_state_dict(teacher.lm_head.state_dict())
        table_VD, embedding = teacher.model.embed_tokens.weight, student.model.embed_tokens
        if isinstance(embedding, CodebookEmbedding):
            embedding.embed_projection.weight.copy_(projection_of(embedding.codebook_VE, table_VD))
        else:
            embedding.weight.copy_(table_VD)


def _with_biases(weights: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
    missing = [name for name in layer.state_dict() if name.endswith("bias") and name not in weights]
    return weights | {name: torch.zeros_like(layer.state_dict()[name]) for name in missing}


def projection_of(codebook_VE: torch.Tensor, table_VD: torch.Tensor) -> torch.Tensor:
    """The linear layer that turns a codebook into a table, by least squares: float32 [D, E], the same to the bit every time.

    A codebook without full rank gives the shortest solution. By the normal equations in float64: torch.linalg.lstsq is no
    function of its arguments: its last bits change from call to call on one thread, presumably with where its memory lies.
    """
    codebook_VE, table_VD = codebook_VE.double(), table_VD.double()
    moments_EE, products_ED = codebook_VE.T @ codebook_VE, codebook_VE.T @ table_VD
    layer_ED: torch.Tensor = torch.linalg.pinv(moments_EE, hermitian=True) @ products_ED
    return layer_ED.T.float()


def shape_of(section: ModelSection, codes: int, tokens: int) -> Shape:
    """The shape of a model section: biases in its attention alone, as many keys as queries."""
    return Shape(
        codes=codes,
        width=section.width,
        layers=section.layers,
        heads=section.heads,
        key_heads=section.heads,
        head_width=section.width // section.heads,
        mlp=section.mlp,
        tokens=tokens,
        norm_epsilon=section.norm_epsilon,
        rope_base=section.rope_base,
        attention_bias=True,
        mlp_bias=False,
    )


def align_heads(llama: LlamaForCausalLM, image_tokens: int) -> None:
    """Start three quarters of each layer's heads looking at the tokens beneath, around and above the answer's next token.

    Under rotary positions R, a query bias R(-d) a and a key bias a score a^T R(d + j - i) a between positions i and j,
    whatever the tokens are: largest where i - j = d. The heads of all layers take the offsets of `aligned_offsets` in turn.
    The other heads start without a pattern.
    """
    config = llama.config
    size = config.hidden_size // config.num_attention_heads
    aligned = int(ALIGNED_PART * config.num_attention_heads)
    offsets = aligned_offsets(image_tokens)
    frequency_E = llama.model.rotary_emb.inv_freq.float()  # one per pair of dimensions (e, e + size / 2)
    # Score of the place less that of its neighbour, per squared length of the pattern, after the 1 / sqrt(size) of attention.
    gap = (1 - torch.cos(frequency_E)).sum().item() / math.sqrt(size)
    length = math.sqrt(ALIGNED_CONTRAST / gap)
    with torch.no_grad():
        for number, layer in enumerate(llama.model.layers):
            for head in range(aligned):
                offset = offsets[(number * aligned + head) % len(offsets)]
                place = slice(head * size, (head + 1) * size)
                key = torch.cat([torch.full_like(frequency_E, length), torch.zeros_like(frequency_E)])
                query = torch.cat([length * torch.cos(offset * frequency_E), -length * torch.sin(offset * frequency_E)])
                layer.self_attn.k_proj.bias[place] = key
                layer.self_attn.q_proj.bias[place] = query


def aligned_offsets(image_tokens: int) -> list[int]:
    """How far back an aligned head looks, the most useful first.

    The answer follows its query, and its token p is predicted one position before it stands: the query's token p lies N - 1
    back. Then come that token's neighbours, and the answer's own tokens above p.
    """
    row = math.isqrt(image_tokens)
    beneath = image_tokens - 1
    beside = [beneath, beneath - 1, beneath + 1, beneath - row, beneath + row]
    corners = [beneath - row - 1, beneath - row + 1, beneath + row - 1, beneath + row + 1]
    return [offset for offset in (*beside, row - 1, *corners, row, row - 2) if offset >= 0]


def _initialise(llama: LlamaForCausalLM) -> None:
    """Normal weights, smaller where more inputs add up; what a layer adds to the residual stream is scaled down by the
    square root of the additions.

    A width of 128 wants larger weights than the 0.02 that large models start from.
    """
    additions = math.sqrt(2 * llama.config.num_hidden_layers)
    for name, parameter in llama.named_parameters():
        if parameter.ndim >= 2:
            std = INITIAL_GAIN / math.sqrt(parameter.shape[1])
            nn.init.normal_(parameter, std=std / additions if name.endswith(("o_proj.weight", "down_proj.weight")) else std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def _codebook_head(llama: LlamaForCausalLM, codebook_VE: torch.Tensor) -> None:
    """Start the head as a random projection of the codebook, so that codes alike get logits alike from the first step."""
    centred_VE = codebook_VE.float() - codebook_VE.float().mean(dim=0)
    centred_VE = centred_VE / centred_VE.pow(2).sum(dim=1).mean().sqrt().clamp(min=1e-6)
    projection_ED = torch.randn(centred_VE.shape[1], llama.config.hidden_size)
    with torch.no_grad():
        llama.lm_head.weight.copy_(centred_VE @ projection_ED * (INITIAL_HEAD / math.sqrt(llama.config.hidden_size)))
