"""Views by their strengths: what they do, that nothing else changes, and their derivatives."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_copies import NoCopies
from torch import Tensor
from torch.testing import assert_close

import initializers
from data_sets.augmentation import augment, jitter, warp
from data_sets.counted_numbers import drawn_key, fold_in, normals, uniforms, words
from data_sets.counted_orders import CountedOrder, next_batches
from data_sets.counted_views import MASK, NOISE, SHARE, PairMaker
from data_sets.image_data import DataError, ImageData
from data_sets.views import STRIDE, Views, kept_pixels
from experiment.view_strengths import KINDS, LEARNABLE, ViewError, ViewStrengths
from initializers import GaussianInitializer
from learning_rules import PolynomialPairRule
from mnist_datasets import normalize_pixels, pair_batches
from models_fully_local import Activation, lateral_network
from rules.unit_statistics import default_rule
from train import train

CPU = torch.device("cpu")
STILL = {"degrees": 0, "crop": (1, 1), "crop_ratio": (1, 1), "brightness": 0, "contrast": 0}
ranges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple)
strengths_of_any_kind = st.builds(
    ViewStrengths,
    st.sampled_from(KINDS),
    geometric_share=st.floats(0, 1),
    degrees=st.sampled_from([0.0, 30.0]),
    crop=st.sampled_from([(1.0, 1.0), (0.5, 1.0)]),
    crop_ratio=st.sampled_from([(1.0, 1.0), (0.8, 1.2)]),
    shift=st.sampled_from([0.0, 1.5]),
    brightness=st.sampled_from([0.0, 0.4]),
    contrast=st.sampled_from([0.0, 1.5]),
    mask=ranges,
    noise=st.sampled_from([0.0, 0.1]),
    center=st.booleans(),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_data(count: int = 40, channels: int = 1, size: int = 8) -> ImageData:
    images = torch.randint(1, 256, (count, channels, size, size), generator=seeded(9))
    return ImageData(images.byte(), torch.zeros(count, dtype=torch.int64), "random")


def smooth_data(count: int = 12, size: int = 12) -> ImageData:
    """Images of mid greys, of which few pixels are cut off at 0 or 1."""
    across = torch.linspace(0, 3, size)
    phases = torch.rand(count, 2, 1, generator=seeded(5)) * 6
    waves = torch.einsum("bi,bj->bij", *(across + phases).sin().unbind(1)).unsqueeze(1)
    return ImageData((128 + 60 * waves).byte(), torch.zeros(count, dtype=torch.int64), "waves")


def first_pair(data, batch_size: int, strengths: ViewStrengths, seed: int = 0, **options):
    return next(Views(data, batch_size, strengths, **options)(seeded(seed)))


# ---- what stays as it was ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalized", [False, True])
def test_default_views_are_two_augmentations_of_each_image_in_an_order_of_each_epoch(
    dtype, normalized
):
    data = random_data(20)
    data = normalize_pixels(data, data)[0] if normalized else data
    pairs = itertools.islice(pair_batches(data, 8, seeded(3), dtype), 5)
    generator = seeded(3)
    expected = []
    for _ in range(3):
        for index in torch.randperm(20, generator=generator).split(8)[:2]:
            for _ in range(2):
                x = augment(
                    data.images[index], generator, dtype=torch.promote_types(dtype, torch.float32)
                )
                expected.append(data.normalize(x).to(dtype))
    views = [x for pair in pairs for x in pair]
    assert all(torch.equal(x, y) for x, y in zip(views, expected, strict=False))


@given(strengths_of_any_kind, st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_the_same_state_of_the_generator_gives_the_same_views_of_any_kind(strengths, seed):
    data = random_data(6, channels=3)
    first, again = (
        list(itertools.islice(Views(data, 2, strengths)(seeded(seed)), 5)) for _ in range(2)
    )
    for pair, same in zip(first, again, strict=True):
        for x, y in zip(pair, same, strict=True):
            assert x.shape == (2, 3, 8, 8) and x.dtype == torch.float32 and x.isfinite().all()
            assert torch.equal(x, y)


def test_steps_of_strength_0_leave_the_images_as_they_are():
    data = random_data(10)
    for strengths in (
        ViewStrengths("none"),
        ViewStrengths("masks", mask=(0, 0)),
        ViewStrengths(**STILL),
    ):
        order = torch.randperm(10, generator=seeded())
        for x in first_pair(data, 10, strengths):
            assert torch.equal(x, data.floats(order))


def test_what_is_learned_changes_no_view_at_its_start():
    strengths = ViewStrengths(noise=0.1)
    data = random_data(10)
    fixed = first_pair(data, 10, strengths)
    learned = first_pair(data, 10, strengths, learn=LEARNABLE)
    assert all(torch.equal(x, y) for x, y in zip(fixed, learned, strict=True))
    assert all(x.requires_grad for x in learned)


def test_views_leave_the_data_alone():
    data = random_data(10)
    before = data.images.clone()
    for kind in KINDS:
        first_pair(data, 10, ViewStrengths(kind, brightness=0.9, noise=1.0))
    assert torch.equal(data.images, before)


# ---- counted numbers ----


def counted(data, batch_size: int, strengths: ViewStrengths, **options) -> Views:
    return Views(data, batch_size, strengths, random_numbers="device", **options)


@given(strengths_of_any_kind, st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_counted_pairs_of_tasks_are_those_of_each_to_the_last_bit(strengths, seed):
    views = counted(random_data(6, channels=3), 2, strengths)
    several, alone = ([views(seeded(seed + k)) for k in range(3)] for _ in range(2))
    next(several[1]), next(alone[1])  # one is ahead
    for pair, _ in zip(several[0].of_tasks(several), range(5), strict=False):
        for view, others in zip(pair, zip(*map(next, alone), strict=True), strict=True):
            assert view.shape == (3, 2, 3, 8, 8) and view.isfinite().all() and view.is_contiguous()
            assert torch.equal(view, torch.stack(others))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("strengths", [
    ViewStrengths(noise=0.1, shift=1.0), ViewStrengths(crop=(0.1, 0.2), crop_ratio=(4, 5)),
    ViewStrengths(brightness=0, contrast=0, center=True), ViewStrengths(**STILL, shift=1.0),
    ViewStrengths(**STILL | {"contrast": 1.5}), ViewStrengths(**STILL, center=True),
    ViewStrengths("masks", mask=(0.2, 0.6)), ViewStrengths("masks", noise=0.1, center=True),
    ViewStrengths("none"), ViewStrengths("none", noise=0.1, center=True),
], ids=str)  # fmt: skip
def test_counted_views_are_those_of_the_formulas_with_their_numbers(
    strengths, dtype, near, channels
):
    """The same steps by the functions for given draws, a view at a time."""
    data = random_data(20, channels=channels)
    data, mean = normalize_pixels(data, data)[0], data.floats(dtype=torch.float64).mean(0)
    order = CountedOrder(drawn_key(seeded(3)), 20, 8, CPU)
    parts = next(next_batches([order], lambda keys: {"keys": keys}))
    rows, key, columns = parts["rows"][0], parts["keys"], 6 + 20 * strengths.crops
    columns += 2 * (strengths.shift > 0)
    centre = data.normalize(mean.float()).to(dtype)
    for number, view in enumerate(next(counted(data, 8, strengths, dtype=dtype)(seeded(3)))):
        of_view = fold_in(key, number)
        x = data.images[rows].to(dtype) / 255
        if strengths.kind == "geometric":
            draws = uniforms(words(of_view, 8 * columns)).view(8, columns)
            crop, padding = (strengths.crop, 2) if strengths.crops else (None, 0)
            x = warp(x, draws, degrees=strengths.degrees, padding=padding, scale=crop,
                     ratio=strengths.crop_ratio, shift=strengths.shift)  # fmt: skip
            x = jitter(x, draws, strengths.brightness, strengths.contrast)
        x = data.normalize(x) - (centre if strengths.center else 0)
        if strengths.noise:
            drawn = words(fold_in(of_view, NOISE), x.numel() // 2)
            x = x + strengths.noise * normals(drawn, dtype).view_as(x)
        if strengths.masks:
            low, high = strengths.mask
            share, up = uniforms(words(fold_in(of_view, SHARE), 16)).view(2, 8, 1, 1, 1)
            drawn = words(fold_in(of_view, MASK), 8 * 8).view(torch.uint8).view(8, 1, 8, 8)
            kept = drawn >= (256 * (low + (high - low) * share) + up).floor()
            x = torch.where(kept, x, 0 if strengths.center else centre)
        assert_close(view, x, rtol=0, atol=near)


@given(share=ranges, seed=st.integers(0, 2**40))
@settings(max_examples=10, deadline=None)
def test_counted_masks_take_a_share_that_is_uniform_in_the_range(share, seed):
    data = ImageData(torch.full((300, 1, 20, 25), 255).byte(), torch.zeros(300).long(), "white")
    views = counted(data, 300, ViewStrengths("masks", mask=share))
    views.lost_value = torch.zeros(1, 20, 25)
    for view in next(views(seeded(seed))):
        assert_shares_are_uniform((view == 0).double().mean((1, 2, 3)), share, 500)


def test_each_task_of_counted_mixed_views_has_the_kind_that_its_step_draws():
    data, tasks = random_data(4), 20
    strengths = ViewStrengths("mixed", geometric_share=0.3, mask=(0, 0))
    streams = [counted(data, 4, strengths)(seeded(k)) for k in range(tasks)]
    plain = data.floats().flatten(1).sum(1).sort().values
    kinds = []
    for pair, _ in zip(streams[0].of_tasks(streams), range(60), strict=False):
        sums = torch.stack([x.flatten(2).sum(2).sort(1).values for x in pair])
        same = ((sums - plain).abs() < 1e-3).all(2)
        assert torch.equal(same[0], same[1])
        kinds.append(~same[0])
    shares = torch.stack(kinds).double()
    assert abs(shares.mean() - 0.3) < 0.06
    assert 0 < shares[0].sum() < tasks and 0 < shares[:, 0].sum() < 60


def test_counted_views_differ_between_views_epochs_and_tasks_and_from_the_generators():
    data = random_data(20)
    for strengths in (ViewStrengths(), ViewStrengths("masks"), ViewStrengths("none", noise=1.0)):
        streams = [counted(data, 20, strengths)(seeded(k)) for k in range(2)]
        drawn = [next(Views(data, 20, strengths)(seeded()))[0]]
        for stream in streams:
            drawn += [x for _ in range(2) for x in next(stream)]
        for one, other in itertools.combinations(drawn, 2):
            assert (one != other).double().mean() > 0.2


def test_learned_strengths_of_counted_views_have_the_derivatives_of_finite_differences():
    for kind in ("geometric", "mixed"):
        strengths = ViewStrengths(kind, noise=0.05, shift=0.5)
        views = counted(smooth_data(), 6, strengths, learn=LEARNABLE, dtype=torch.float64).double()

        def loss(views=views) -> Tensor:
            pairs = itertools.islice(views(seeded(4)), 4)
            return sum(x.square().cos().sum() for pair in pairs for x in pair)

        for name, u in views.moved.items():
            (gradient,) = torch.autograd.grad(loss(), u)
            assert abs(gradient) > 1e-3, name
            assert_close(gradient, slope(loss, u), rtol=1e-4, atol=1e-6)


def test_counted_pairs_copy_nothing_from_the_host_and_wait_for_no_number(monkeypatch):
    """On "meta" tensors there are no numbers to wait for, and a copy from the CPU is noticed."""
    all_kinds = {
        kind: counted(random_data(channels=3), 5, ViewStrengths(kind, noise=0.1, shift=1.0))
        for kind in KINDS
    }
    for module, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        monkeypatch.setattr(module, name, None)
    rows, keys = (
        torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((3, 5), (4, 3))
    )
    for views in all_kinds.values():
        views.data = views.data.to("meta")
        if views.lost_value is not None:
            views.lost_value = views.lost_value.to("meta")
        maker = PairMaker(views)
        with NoCopies():
            parts = maker.parts(keys)
            pair = maker.make({name: part[0] for name, part in parts.items()} | {"rows": rows})
        assert [x.shape for x in pair] == [(3, 5, 3, 8, 8)] * 2


# ---- masks ----


@given(ranges, st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_masks_take_a_share_of_each_image_that_is_uniform_in_the_range(share, seed):
    count, pixels = 300, 500
    kept = kept_pixels((count, pixels), share, seeded(seed))
    assert_shares_are_uniform(1 - kept.double().mean(1), share, pixels)


def assert_shares_are_uniform(lost: Tensor, share: tuple[float, float], pixels: int) -> None:
    """Of shares of lost pixels, [count]."""
    (low, high), count = share, len(lost)
    tolerance = 5 * (0.25 / pixels) ** 0.5 + 1 / 256
    assert lost.min() >= low - tolerance and lost.max() <= high + tolerance
    spread = ((high - low) ** 2 / 12 / count) ** 0.5
    assert abs(lost.mean() - (low + high) / 2) < 5 * spread + 1 / 256 + 1e-3
    deviation = ((high - low) ** 2 / 12 + 0.25 / pixels) ** 0.5
    assert lost.std() < deviation + 0.04 and lost.std() > (high - low) / 12**0.5 - 0.04


def test_small_shares_are_met_in_the_mean_though_a_pixel_costs_only_a_byte():
    kept = kept_pixels((4000, 1000), (0.001, 0.001), seeded())
    assert_close(1 - kept.double().mean(), torch.tensor(0.001).double(), rtol=0.1, atol=0)


def test_masks_of_pixels_and_of_views_are_independent():
    kept = kept_pixels((1, 28, 28 * 500), (0.5, 0.5), seeded()).double().flatten()
    for lag in (1, 2, 3, 4, 7, 8, 28, 64):
        assert abs(torch.corrcoef(torch.stack([kept[lag:], kept[:-lag]]))[0, 1]) < 0.01
    data = random_data(2000, size=4)
    strengths = ViewStrengths("masks", mask=(0.2, 0.8), center=True)
    for source in ("host", "device"):
        views = first_pair(data, 2000, strengths, random_numbers=source)
        lost = torch.stack([(x == 0).double().flatten() for x in views])
        assert abs(torch.corrcoef(lost)[0, 1]) < 0.02
        shares = lost.view(2, 2000, 16).mean(2)
        assert abs(torch.corrcoef(shares)[0, 1]) < 0.1


@pytest.mark.parametrize("prepared", ["as they are", "centred", "normalised"])
@pytest.mark.parametrize("center", [False, True])
def test_a_lost_pixel_is_the_mean_of_that_pixel_and_0_after_centring(prepared, center):
    data = random_data(50)
    if prepared != "as they are":
        data = normalize_pixels(data, data, unit_variance=prepared == "normalised")[0]
    x = data.floats(torch.randperm(50, generator=seeded()), torch.float64)
    mean = data.floats(dtype=torch.float64).mean(0).expand_as(x)
    shift = mean if center else 0
    for view in first_pair(
        data, 50, ViewStrengths("masks", mask=(0.3, 0.6), center=center), dtype=torch.float64
    ):
        lost = (view - (mean - shift)).abs() < 1e-6
        assert 0.35 < lost.double().mean() < 0.55
        assert_close(view[~lost], (x - shift)[~lost], rtol=0, atol=1e-6)
        if center:
            assert (view[lost] == 0).all()


def test_all_channels_of_a_pixel_are_lost_together():
    data = random_data(30, channels=3)
    for x in first_pair(data, 30, ViewStrengths("masks", mask=(0.5, 0.5), center=True)):
        lost = x == 0
        assert torch.equal(lost, lost[:, :1].expand_as(lost))


# ---- the other steps ----


def test_views_of_a_mixture_are_geometric_in_the_share_of_batches_that_is_asked_for():
    data = random_data(4)
    strengths = ViewStrengths("mixed", geometric_share=0.3, mask=(0, 0))
    views = Views(data, 4, strengths)(seeded())
    plain = data.floats().flatten(1).sum(1).sort().values
    geometric = [
        not torch.allclose(x1.flatten(1).sum(1).sort().values, plain)
        for x1, _ in itertools.islice(views, 600)
    ]
    assert abs(sum(geometric) / 600 - 0.3) < 0.06


def test_noise_has_its_standard_deviation_and_differs_between_views():
    data = random_data(500)
    x1, x2 = first_pair(data, 500, ViewStrengths("none", noise=0.3))
    x = data.floats(torch.randperm(500, generator=seeded()))
    noise = torch.stack([x1 - x, x2 - x]).flatten(1)
    assert_close(noise.std(1), torch.full((2,), 0.3), rtol=0.02, atol=0)
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.03


def test_shifts_alone_move_images_by_up_to_so_many_pixels_each_way():
    images = torch.zeros(400, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    data = ImageData(images, torch.zeros(400, dtype=torch.int64), "dots")
    x, _ = first_pair(data, 400, ViewStrengths(**STILL, shift=2.0))
    assert_close(x.sum((1, 2, 3)), torch.ones(400))
    place = torch.arange(9.0) - 4
    for offsets in ((x.sum((1, 2)) * place).sum(1), (x.sum((1, 3)) * place).sum(1)):
        assert offsets.abs().max() <= 2.001
        assert_close(
            offsets.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])),
            torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), rtol=0, atol=0.25,
        )  # fmt: skip


def test_without_crops_a_rotation_keeps_the_size():
    data = random_data(6, size=9)
    x, _ = first_pair(data, 6, ViewStrengths(**STILL | {"degrees": 90}), dtype=torch.float64)
    centre = data.floats(torch.randperm(6, generator=seeded()), torch.float64)[:, 0, 4, 4]
    assert_close(x[:, 0, 4, 4], centre)


def test_features_that_are_no_images_get_masks_and_noise():
    data = torch.rand(300, 7, generator=seeded(), dtype=torch.float64) + 1
    strengths = ViewStrengths("masks", mask=(0.4, 0.4), center=True)
    x1, x2 = first_pair(data, 300, strengths, dtype=torch.float64)
    x = data[torch.randperm(300, generator=seeded())] - data.mean(0)
    for view in (x1, x2):
        lost = view == 0
        assert abs(lost.double().mean() - 0.4) < 0.05
        assert_close(view[~lost], x[~lost])
    noisy, _ = first_pair(data, 300, ViewStrengths("none", noise=0.1), dtype=torch.float64)
    assert noisy.shape == (300, 7) and 0.08 < (noisy - x - data.mean(0)).std() < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_is_enough(kind):
    x1, x2 = first_pair(random_data(1), 1, ViewStrengths(kind, noise=0.1, center=True))
    assert x1.shape == x2.shape == (1, 1, 8, 8)
    assert x1.isfinite().all() and x2.isfinite().all() and not torch.equal(x1, x2)


# ---- derivatives ----


def slope(loss, u: Tensor, size: float = 1e-6) -> Tensor:
    """The central difference of a function without arguments, in the parameter u."""
    with torch.no_grad():
        values = []
        for step in (size, -2 * size):
            u += step
            values.append(loss())
        u += size
    return (values[0] - values[1]) / (2 * size)


@pytest.mark.parametrize("kind", ["geometric", "mixed", "none"])
def test_derivatives_of_views_are_those_of_finite_differences(kind):
    strengths = ViewStrengths(kind, noise=0.05, shift=0.5)
    learn = [name for name in LEARNABLE if strengths.matters(name)]
    views = Views(smooth_data(), 6, strengths, learn=learn, dtype=torch.float64).double()
    weights = torch.randn(3, 2, 6, 1, 12, 12, generator=seeded(1), dtype=torch.float64)

    def loss() -> Tensor:
        pairs = itertools.islice(views(seeded(4)), 3)
        return sum(
            (w * x.square()).sum() for v, pair in zip(weights, pairs, strict=True)
            for w, x in zip(v, pair, strict=True)
        )  # fmt: skip

    for name, u in views.moved.items():
        (gradient,) = torch.autograd.grad(loss(), u)
        assert abs(gradient) > 1e-3, name
        assert_close(gradient, slope(loss, u), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["polynomial", "unit statistics"])
def test_a_training_on_learned_views_has_the_hypergradient_of_finite_differences(family):
    strengths = ViewStrengths(noise=0.05)
    views = Views(smooth_data(), 6, strengths, learn=LEARNABLE, dtype=torch.float64).double()
    polynomial = family == "polynomial"
    rule = (PolynomialPairRule.of_degree(2) if polynomial else default_rule()).double()
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=seeded(2)))
    inhibition = "lateral" if polynomial else "none"
    activation = Activation("sigmoid", 4.0)
    model = lateral_network((1, 12, 12), [5, 3], activation, inhibition=inhibition)
    params = GaussianInitializer({}, {"w": "fixed"}).double()(model, seeded(3))

    def loss() -> Tensor:
        final = train(model, params, views(seeded(4)), rule, 3, memory="recompute")
        return sum((tensor.sin()).sum() for layer in final for tensor in layer.values())

    for name, u in views.moved.items():
        (gradient,) = torch.autograd.grad(loss(), u)
        assert abs(gradient) > 1e-6, name
        assert_close(gradient, slope(loss, u, 1e-5), rtol=1e-3, atol=1e-9)


def test_a_learned_strength_is_its_start_times_an_exponential():
    views = Views(random_data(), 5, ViewStrengths(noise=0.2), learn=["noise", "degrees"])
    assert views.strengths() == views.start and STRIDE == initializers.STRIDE
    with torch.no_grad():
        views.moved["noise"].fill_(2.0)
    expected = 0.2 * torch.tensor(0.6).double().exp().item()
    assert views.effective() == pytest.approx({"noise": expected, "degrees": 25.0})
    assert views.strengths().noise == pytest.approx(expected)
    with torch.no_grad():
        assert not next(views(seeded()))[0].requires_grad


# ---- what is refused ----


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "warped"}, "choose from geometric, masks, mixed, none"),
        ({"degrees": -1.0}, "degrees must be a number of at least 0, not -1"),
        ({"noise": float("nan")}, "noise must be a number"),
        ({"contrast": "much"}, "contrast must be a number"),
        ({"geometric_share": 1.1}, "from 0 to 1"),
        ({"crop_padding": 1.5}, "whole"),
        ({"mask": (0.5, 0.2)}, "mask must be LOW HIGH with 0 <= LOW <= HIGH <= 1"),
        ({"mask": 0.5}, "mask must be LOW HIGH"),
        ({"crop": (0.0, 1.0)}, "0 < LOW <= HIGH <= 1"),
        ({"crop_ratio": (1.0, float("inf"))}, "0 < LOW <= HIGH"),
        ({"center": 1}, "center must be true or false"),
        ({"colour": 1}, "views have no colour"),
    ],
)
def test_strengths_that_there_are_not_are_refused_in_one_line(values, said):
    with pytest.raises(ViewError) as refusal:
        ViewStrengths.from_dict(values)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("strengths", "learn", "said"),
    [
        (ViewStrengths(), "mask", "'mask' cannot be learned"),
        (ViewStrengths(), "noise", "start above 0"),
        (ViewStrengths("masks"), "degrees", "views geometric or mixed"),
    ],
)
def test_strengths_that_cannot_be_learned_are_refused(strengths, learn, said):
    with pytest.raises(ViewError, match=said):
        Views(random_data(), 5, strengths, learn=[learn])


def test_data_that_no_such_views_can_be_made_of_are_refused():
    with pytest.raises(ViewError, match="take masks, or noise"):
        Views(torch.rand(5, 3), 2, ViewStrengths("mixed"))
    for data in (random_data(4), torch.rand(4, 2)):
        with pytest.raises(DataError, match="from 1 to 4"):
            Views(data, 5, ViewStrengths("masks"))(seeded())


@given(strengths_of_any_kind)
@settings(max_examples=30, deadline=None)
def test_strengths_come_back_from_their_description(strengths):
    assert ViewStrengths.from_dict(strengths.to_dict()) == strengths
