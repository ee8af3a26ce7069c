"""What the decoder layers of all families share; they differ in how queries attend to the image."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.transformer_layer import TransformerLayer


class QueryLayer(TransformerLayer):
    """Self-attention among the queries, cross-attention to the image, then the MLP. Source: arXiv:2005.12872, A.3.

    A subclass makes `cross_attention` and says what it attends to.
    """

    def __init__(self, dim: int, num_heads: int, *, dropout: float, compute: Compute, rngs: nnx.Rngs, **layer):
        shared: dict = dict(dropout=dropout, compute=compute, rngs=rngs)
        super().__init__(dim, **shared, **layer)
        self.self_attention = MultiHeadAttention(dim, num_heads, xavier=True, **shared)
        self.self_attention_norm = LayerNorm(dim, dtype=compute.dtype)
        self.cross_attention_norm = LayerNorm(dim, dtype=compute.dtype)

    def decode(
        self,
        content: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"] | None,
        attend_image: Callable[[Array], Array],
        keys: Sequence[jax.Array | None],
        **attention_mask,
    ) -> Float[Array, "B Q D"]:
        """`query_position` is added to the self-attention's queries and keys, not to its values.

        attend_image: content -> what its cross-attention finds. keys: for dropout of the self-attention's
        probabilities, and of the three sublayers. attention_mask: of the self-attention, see MultiHeadAttention.
        """

        def attend_queries(x):
            query = x if query_position is None else x + query_position
            return self.self_attention(query, query, x, dropout_key=keys[0], **attention_mask)

        content = self.sublayer(content, self.self_attention_norm, attend_queries, keys[1])
        content = self.sublayer(content, self.cross_attention_norm, attend_image, keys[2])
        return self.mlp_sublayer(content, keys[3])
