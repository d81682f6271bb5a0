"""The convolution, normalisations and max-pooling that may be differentiated twice, against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import grad as func_grad
from torch.func import vmap

from metatutor import double_backward

GEOMETRIES = [(1, 0), (1, 1), (2, 0), (2, 1), (3, 2)]  # stride, padding


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).requires_grad_()


def torch_batch_norm(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(images, None, None, weight, bias, training=True, eps=1e-5)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor], orders: int) -> list[Tensor]:
    """The value of a function, and the gradients of random projections of it, of those, and so on."""
    values = [function(*inputs)]
    found = [*values]
    for order in range(orders):
        projection = sum((value * random(*value.shape, seed=9 + order)).sum() for value in values)
        assert isinstance(projection, Tensor)
        values = list(grad(projection, [t for t in inputs if t.requires_grad], create_graph=True))
        found += values
    return found


def gradient_norm(function: Callable[..., Tensor], arguments: tuple[int, ...] = (0,)) -> Callable[..., Tensor]:
    """The squared norm of a function's gradient, by `torch.func`."""
    return lambda *inputs: torch.stack([g.pow(2).sum() for g in func_grad(function, arguments)(*inputs)]).sum()


def agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor], orders: int) -> bool:
    pairs = zip(derivatives(ours, inputs, orders), derivatives(theirs, inputs, orders), strict=True)
    return all(close(one, other) for one, other in pairs)


# --- convolution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "padding"), GEOMETRIES)
def test_convolution_against_finite_differences(stride: int, padding: int):
    inputs = (leaf(2, 2, 5, 4), leaf(3, 2, 3, 3, seed=1))

    def conv(images: Tensor, weight: Tensor) -> Tensor:
        return double_backward.conv2d(images, weight, stride=stride, padding=padding)

    assert gradcheck(conv, inputs)
    assert gradgradcheck(conv, inputs)


def test_third_derivative_of_the_convolution_against_finite_differences():
    def gradient(images: Tensor, weight: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
        return grad(
            double_backward.conv2d(images, weight, stride=2, padding=1), (images, weight), direction, create_graph=True
        )

    assert gradgradcheck(gradient, (leaf(1, 2, 4, 4), leaf(2, 2, 3, 3, seed=1), leaf(1, 2, 2, 2, seed=2)))


@pytest.mark.parametrize(("stride", "padding"), GEOMETRIES)
def test_convolution_is_torchs(stride: int, padding: int):
    """Up to the third derivative, of the square, lest higher ones vanish."""
    assert agree(
        lambda images, weight: double_backward.conv2d(images, weight, stride=stride, padding=padding).square(),
        lambda images, weight: F.conv2d(images, weight, stride=stride, padding=padding).square(),
        [leaf(2, 3, 7, 6), leaf(4, 3, 3, 3, seed=1)],
        orders=3,
    )


@pytest.mark.parametrize("fixed", [0, 1])
def test_convolution_with_one_input_that_needs_no_gradient(fixed: int):
    inputs = [leaf(2, 3, 5, 5), leaf(4, 3, 3, 3, seed=1)]
    inputs[fixed].requires_grad_(False)
    assert agree(
        lambda x, w: double_backward.conv2d(x, w).square(), lambda x, w: F.conv2d(x, w).square(), inputs, orders=3
    )


# --- batch normalisation ---------------------------------------------------------------------------------------


def test_batch_norm_against_finite_differences():
    inputs = (leaf(3, 2, 2, 3), leaf(2, seed=1), leaf(2, seed=2))
    assert gradcheck(double_backward.batch_norm, inputs)
    assert gradgradcheck(double_backward.batch_norm, inputs)


@pytest.mark.parametrize("shape", [(3, 2, 4, 3), (6, 1, 1, 1), (1, 3, 2, 2)])
def test_batch_norm_is_torchs(shape: tuple[int, ...]):
    channels = shape[1]
    inputs = [leaf(*shape), leaf(channels, seed=1), leaf(channels, seed=2)]
    assert agree(
        lambda *inputs: double_backward.batch_norm(*inputs).pow(3),
        lambda *inputs: torch_batch_norm(*inputs).pow(3),
        inputs,
        2,
    )


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_batch_norm_of_a_halved_network_has_statistics_in_full_precision(precision: torch.dtype):
    """Values near 100 differ by half a unit at most in bfloat16: what is left of them must not be rounded again."""
    images = (100 + random(2, 3, 4, 4)).to(precision).requires_grad_()
    weight, bias = leaf(3).to(precision), leaf(3, seed=1).to(precision)
    found = double_backward.batch_norm(images, weight, bias)
    expected = torch_batch_norm(images.double(), weight.double(), bias.double())
    torch.testing.assert_close(found, expected.to(precision))
    assert grad(found.float().pow(2).sum(), images)[0].dtype == precision


def test_batch_norm_with_a_weight_of_zero():
    """The double backward divides by the weight."""
    weight = torch.tensor([0.0, 1.5, -0.0], dtype=torch.float64, requires_grad=True)
    inputs = [leaf(3, 3, 2, 2), weight, leaf(3, seed=2)]
    found = derivatives(lambda *inputs: double_backward.batch_norm(*inputs).pow(3), inputs, 2)
    expected = derivatives(lambda *inputs: torch_batch_norm(*inputs).pow(3), inputs, 2)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_batch_norm_in_single_precision_with_a_weight_of_zero():
    inputs = [leaf(3, 2, 2, 2), torch.tensor([0.0, 1.0], requires_grad=True), leaf(2, seed=2)]
    inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = derivatives(lambda *inputs: double_backward.batch_norm(*inputs).pow(3).double(), inputs, 2)
    expected = derivatives(lambda *inputs: torch_batch_norm(*inputs).pow(3).double(), inputs, 2)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("second_direction", ["of the gradient", "constant"])
def test_third_derivative_of_batch_norm_raises(second_direction: str):
    """Also where the second derivative is taken along a constant, which autograd's own guard lets through."""
    images, weight, bias = leaf(3, 2, 2, 2), leaf(2, seed=1), leaf(2, seed=2)
    (first,) = grad(double_backward.batch_norm(images, weight, bias).pow(2).sum(), images, create_graph=True)
    objective = first.pow(2).sum() if second_direction == "of the gradient" else (first * random(3, 2, 2, 2)).sum()
    (second,) = grad(objective, images, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        grad(second.pow(2).sum(), images)


def test_third_derivative_of_batch_norm_raises_under_torch_func():
    def loss(images: Tensor) -> Tensor:
        return double_backward.batch_norm(images, random(2), random(2)).pow(3).sum()

    with pytest.raises(RuntimeError, match="no third derivative"):
        func_grad(gradient_norm(gradient_norm(loss)))(random(3, 2, 2, 2))


# --- group normalisation ---------------------------------------------------------------------------------------


def ours_in_groups(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return double_backward.group_norm(images, weight, bias, 2)


def torch_in_groups(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(images, 2, weight, bias, 1e-5)


def test_group_norm_against_finite_differences():
    inputs = (leaf(2, 4, 2, 2), leaf(4, seed=1), leaf(4, seed=2))
    assert gradcheck(ours_in_groups, inputs)
    assert gradgradcheck(ours_in_groups, inputs)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda images: images,
    "channels last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda images: images.repeat_interleave(2, 3)[..., ::2],
    "turned": lambda images: images.transpose(2, 3).contiguous().transpose(2, 3),
    "one image for all": lambda images: images[:1].expand_as(images),
    "strides of no meaning": lambda images: images[:1].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (1, 4, 4, 4), (3, 4, 1, 1), (2, 2, 1, 3)])
def test_group_norm_is_torchs_whatever_the_layout(shape: tuple[int, ...], layout: str):
    assert agree(
        lambda images, *others: ours_in_groups(LAYOUTS[layout](images), *others).pow(3),
        lambda images, *others: torch_in_groups(LAYOUTS[layout](images), *others).pow(3),
        [leaf(*shape), leaf(shape[1], seed=1), leaf(shape[1], seed=2)],
        orders=3,
    )


def test_group_norm_keeps_channels_last():
    images = random(3, 4, 5, 3).contiguous(memory_format=torch.channels_last)
    assert ours_in_groups(images, random(4), random(4)).is_contiguous(memory_format=torch.channels_last)


def test_group_norm_under_autocast_has_statistics_in_full_precision():
    images = (random(3, 4, 5, 5) * 1e-2 + 10).bfloat16()
    weight, bias = random(4).float(), random(4, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours_in_groups(images, weight, bias)
    torch.testing.assert_close(found, torch_in_groups(images.float(), weight, bias))


# --- side by side under vmap -----------------------------------------------------------------------------------


def stacked(function: Callable[..., Tensor], batched: tuple[bool, ...]) -> Callable[..., Tensor]:
    """What `vmap` must compute: the function on each entry of the batched inputs, in a plain loop."""

    def loop(*inputs: Tensor) -> Tensor:
        n = next(t.shape[0] for t, many in zip(inputs, batched, strict=True) if many)
        pairs = list(zip(inputs, batched, strict=True))
        return torch.stack([function(*(t[i] if many else t for t, many in pairs)) for i in range(n)])

    return loop


@pytest.mark.parametrize("batched", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
def test_convolutions_side_by_side(batched: tuple[bool, bool], stride: int, padding: int):
    shapes = [(4, 2, 3, 5, 6)[not batched[0] :], (4, 2, 3, 3, 3)[not batched[1] :]]
    inputs = [leaf(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    in_dims = tuple(0 if many else None for many in batched)
    assert agree(
        vmap(lambda x, w: double_backward.conv2d(x, w, stride=stride, padding=padding).square(), in_dims),
        stacked(lambda x, w: F.conv2d(x, w, stride=stride, padding=padding).square(), batched),
        inputs,
        orders=3,
    )


NORMS = {
    "batch": (double_backward.batch_norm, torch_batch_norm),
    "group": (ours_in_groups, torch_in_groups),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "batched", [(True, True, True), (True, False, False), (False, True, False), (False, True, True)]
)
def test_normalisations_side_by_side(norm: str, batched: tuple[bool, bool, bool]):
    ours, theirs = NORMS[norm]
    shapes = [(3, 4, 2, 2, 3)[not batched[0] :], (3, 2)[not batched[1] :], (3, 2)[not batched[2] :]]
    inputs = [leaf(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    in_dims = tuple(0 if many else None for many in batched)
    assert agree(
        vmap(lambda *inputs: ours(*inputs).pow(3), in_dims),
        stacked(lambda *inputs: theirs(*inputs).pow(3), batched),
        inputs,
        orders=2,
    )


@pytest.mark.parametrize("last", [False, True])
def test_group_norms_side_by_side_of_what_a_convolution_leaves(last: bool):
    """Channels last, all tasks in a row, or tasks last: layouts that neither kernel reads as they are."""
    images, weight, bias = leaf(3, 5, 6, 2, 4, seed=1), leaf(4, seed=2), leaf(4, seed=3)  # [n, h, w, task, c]
    order, axis = ((0, 4, 1, 2, 3), 4) if last else ((0, 3, 4, 1, 2), 1)
    assert agree(
        lambda x, w, b: vmap(ours_in_groups, (axis, None, None))(x.permute(order), w, b).pow(3),
        lambda x, w, b: stacked(torch_in_groups, (True, False, False))(x.permute(3, 0, 4, 1, 2), w, b).pow(3),
        [images, weight, bias],
        orders=2,
    )


def test_a_task_dimension_that_is_not_the_first():
    images, weight = leaf(2, 3, 5, 5, 4), leaf(2, 3, 3, 4, 3, seed=1)  # tasks last; tasks last but one
    assert agree(
        vmap(lambda x, w: double_backward.conv2d(x, w).square(), (4, 3)),
        lambda x, w: stacked(lambda x, w: F.conv2d(x, w).square(), (True, True))(x.movedim(4, 0), w.movedim(3, 0)),
        [images, weight],
        orders=2,
    )


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 3)])
def test_max_pooling_is_pytorchs(size: tuple[int, int]):
    images = leaf(3, 2, *size)
    assert agree(
        lambda x: double_backward.max_pool2d(x).square(), lambda x: F.max_pool2d(x, 2).square(), [images], orders=2
    )
    tasks = leaf(4, 3, 2, *size)
    assert agree(
        vmap(lambda x: double_backward.max_pool2d(x).square()),
        lambda x: F.max_pool2d(x.flatten(0, 1), 2).square().unflatten(0, (4, 3)),
        [tasks],
        orders=2,
    )


def test_the_first_of_equal_pixels_takes_the_gradient():
    images = torch.ones(1, 1, 2, 2, requires_grad=True)
    assert grad(double_backward.max_pool2d(images).sum(), images)[0].flatten().tolist() == [1, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("orders", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_taken_inside_vmap(norm: str, orders: int):
    """`vmap(grad(...))`, as a reader would write it."""
    images, bias, weights, scales = random(3, 2, 5, 5), random(4), random(2, 4, 2, 3, 3), random(2, 4, seed=1)

    def gradients(conv: Callable[..., Tensor], norm: Callable[..., Tensor]) -> Tensor:
        def loss(weight: Tensor, scale: Tensor) -> Tensor:
            return norm(conv(images, weight, stride=2, padding=1), scale, bias).pow(3).sum()

        function: Callable[..., Tensor] = loss if orders == 1 else gradient_norm(loss, (0, 1))
        of_weights, of_scales = vmap(func_grad(function, (0, 1)))(weights, scales)
        return torch.cat([of_weights.flatten(), of_scales.flatten()])

    ours, theirs = (
        gradients(conv, norm) for conv, norm in zip((double_backward.conv2d, F.conv2d), NORMS[norm], strict=True)
    )
    assert torch.allclose(ours, theirs, rtol=1e-9)
