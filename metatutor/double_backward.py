"""Convolution, normalisation and max-pooling whose second derivatives cost no more than they must.

Second-order MAML differentiates through a gradient. PyTorch can do that for any layer, but its double backward of
batch normalisation is some thirty passes over the activations, and its double backward of a grouped convolution (what
`vmap` over tasks turns a convolution into) loops over the groups. The functions here compute the same in as few passes
as we know how. Any module may call them, `vmap` over tasks and `torch.autograd` work as always, and they may be
differentiated as often as you like (`batch_norm`: twice).

On a CPU their results are channels-last in memory, `[n, h, w, task * c]`: there batch normalisation and max-pooling run
along the channels of all tasks at once, several times faster than along an image.
"""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

EPSILON = 1e-5


def conv2d(
    images: Float[Tensor, "n c_in h w"], weight: Float[Tensor, "c_out c_in kh kw"], *, stride: int = 1, padding: int = 0
) -> Float[Tensor, "n c_out h_out w_out"]:
    """The convolution `torch.nn.functional.conv2d`, whose double backward uses its own three products.

    A convolution is bilinear, so its value, its gradient in the images and its gradient in the weight are the
    derivatives of one trilinear form, `<out, images * weight>`; so are the gradients of these, and so on.
    """
    images, weight = _lowered(images), _lowered(weight)
    return _Conv.apply(None, images, weight, _Geometry(images.shape, weight.shape, stride, padding))


def batch_norm(
    images: Float[Tensor, "n c h w"], weight: Float[Tensor, " c"], bias: Float[Tensor, " c"]
) -> Float[Tensor, "n c h w"]:
    """Batch normalisation with the statistics of `images` themselves; its double backward takes six passes.

    `y = weight * (images - mean) / sqrt(var + 1e-5) + bias`, mean and (biased) variance over n, h and w: Ioffe &
    Szegedy (2015), algorithm 1. A third derivative raises a RuntimeError.
    """
    full = torch.promote_types(weight.dtype, torch.float32)  # of the statistics, also where all else is halved
    scale = weight.to(full)
    never_zero = scale + (scale == 0) * 1e-12  # the double backward divides by it
    return _Norm.apply(images.to(full), never_zero, bias.to(full))[0].to(weight.dtype)


def group_norm(
    images: Float[Tensor, "n c h w"], weight: Float[Tensor, " c"], bias: Float[Tensor, " c"], groups: int
) -> Float[Tensor, "n c h w"]:
    """Group normalisation, `torch.nn.functional.group_norm`, also under `vmap` in every supported version of PyTorch.

    `y = weight * (images - mean) / sqrt(var + 1e-5) + bias`, mean and (biased) variance of each image over h, w and the
    channels of a group of neighbours: Wu & He (2018), equations 1, 2 and 7.

    Example:
        >>> group_norm(torch.tensor([0.0, 2.0, 5.0, 7.0]).view(1, 4, 1, 1), torch.ones(4), torch.zeros(4), 2).flatten()
        tensor([-1.0000,  1.0000, -1.0000,  1.0000])
    """
    n, c, h, w = images.shape
    images = _Dense.apply(images.to(weight.dtype))  # under autocast, statistics in full precision
    return torch.native_group_norm(images, weight, bias, n, c, h * w, groups, EPSILON)[0]


def max_pool2d(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h_out w_out"]:
    """The largest of each 2×2 pixels; where several are equal, the first of them gets the gradient."""
    return _Pool.apply(images)[0]


def _lowered(tensor: Tensor) -> Tensor:
    """In the lower precision of autocast, if it is on: once, for all derivatives."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _laid_out(images: Tensor) -> Tensor:
    """The same `[n, c, h, w]`, channels-last in memory on a CPU; no copy if it is already."""
    if images.device.type != "cpu":
        return images
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _of_shape(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor that only provides a shape and a layout; its memory is never touched."""
    layout = torch.channels_last if like.device.type == "cpu" else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _merged(tensor: Tensor, task_dim: int | None, n_tasks: int, dim: int) -> Tensor:
    """Make each task a group along `dim`: `[task, n, c, h, w]` -> `[n, task * c, h, w]` along 1."""
    if task_dim is None:
        tensor, task_dim = tensor.expand(n_tasks, *tensor.shape), 0
    return tensor.movedim(task_dim, dim).flatten(dim, dim + 1)


def _wide(channels: Tensor) -> Tensor:
    """`[c]` -> `[c, 1, 1]`."""
    return channels[:, None, None]


# --- convolution ---


class _Geometry(NamedTuple):
    images: tuple[int, ...]  # shape
    weight: tuple[int, ...]  # shape
    stride: int
    padding: int
    groups: int = 1


class _Factor(Function):
    """The derivative of `<out, images * weight>` in whichever of the three is None; bilinear in the other two."""

    generate_vmap_rule = True  # for `vmap(grad(...))`

    @staticmethod
    def forward(out: Any, images: Any, weight: Any, geometry: _Geometry) -> Tensor:
        _, _, stride, padding, groups = geometry
        if out is None:
            return _laid_out(F.conv2d(_laid_out(images), _laid_out(weight), None, stride, padding, 1, groups))
        mask = [images is None, weight is None, False]
        images = _of_shape(geometry.images, out) if images is None else _laid_out(images)
        weight = _of_shape(geometry.weight, out) if weight is None else _laid_out(weight)
        return torch.ops.aten.convolution_backward(
            _laid_out(out), images, weight, [0], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, mask
        )[mask.index(True)]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *factors, ctx.geometry = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: Any, missing: Tensor) -> Any:
        factors = [missing if factor is None else factor for factor in ctx.saved_tensors]
        derivatives = zip((_Conv, _Factor, _Factor), ctx.needs_input_grad[:3], strict=True)
        return *(
            function.apply(*factors[:i], None, *factors[i + 1 :], ctx.geometry) if needed else None
            for i, (function, needed) in enumerate(derivatives)
        ), None


class _Conv(_Factor):
    """`out = images * weight`; under `vmap`, each task is a group."""

    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, out: None, images: Tensor, weight: Tensor, geometry: _Geometry) -> Any:
        n_tasks = info.batch_size
        images = _merged(images, in_dims[1], n_tasks, 1)
        weight = _laid_out(_merged(weight, in_dims[2], n_tasks, 0))
        geometry = geometry._replace(images=images.shape, weight=weight.shape, groups=n_tasks)
        return _Conv.apply(None, images, weight, geometry).unflatten(1, (n_tasks, -1)), 1


# --- batch normalisation; group normalisation and max-pooling, which need less of their own ---


def _norm_backward(out: Tensor, images: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: list[bool]) -> Any:
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(out, images, weight, None, None, mean, rstd, True, EPSILON, mask)


class _Norm(Function):
    """`y = weight * x̂ + bias`, where `x̂ = (images - mean) * rstd`; also returns mean and rstd."""

    @staticmethod
    def forward(images: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return torch.native_batch_norm(_laid_out(images), weight, bias, None, None, True, 0.0, EPSILON)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def backward(ctx: Any, out: Tensor, *_: Any) -> Any:
        return _NormBackward.apply(out, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> Any:
        n_tasks = info.batch_size
        merged = (_merged(t, d, n_tasks, dim) for t, d, dim in zip(inputs, in_dims, (1, 0, 0), strict=True))
        y, mean, rstd = _Norm.apply(*merged)
        return (y.unflatten(1, (n_tasks, -1)), mean.view(n_tasks, -1), rstd.view(n_tasks, -1)), (1, 0, 0)


class _NormBackward(Function):
    r"""The gradients of `<out, y>` in images, weight and bias.

    With `P` the projection that removes, in each channel, the mean and the component along `x̂`:
    `g = weight * rstd * P(out)`, `g_weight = sum(out * x̂)`, `g_bias = sum(out)`.

    Its own backward, for a direction `u` against `g`, with `n` values a channel and `a = sum(u * x̂)`:
    `d_out = weight * rstd * P(u)` (the same kernel again, since P is symmetric), `d_weight = sum(u * g) / weight`,
    `d_images = -rstd / n * (rstd * sum(u * g) * x̂' + g_weight * d_out + a * g)`, where `x̂' = images - mean`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, images: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Any:
        return _norm_backward(_laid_out(out), _laid_out(images), weight, mean, rstd, [True, True, True])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, g_weight, _ = output
        ctx.save_for_backward(*inputs[1:], g, g_weight)

    @staticmethod
    def backward(ctx: Any, u: Tensor, u_weight: Tensor, u_bias: Tensor) -> Any:
        *_, g, g_weight = ctx.saved_tensors
        like = ((u, g), (u_weight, g_weight), (u_bias, g_weight))
        u, u_weight, u_bias = (torch.zeros_like(t) if d is None else d for d, t in like)  # None: only under vmap
        return *_NormTwice.apply(u, u_weight, u_bias, *ctx.saved_tensors), None, None


class _NormTwice(Function):
    """The backward of `_NormBackward`, a function of its own so that a third derivative raises, everywhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, u_weight: Tensor, u_bias: Tensor, *saved: Tensor) -> Any:
        images, weight, mean, rstd, g, g_weight = saved
        n = images.numel() // images.shape[1]
        d_out, a, _ = _norm_backward(_laid_out(u), images, weight, mean, rstd, [True, True, False])  # a = sum(u * x̂)
        zero, one = torch.zeros_like(mean), torch.ones_like(rstd)
        along = _norm_backward(u, g, one, zero, one, [False, True, False])[1]  # sum(u * g)
        scale = -rstd * rstd * along / n
        d_images = torch.addcmul(_wide(-scale * mean), images, _wide(scale))
        d_images.addcmul_(d_out, _wide(-rstd * g_weight / n)).addcmul_(g, _wide(u_weight / weight - rstd * a / n))
        d_out = d_out.add_(_wide(u_bias - u_weight * rstd * mean)).addcmul_(images, _wide(u_weight * rstd))
        return d_out, d_images, along / weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("double_backward.batch_norm has no third derivative; use torch.nn.functional.batch_norm")


class _Dense(Function):
    """The same images without gaps in memory; they keep their layout if the kernel of group normalisation reads it.

    PyTorch's own `group_norm` asks for the layout too, and some versions cannot answer under `vmap`.
    """

    @staticmethod
    def forward(images: Tensor) -> Tensor:
        if images.device.type != "cpu" or not images.is_contiguous(memory_format=torch.channels_last):
            return images.contiguous()
        _, c, h, w = images.shape  # strides along a side of 1 mean nothing, but the kernel looks at them
        return images.as_strided(images.shape, (c * h * w, 1, w * c, c))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> Tensor:
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, images: Tensor) -> Any:
        return images.movedim(in_dims[0], 0).contiguous(), 0


class _Pool(Function):
    """The largest of each 2×2 pixels, and where it was."""

    @staticmethod
    def forward(images: Tensor) -> Any:
        return torch.ops.aten.max_pool2d_with_indices(_laid_out(images), [2, 2])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shape, where = inputs[0].shape, output[1]
        ctx.mark_non_differentiable(where)
        ctx.save_for_backward(where)

    @staticmethod
    def backward(ctx: Any, out: Tensor, *_: Any) -> Any:
        images, (where,) = _of_shape(ctx.shape, out), ctx.saved_tensors
        return torch.ops.aten.max_pool2d_with_indices_backward(
            _laid_out(out), images, [2, 2], [2, 2], [0, 0], [1, 1], False, where
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, images: Tensor) -> Any:
        pooled = _Pool.apply(_merged(images, in_dims[0], info.batch_size, 1))
        return tuple(t.unflatten(1, (info.batch_size, -1)) for t in pooled), (1, 1)
