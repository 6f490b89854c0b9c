"""The test networks are what they claim to be: topology, determinism, activations in range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests import zoo

# torchvision's published counts; He et al. for resnet20 with option A, and by hand below.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_small": 2_542_856,
    "vgg11_bn": 132_868_840,
    "densenet121": 7_978_856,
    "efficientnet_b0": 5_288_548,
    "shufflenet_v2_x1_0": 2_278_604,
    "resnet20": 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64),  # option B: two 1x1 conv + bn
    "mobilenet_v2_cifar": 3_504_872 - 1281 * 990,  # 10 classes instead of 1,000
    "unet": 482_978,  # by hand: 294,000 down, 188,944 up, 34 in the head
    "mlp": 65 * 128 + 256 + 128 * 128 + 256 + 129 * 10,
}

# Small enough that all of this file takes seconds.
SMALL: dict[str, tuple[dict[str, object], int | None]] = {
    "resnet18": ({"num_classes": 10, "width": 16}, 64),
    "resnet50": ({"num_classes": 10, "width": 8}, 64),
    "resnet20": ({}, None),
    "mobilenet_v2": ({"num_classes": 10, "width": 0.25}, 64),
    "mobilenet_v2_cifar": ({"width": 0.25}, None),
    "mobilenet_v3_small": ({"num_classes": 10, "width": 0.5}, 64),
    "vgg11_bn": ({"num_classes": 10, "width": 8, "hidden": 32, "pool": 1}, 32),
    "densenet121": ({"num_classes": 10, "growth": 8, "width": 16}, 64),
    "efficientnet_b0": ({"num_classes": 10, "width": 0.25}, 64),
    "shufflenet_v2_x1_0": ({"num_classes": 10, "channels": (8, 16, 32, 64, 128)}, 64),
    "unet": ({"width": 4}, 32),
    "mlp": ({"hidden": 32}, None),
}


def small(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    options, size = SMALL[name]
    return zoo.build(name, seed, size=size, **options), zoo.example(name, batch=4, size=size)


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def test_every_network_is_listed() -> None:
    assert set(zoo.NAMES) == set(PARAMETERS) == set(SMALL)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_parameter_count_is_the_published_one(name: str) -> None:
    with torch.device("meta"):  # no memory, so the 133 million of VGG cost nothing
        model = zoo.architecture(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_option_a_of_resnet20_has_the_count_of_the_paper() -> None:
    model = zoo.architecture("resnet20", shortcut="pad")
    assert sum(p.numel() for p in model.parameters()) == 269_722


@pytest.mark.parametrize("name", zoo.NAMES)
def test_default_example_fits(name: str) -> None:
    with torch.device("meta"):
        model = zoo.architecture(name).eval()
        out = model(torch.empty(zoo.example(name, batch=2).shape))
    side = {"unet": (2, 64, 64), "resnet20": (10,), "mobilenet_v2_cifar": (10,), "mlp": (10,)}
    assert out.shape == (2, *side.get(name, (1000,)))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_same_seed_same_bits_and_other_seed_other_bits(name: str) -> None:
    before = torch.get_rng_state()
    model, x = small(name)
    assert torch.equal(torch.get_rng_state(), before)
    again, _ = small(name)
    other, _ = small(name, seed=1)
    state, repeated = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[key], repeated[key]) for key in state)
    with torch.no_grad():
        assert not torch.allclose(model(x), other(x))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_eval_mode_and_no_dependence_on_the_batch(name: str) -> None:
    model, x = small(name)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        whole, alone = model(x), model(x[:1])
    # Other batch sizes may take other kernels: float32 rounding, nothing more.
    torch.testing.assert_close(whole[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_statistics_are_not_trivial(name: str) -> None:
    for norm in norms(small(name)[0]):
        assert norm.running_mean is not None and norm.running_var is not None
        for trivial, value in ((1, norm.weight), (0, norm.bias), (0, norm.running_mean)):
            assert (value - trivial).abs().max() > 0.01
        assert (norm.running_var - 1).abs().max() > 0.01
        assert (norm.running_var > 0).all()


def test_some_batchnorm_weights_are_negative() -> None:
    signs = torch.cat([norm.weight.detach().sign() for norm in norms(small("resnet18")[0])])
    assert 0.02 < (signs < 0).double().mean() < 0.12  # one in sixteen of 1,200


@pytest.mark.parametrize("name", zoo.NAMES)
def test_activations_stay_in_range_and_alive_through_depth(name: str) -> None:
    model, x = small(name)
    stds: list[float] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, _BatchNorm)
        shape = (1, -1, *[1] * (output.ndim - 2))
        normed = (output - module.bias.view(shape)) / module.weight.view(shape)
        stds.append(normed.double().std().item())

    for norm in norms(model):
        norm.register_forward_hook(watch)
    with torch.no_grad():
        out = model(x)
    # Statistics that fit normalise what they meet to about 1, on other pictures too; below it lie
    # layers with many channels that hardly ever fire. Statistics that do not fit give 0.1 or 100.
    assert 0.2 < min(stds) and max(stds) < 5
    assert 1e-3 < out.std() < 100
    spread = (out - out.mean(0)).abs().max()  # different pictures, different answers
    assert spread > 1e-3 * out.abs().max()


def test_images_are_smooth_and_normalised() -> None:
    images = zoo.smooth_images(64, 3, 64)
    assert images.mean().abs() < 0.2 and 0.6 < images.std() < 1.6
    step = (images[..., 1:] - images[..., :-1]).std()
    assert step < 0.5 * images.std()  # independent noise would give sqrt(2)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_torch_fx_can_trace_it(name: str) -> None:
    model, x = small(name)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
