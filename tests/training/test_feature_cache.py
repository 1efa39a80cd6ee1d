from __future__ import annotations

import multiprocessing
import os
import warnings
from pathlib import Path

import pytest
import torch

from nanomolmo2.models import NanoMolmo2, VisionEncoder
from nanomolmo2.training.feature_cache import FeatureCache
from tests.nets import IMAGE, VISION, pictures, randomize, small_model, text_ids


def frozen(seed: int = 0) -> VisionEncoder:
    return randomize(VisionEncoder(VISION), seed).freeze()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_features_are_the_encoders_as_bfloat16_rounds_them(tmp_path):
    encoder = frozen()
    for layers in (None, (-1, -3)):
        images = pictures(4)
        expected = encoder.features(images, layers).bfloat16().float()
        for folder in (None, tmp_path):
            for _ in range(2):
                found = FeatureCache(folder, encoder, layers).features(images)
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
                assert torch.equal(found.bfloat16().float(), found)


def test_from_disk_and_computed_are_the_same_bits_in_any_company(tmp_path):
    """A batched product may round otherwise than a single one: every picture goes alone."""
    encoder, images = frozen(), pictures(7)
    without = FeatureCache(None, encoder).features(images)
    cache = FeatureCache(tmp_path, encoder)
    for part in (images[:3], images[2:6], images):
        cache.features(part)
    assert (cache.computed, cache.read, cache.damaged) == (7, 7, 0)
    again = FeatureCache(tmp_path, encoder)
    assert torch.equal(again.features(images.flip(0)).flip(0), without)
    assert (again.computed, again.read) == (0, 7)


@pytest.mark.parametrize("design", ["linear", "pooling"])
def test_losses_and_gradients_with_a_folder_and_without_are_identical(tmp_path, design):
    def train(folder: Path | None) -> tuple[list[float], FeatureCache]:
        model = small_model(design).train()
        cache = FeatureCache.of_model(folder, model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(4):
            ids = text_ids(2, 12, seed=step % 2)
            ids[:, 5] = IMAGE
            labels = ids.masked_fill(ids == IMAGE, -100)
            features = cache.features(pictures(2, seed=step % 2))
            _, loss = model(ids, labels=labels, visual_features=features)
            loss.backward()
            assert all(p.grad is not None for p in model.connector.parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, cache

    expected, _ = train(None)
    cold, first = train(tmp_path)
    warm, second = train(tmp_path)
    assert cold == warm == expected
    assert (first.computed, first.read, second.computed, second.read) == (4, 4, 0, 8)


def test_crops_enter_behind_the_encoder_too(tmp_path):
    """Features in the place of pixels: with an index over patches, and picture by picture."""
    model = small_model("pooling")
    crops = torch.randn(3, 9, 3 * 7 * 7, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 1, 3, 4], [2, 5, -1, -1], [9, 10, 12, 13], [20, 26, -1, -1]])
    ids = text_ids(1, 9)
    ids[0, [1, 2, 5, 6]] = IMAGE
    cache = FeatureCache.of_model(tmp_path, model)
    exact = model.vision_encoder.features(crops, model.config.connector.vit_layers)
    with torch.no_grad():
        whole = model(ids, crops, image_token_pooling=index)
        same = model(ids, image_token_pooling=index, visual_features=exact)
        rounded = model(ids, image_token_pooling=index, visual_features=cache.features(crops))
    assert torch.equal(same, whole)
    assert 0 < (rounded - whole).abs().max() < 0.1
    for design in ("linear", "pooling"):
        model = small_model(design)
        ids = text_ids(2, 6)
        ids[:, 2] = IMAGE
        images = pictures(2)
        layers = model.config.connector.vit_layers
        with torch.no_grad():
            found = model(ids, visual_features=model.vision_encoder.features(images, layers))
            assert torch.equal(found, model(ids, images))


def test_features_beside_pixels_or_too_few_of_them_are_refused():
    model = small_model("linear")
    ids = text_ids(2, 6)
    ids[:, 2] = IMAGE
    features = FeatureCache.of_model(None, model).features(pictures(1))
    with pytest.raises(ValueError, match="or visual_features alone"):
        model(ids, pictures(2), visual_features=features)
    with pytest.raises(ValueError, match=r"2 image tokens .* 1 picture\(s\)"):
        model(ids, visual_features=features)


def changed_picture() -> tuple[torch.Tensor, VisionEncoder, tuple[int, ...] | None]:
    images = pictures(1)
    images[0, 2, 5, 5] += 1e-6
    return images, frozen(), None


def changed_weight() -> tuple[torch.Tensor, VisionEncoder, tuple[int, ...] | None]:
    encoder = frozen()
    with torch.no_grad():
        encoder.layers[0].mlp.fc1.bias[3] += 1e-6
    return pictures(1), encoder, None


@pytest.mark.parametrize(
    "change",
    [
        changed_picture,
        changed_weight,
        lambda: (pictures(1), frozen(), (-1,)),
        lambda: (pictures(1), frozen().bfloat16(), None),
        lambda: (pictures(1).flip(3).contiguous(), frozen(), None),
    ],
)
def test_another_picture_encoder_or_layer_is_another_key(tmp_path, change):
    FeatureCache(tmp_path, frozen()).features(pictures(1))
    images, encoder, layers = change()
    cache = FeatureCache(tmp_path, encoder, layers)
    cache.features(images)
    assert (cache.computed, cache.read, len(files(tmp_path))) == (1, 0, 2)


def test_weights_that_change_under_a_cache_are_noticed(tmp_path):
    encoder = frozen()
    cache = FeatureCache(tmp_path, encoder)
    before = cache.features(pictures(1))
    encoder.load_state_dict(frozen(1).state_dict())
    assert not torch.equal(cache.features(pictures(1)), before)
    encoder.load_state_dict(frozen().state_dict())
    assert torch.equal(cache.features(pictures(1)), before)
    assert (cache.computed, cache.read) == (2, 1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, flip, pipe, lambda path: path.write_bytes(b"")])
def test_damaged_files_are_computed_again_and_said_once(tmp_path, damage):
    encoder, images = frozen(), pictures(3)
    expected = FeatureCache(tmp_path, encoder).features(images)
    for path in files(tmp_path)[:2]:
        damage(path)
    cache = FeatureCache(tmp_path, encoder)
    with pytest.warns(UserWarning, match="is damaged") as said:
        assert torch.equal(cache.features(images), expected)
    assert len(said) == 1
    assert (cache.damaged, cache.computed, cache.read) == (2, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the files are whole again
        assert torch.equal(FeatureCache(tmp_path, encoder).features(images), expected)


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanomolmo2.training.feature_cache.save_tensors", full)
    encoder, images = frozen(), pictures(3)
    cache = FeatureCache(tmp_path, encoder)
    with pytest.warns(UserWarning, match="is the disk full") as said:
        found = cache.features(images)
    assert len(said) == 1 and torch.equal(found, FeatureCache(None, encoder).features(images))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def _fill(folder: Path, barrier) -> None:
    torch.set_num_threads(1)
    cache = FeatureCache(folder, frozen())
    barrier.wait()
    for _ in range(3):
        cache.features(pictures(12))
    assert cache.damaged == 0


def test_processes_may_fill_one_folder_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_fill, args=(tmp_path, barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(files(tmp_path)) == 12 and not list(tmp_path.rglob("*.tmp*"))
    cache = FeatureCache(tmp_path, frozen())
    assert torch.equal(
        cache.features(pictures(12)), FeatureCache(None, frozen()).features(pictures(12))
    )
    assert cache.read == 12


def test_size_counts_this_encoder_and_others(tmp_path):
    assert FeatureCache(None, frozen()).size().bytes == 0
    FeatureCache(tmp_path, frozen(1)).features(pictures(2))
    cache = FeatureCache(tmp_path, frozen())
    cache.features(pictures(3))
    size = cache.size()
    assert (size.images, size.other_images) == (3, 2)
    assert size.bytes + size.other_bytes == sum(p.stat().st_size for p in files(tmp_path))
    numbers = 3 * VISION.num_patches * VISION.hidden_size
    assert 2 * numbers < size.bytes < 2 * numbers + 3 * 300
    assert str(size).startswith("3 pictures, 0.0 MB; of other encoders 2 pictures")


def test_an_encoder_that_trains_is_refused(tmp_path):
    model = NanoMolmo2(small_model(freeze_vision=False).config)
    with pytest.raises(ValueError, match="freeze it"):
        FeatureCache.of_model(tmp_path, model).features(pictures(1))
