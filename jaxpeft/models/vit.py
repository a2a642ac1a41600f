"""ViT and DeiT, vision transformers, in Flax NNX.

    h = [cls; patches] + positions
    h = h + Attention(LayerNorm(h)),   h = h + W_2 act(W_1 LayerNorm(h))

The weights of all layers are stacked on axis 0 and one `jax.lax.scan` runs them. Letters in shapes:
B images, H x W pixels, C channels, P patches, T tokens (P and the class token; in a DeiT also the
distillation token), D model, N heads, L layers.

References: Dosovitskiy et al. 2020 (arXiv 2010.11929), Touvron et al. 2020 (2012.12877).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxpeft.flax.mark import Point
from jaxpeft.models.decoder import KEEP_PROJECTIONS, Linear, Policy
from jaxpeft.models.layers import ACTIVATIONS, LayerNorm
from jaxpeft.models.model import Model
from jaxpeft.models.names import Name
from jaxpeft.models.vit_config import CLASSIFY, ViTConfig
from jaxpeft.models.vit_names import head_names, names
from jaxpeft.models.vit_positions import resize_grid


class Projections(nnx.Module):
    """The maps to queries, keys and values, under the name that Hugging Face gives them."""

    def __init__(self, config: ViTConfig, **kw: Any):
        shape = (config.num_hidden_layers, config.hidden_size, config.hidden_size)
        self.query = Linear(shape, bias=config.qkv_bias, **kw)
        self.key = Linear(shape, bias=config.qkv_bias, **kw)
        self.value = Linear(shape, bias=config.qkv_bias, **kw)


class Output(nnx.Module):
    """A sublayer's last projection."""

    def __init__(self, shape, **kw: Any):
        self.dense = Linear(shape, bias=True, **kw)

    def __call__(self, x: Array) -> Array:
        return self.dense(x)


class Attention(nnx.Module):
    """Multi-head attention of every token to every token."""

    def __init__(self, config: ViTConfig, **kw: Any):
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.attention = Projections(config, **kw)
        self.output = Output((config.num_hidden_layers, width, width), **kw)
        self.query, self.key, self.value = Point(), Point(), Point()
        self.context = Point()
        self.delta = Point()

    def __call__(self, x: Array, stream: Array) -> Array:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.query(self.attention.query(x).reshape(heads))
        k = self.key(self.attention.key(x).reshape(heads))
        v = self.value(self.attention.value(x).reshape(heads))
        y = self.context(jax.nn.dot_product_attention(q, k, v), query=q)
        y = self.output(y.reshape(*x.shape[:-1], -1))
        return self.delta(y, stream=stream, sum=lambda: stream + y)


class Intermediate(nnx.Module):
    """`y = act(W_1 x)`."""

    def __init__(self, config: ViTConfig, **kw: Any):
        shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
        self.activation = config.hidden_act
        self.dense = Linear(shape, bias=True, **kw)

    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.activation](self.dense(x))


class MLPOutput(nnx.Module):
    """`y = W_2 x`."""

    def __init__(self, config: ViTConfig, **kw: Any):
        shape = (config.num_hidden_layers, config.intermediate_size, config.hidden_size)
        self.dense = Linear(shape, bias=True, **kw)
        self.delta = Point()

    def __call__(self, x: Array, stream: Array) -> Array:
        y = self.dense(x)
        return self.delta(y, stream=stream, sum=lambda: stream + y)


class Block(nnx.Module):
    """One layer; as an attribute of `Encoder` its weights hold all layers, stacked on axis 0."""

    def __init__(self, config: ViTConfig, **kw: Any):
        norm = dict(eps=config.layer_norm_eps, dtype=kw["dtype"])
        shape = (config.num_hidden_layers, config.hidden_size)
        self.layernorm_before = LayerNorm(shape, **norm)
        self.attention = Attention(config, **kw)
        self.layernorm_after = LayerNorm(shape, **norm)
        self.intermediate = Intermediate(config, **kw)
        self.output = MLPOutput(config, **kw)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.layernorm_before(x), x)
        return x + self.output(self.intermediate(self.layernorm_after(x)), x)


class Encoder(nnx.Module):
    """All layers, `[B, T, D]` to `[B, T, D]`, for any T."""

    def __init__(self, config: ViTConfig, remat: Policy | None, **kw: Any):
        self.remat = remat
        self.layer = Block(config, **kw)

    def __call__(self, x: Array) -> Array:
        def step(x: Array, block: Block) -> tuple[Array, None]:
            return block(x), None

        if self.remat is not None:
            # A scan's body is compiled apart from its backward pass: nothing to keep separate.
            step = jax.checkpoint(step, policy=self.remat, prevent_cse=False)
        return jax.lax.scan(step, x, self.layer)[0]


class Projection(nnx.Module):
    """A convolution whose stride is its window: one linear map for each patch.

    kernel `[h, w, C, D]`; `[B, H, W, C]` to `[B, H//h, W//w, D]`.
    """

    def __init__(self, config: ViTConfig, *, stddev: float, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (*config.patch_size, config.num_channels, config.hidden_size)
        kernel = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(dtype))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size, dtype))

    def __call__(self, images: Array) -> Array:
        kernel = self.kernel[...]
        y = jax.lax.conv_general_dilated(
            images.astype(kernel.dtype), kernel, kernel.shape[:2], "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + self.bias[...]


class PatchEmbeddings(nnx.Module):
    """Images as sequences of patches, row by row: `[B, H, W, C]` to `[B, P, D]`."""

    def __init__(self, config: ViTConfig, **kw: Any):
        self.projection = Projection(config, **kw)

    def __call__(self, images: Array) -> Array:
        y = self.projection(images)
        return y.reshape(y.shape[0], -1, y.shape[-1])


class Embeddings(nnx.Module):
    """Patches behind the class token (and the distillation token), with their positions added."""

    def __init__(self, config: ViTConfig, *, stddev: float, dtype: DTypeLike, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Param:
            values = stddev * jax.random.normal(rngs.params(), (1, rows, config.hidden_size))
            return nnx.Param(values.astype(dtype))

        self.config = config
        self.patch_embeddings = PatchEmbeddings(config, stddev=stddev, dtype=dtype, rngs=rngs)
        self.cls_token = table(1)
        if config.model_type == "deit":
            self.distillation_token = table(1)
        self.position_embeddings = table(config.extra_tokens + config.grid[0] * config.grid[1])

    def __call__(self, images: Array, interpolate: bool = False) -> Array:
        _check_images(images.shape, self.config, interpolate)
        patches = self.patch_embeddings(images)
        tokens = [self.cls_token[...]]
        if self.config.model_type == "deit":
            tokens.append(self.distillation_token[...])
        shape = (patches.shape[0], 1, patches.shape[2])
        x = jnp.concatenate([*(jnp.broadcast_to(t, shape) for t in tokens), patches], axis=1)
        return x + self._positions(*images.shape[1:3])

    def _positions(self, height: int, width: int) -> Array:
        table, config = self.position_embeddings[...], self.config
        grid = (height // config.patch_size[0], width // config.patch_size[1])
        if grid == config.grid:
            return table
        first, rest = table[0, : config.extra_tokens], table[0, config.extra_tokens :]
        rest = resize_grid(rest.reshape(*config.grid, -1), grid)
        return jnp.concatenate([first, rest.reshape(-1, rest.shape[-1])])[None]


class Pooler(nnx.Module):
    """`y = act(W x)` of the class token `x`."""

    def __init__(self, config: ViTConfig, **kw: Any):
        shape = (config.hidden_size, config.pooler_output_size or config.hidden_size)
        self.activation = config.pooler_act
        self.dense = Linear(shape, bias=True, **kw)

    def __call__(self, states: Array) -> Array:
        return ACTIVATIONS[self.activation](self.dense(states[:, 0]))


class ViT(Model):
    """A vision transformer: ViT, or DeiT with its distillation token.

    Args:
        config: shapes and constants; its `task` decides what a call returns.
        dtype: of the weights and of the activations.
        remat: which activations of a layer the backward pass finds kept, as in `Decoder`.
        rngs: source of the random initial weights.

    Example:
        >>> from jaxpeft.models.vit_config import from_hf
        >>> config = from_hf(dict(model_type="vit", hidden_size=4, intermediate_size=8,
        ...     num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4),
        ...     task="image-classification", labels=["cat", "dog"])
        >>> model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
        >>> jax.eval_shape(model.apply, nnx.state(model), jnp.ones((5, 8, 8, 3))).shape
        (5, 2)
    """

    keys_take_prefix = True

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Policy | None = KEEP_PROJECTIONS,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(stddev=config.initializer_range, dtype=dtype, rngs=rngs)
        self.config = config
        self.embeddings = Embeddings(config, **kw)
        self.encoder = Encoder(config, remat, **kw)
        self.layernorm = LayerNorm((config.hidden_size,), eps=config.layer_norm_eps, dtype=dtype)
        if config.pooler:
            self.pooler = Pooler(config, **kw)
        for name in head_names(config):
            setattr(self, name, Linear((config.hidden_size, len(config.labels)), bias=True, **kw))

    def __call__(self, images: Array, *, interpolate: bool = False) -> Array:
        """What the config's task asks for.

        Args:
            images: `[B, H, W, C]`, preprocessed as the model was trained, see `vit_images`.
            interpolate: resize the grid of position embeddings to images of another size than
                `config.image_size`.

        Returns:
            For "image-classification" logits `float32[B, labels]`, the mean of the two heads' if
            there are two; for "embedding" the pooler's output `[B, D]`, or the class token's last
            state where the model has no pooler; for None the last states `[B, T, D]`.

        Raises:
            ValueError: the images have another size or number of channels than the model's.
        """
        if self.config.task == CLASSIFY:
            logits = self.head_logits(images, interpolate=interpolate)
            return sum(logits[1:], logits[0]) / len(logits)
        states = self._states(images, interpolate)
        if self.config.task is None:
            return states
        return self.pooler(states) if self.config.pooler else states[:, 0]

    def head_logits(self, images: Array, *, interpolate: bool = False) -> tuple[Array, ...]:
        """Logits `float32[B, labels]` of each head: of the class token, of the distillation token.

        Args:
            images: as for the call itself.
            interpolate: as for the call itself.

        Returns:
            One array for each head, two for a DeiT with a teacher.
        """
        states = self._states(images, interpolate)
        heads = [getattr(self, name) for name in head_names(self.config)]
        return tuple(head(states[:, i]).astype(jnp.float32) for i, head in enumerate(heads))

    @property
    def output_head(self) -> str | None:
        """The head that a bare `jp.lora(8)` leaves alone; a DeiT with a teacher has no one head."""
        heads = head_names(self.config)
        return f"{heads[0]}/kernel" if len(heads) == 1 else None

    def names(self) -> tuple[Name, ...]:
        """One row for each weight, in the order of the files."""
        return names(self.config)

    def example(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Two abstract images."""
        shape = (2, *self.config.image_size, self.config.num_channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    def _states(self, images: Array, interpolate: bool) -> Array:
        return self.layernorm(self.encoder(self.embeddings(images, interpolate)))


def _check_images(shape: tuple[int, ...], config: ViTConfig, interpolate: bool) -> None:
    expected = (*config.image_size, config.num_channels)
    if len(shape) != 4 or shape[-1] != config.num_channels:
        raise ValueError(
            f"images have shape {shape}, but the model takes (batch, height, width, channels) with "
            f"(height, width, channels) = {expected}."
        )
    if shape[1:3] != config.image_size and not interpolate:
        raise ValueError(
            f"images are {shape[1]} x {shape[2]} pixels, but the model takes "
            f"{expected[0]} x {expected[1]}. Resize them, or call the model with interpolate=True."
        )
