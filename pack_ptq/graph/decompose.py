"""Take `nn.MultiheadAttention` apart into linear layers and plain products, which a trace can see and quantize.

Torch runs the module as one call on raw parameters: `multi_head_attention_forward`, or a fused fast path.
`torch.ao.nn.quantizable.MultiheadAttention` is no way out: torch.ao is deprecated, and that class refuses `is_causal`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pack_ptq.errors import UserError
from pack_ptq.graph.trace import trace_network


class DecomposedAttention(nn.Module):
    """Attention with the numbers, the signature and the result of an `nn.MultiheadAttention`, made of `nn.Linear`s.

    In heads of size d: `out_proj(softmax(q k^T / sqrt(d) + mask) v)`, as in "Attention Is All You Need"
    (arXiv:1706.03762).

    Args:
        attention: Whose parameters it takes over.
        fused: Project query, key and value by one layer `in_proj`, for self-attention, where the three are the same
            tensor and so must be of one size; otherwise by the layers `q_proj`, `k_proj` and `v_proj`.
    """

    # Parents read these of their attention; as they stand, they forbid `nn.TransformerEncoderLayer` its fast path.
    _qkv_same_embed_dim = False
    in_proj_weight = None
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention, fused: bool) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        self.bias_k, self.bias_v, self.add_zero_attn = attention.bias_k, attention.bias_v, attention.add_zero_attn
        self.fused = fused
        if fused:
            self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = _projections(attention)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend like `nn.MultiheadAttention`.

        Args:
            query: Shape (N, L, E) if `batch_first`, otherwise (L, N, E); without a batch (L, E).
            key: Shape (N, S, kdim), (S, N, kdim) or (S, kdim).
            value: Shape (N, S, vdim), (S, N, vdim) or (S, vdim).
            key_padding_mask: Shape (N, S) or (S); true where a key is not to be read, or floats to add to the scores.
            need_weights: Give the softmax's result too.
            attn_mask: Shape (L, S) or (N * heads, L, S); of the same meaning.
            average_attn_weights: Give the mean of the weights over the heads.
            is_causal: A hint that `attn_mask` is the causal one.

        Returns:
            The output, of the query's shape, and the weights or None, shape (N, L, S), with all heads (N, heads, L, S);
            without a batch both lack N. Keys of `bias_k` and `add_zero_attn` count in S.

        Raises:
            UserError: `is_causal` without an `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise UserError("attn_mask is None with is_causal=True; allowed: the causal mask, for is_causal is a hint")
        q, k, v = (self._batch_first(x) for x in self._project(query, key, value))
        k, v = self._lengthen(k, self.bias_k), self._lengthen(v, self.bias_v)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        # Torch puts the hint before the mask in this case only.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
            return self.out_proj(self._restore(mixed, query.dim())), None
        weights = self._weights(q, k, mask, dropout)
        output = self.out_proj(self._restore(torch.matmul(weights, v), query.dim()))
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return output, weights if query.dim() == 3 else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        # The linear layers come before any change of layout, so that those that read one tensor are seen to.
        if not self.fused:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key is value:
            return self.in_proj(query).chunk(3, dim=-1)
        return tuple(self.in_proj(x).chunk(3, dim=-1)[i] for i, x in enumerate((query, key, value)))

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _restore(self, mixed: Tensor, dims: int) -> Tensor:
        """Bring (N, heads, L, d) into the query's shape, of `dims` dimensions."""
        mixed = mixed.transpose(1, 2).flatten(2)
        if dims == 2:
            return mixed.squeeze(0)
        return mixed if self.batch_first else mixed.transpose(0, 1)

    def _lengthen(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append the learned and the zero key or value to a sequence, shape (N, S, E)."""
        if bias is not None:
            x = torch.cat([x, bias.expand(len(x), 1, -1)], dim=1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Give what is to be added to the scores, in a shape that expands to (N, heads, L, S)."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype)
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, dtype).reshape(-1, 1, 1, key_padding_mask.shape[-1])
            mask = padding if mask is None else mask + padding
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(mask, (0, extra)) if extra and mask is not None else mask

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(-2, -1))
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        return F.dropout(weights, dropout) if dropout else weights


def decompose_attention(network: nn.Module, example: Tensor) -> list[str]:
    """Replace every `nn.MultiheadAttention` that a forward pass calls by a `DecomposedAttention`; in place.

    One that is only ever called on a single tensor, as query, key and value, gets a fused projection, any other three.

    Args:
        network: In evaluation mode.
        example: One or more input samples, shape (batch, ...).

    Returns:
        Paths of the replaced modules.

    Raises:
        UserError: The network has attention, and its forward pass cannot be traced.
    """
    same = _observe(network, example)
    decomposed: dict[nn.Module | None, nn.Module] = {
        attention: DecomposedAttention(attention, fused) for attention, fused in same.items()
    }
    paths = [path for path, module in network.named_modules() if module in decomposed]
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child in decomposed:
                setattr(parent, name, decomposed[child])
        if decomposed and isinstance(parent, nn.TransformerEncoder):
            # It would make nested tensors of padded input, which only the layers' fast path takes.
            parent.use_nested_tensor = False
    return paths


def _observe(network: nn.Module, example: Tensor) -> dict[nn.MultiheadAttention, bool]:
    """Tell for each called attention whether every call was on one tensor as query, key and value."""
    # A subclass with a forward of its own may do more.
    attentions = [
        module
        for module in network.modules()
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    ]
    same: dict[nn.MultiheadAttention, bool] = {}

    def look(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> None:
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        same[module] = same.get(module, True) and query is key is value

    handles = [attention.register_forward_pre_hook(look, with_kwargs=True) for attention in attentions]
    try:
        # Also keeps the encoder layers' fast path off, which does not call their attention.
        if attentions:
            trace_network(network, example)
    finally:
        for handle in handles:
            handle.remove()
    return same


def _projections(attention: nn.MultiheadAttention) -> list[nn.Linear]:
    packed = attention.in_proj_weight
    separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    weights = separate if packed is None else packed.chunk(3)
    biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # On the meta device, for an initialisation would draw random numbers.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer


def _parameter(x: Tensor) -> nn.Parameter:
    return x if isinstance(x, nn.Parameter) else nn.Parameter(x.detach().clone(), requires_grad=x.requires_grad)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a mask that is true where nothing is to be read one of -inf there and 0 elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
