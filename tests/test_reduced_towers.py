"""Reduced towers of transformers against a run of each image alone; what is tracked, undone, refused."""

import math

import naive_reducers as naive
import pytest
import torch
from small_towers import PICTURE, PLAIN, VISION
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SamConfig,
    SamModel,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from samer.config import InputError, ReduceConfig
from samer.reducers.running import reduce_tower, reduced

BLOCKS = 5
STATISTICS = {"mean": [0.04, 0.03, 0.05, 0.02, 0.03], "deviation": [0.02] * BLOCKS}
SETTINGS = {
    "tome": ReduceConfig("tome", r=5),
    "tome at two": ReduceConfig("tome", r=9, layers=(0, 3)),
    "adamerge": ReduceConfig("adamerge", r=9, **STATISTICS),
    "adamerge inverse": ReduceConfig("adamerge", r=7, order="inverse", temperature=0.5, alpha=2.0, **STATISTICS),
    "adamerge proportional": ReduceConfig("adamerge", r=9, proportional=True, **STATISTICS),
    "cubist": ReduceConfig("cubist", r=2),
    "cubist at two": ReduceConfig("cubist", r=1, layers=(0, 2)),
    "cubist share": ReduceConfig("cubist", r=0.2, layers=(3,)),
}
# kind: blocks, what stands before attention and MLP, special tokens
PARTS = {
    "vit": ("layers", ("layernorm_before", "attention", "layernorm_after"), 1),
    "deit": ("layers", ("layernorm_before", "attention", "layernorm_after"), 2),
    "dinov2": ("encoder.layer", ("norm1", "attention", "norm2"), 1),
    "registers": ("encoder.layer", ("norm1", "attention", "norm2"), 5),
    "dinov3": ("model.layer", ("norm1", "attention", "norm2"), 4),
    "siglip": ("encoder.layers", ("layer_norm1", "self_attn", "layer_norm2"), 0),
}


def tower(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "dinov3":
        model = DINOv3ViTModel(DINOv3ViTConfig(**PLAIN, **PICTURE, num_register_tokens=3))
    else:
        model = VISION[kind]()[0]
        model = getattr(model, "vision_model", model)
    for weight in model.parameters():  # larger ones make salience all but 0 in most places, and means by it arbitrary
        weight.data += 0.07 * torch.randn_like(weight)
    return model.double().eval()  # so that no choice hangs on rounding


def pixels(images=3, height=32, width=32, seed=1):
    torch.manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.randn(images, 3, 4, 4), size=(height, width), mode="bilinear")
    spread = torch.linspace(0.5, 2, images)[:, None, None, None]
    return (smooth * spread + 0.1 * torch.randn(images, 3, height, width)).double()


def run(model, images):
    with torch.no_grad():
        return model(pixel_values=images).last_hidden_state


def rope_of(model, coords):
    """DINOv3's rotary positions of places (N, 2) in [-1, 1]."""
    inv_freq = model.rope_embeddings.inv_freq
    angles = torch.stack([torch.cat([2 * math.pi * y * inv_freq, 2 * math.pi * x * inv_freq] * 2) for y, x in coords])
    return angles.cos().double(), angles.sin().double()


def places(height, width):
    return [(2 * (y + 0.5) / height - 1, 2 * (x + 0.5) / width - 1) for y in range(height) for x in range(width)]


@torch.no_grad()
def naive_run(model, kind, image, settings):
    """One image (3, H, W): what comes out, (S + N, D), the patches of each token, and how many leave each block."""
    path, (norm1, attention, norm2), specials = PARTS[kind]
    x = model.embeddings(image[None])[0]
    height, width = image.shape[1] // 4, image.shape[2] // 4
    groups = [[n] for n in range(height * width)]
    grid, counts, method = (height, width), [], settings.method
    layers = settings.layers or (range(BLOCKS) if method != "cubist" else (1,))
    for number, block in enumerate(model.get_submodule(path)):
        head, x = x[:specials], x[specials:]
        into = list(range(len(x)))
        if number in layers and method == "adamerge":
            z = (naive.adamerge_similarity(x) - settings.mean[number]) / settings.deviation[number]
            r = math.floor(settings.r / (1 + math.exp(-settings.alpha * z / settings.temperature)))
            x, into = naive.adamerge(x, min(r, len(x) // 2), settings.order)
        if number in layers and method == "cubist":
            r = [int(settings.r) if settings.r >= 1 else round(settings.r * side) for side in grid]
            y, into = naive.cubist(x.view(*grid, -1), *r)
            x, grid = y.flatten(0, 1), (grid[0] - r[0], grid[1] - r[1])
        groups = [[p for g, to in zip(groups, into) if to == n for p in g] for n in range(len(x))]
        x = torch.cat([head, x])
        part, more = block.get_submodule(attention), {}
        if kind == "dinov3" and method == "cubist":
            more = {"position_embeddings": rope_of(model, places(*grid))}
        elif kind == "dinov3":
            own = torch.tensor(places(height, width))
            more = {"position_embeddings": rope_of(model, [own[group].mean(0).tolist() for group in groups])}
        sizes = torch.tensor([1.0] * specials + [len(group) for group in groups])
        bias = sizes.log().double()[None, None, None] if method == "tome" or settings.proportional else None
        normed = getattr(block, norm1)(x[None])
        y = part(normed, attention_mask=bias, **more)[0][0]
        x = x + (block.layer_scale1(y) if hasattr(block, "layer_scale1") else y)
        if number in layers and method == "tome":
            keys = part.k_proj(normed)[0].view(len(x), 2, -1).mean(1)
            y, into, _ = naive.tome(x[specials:], int(settings.r), sizes[specials:], keys[specials:])
            groups = [[p for g, to in zip(groups, into) if to == n for p in g] for n in range(len(y))]
            x = torch.cat([x[:specials], y])
        y = block.mlp(getattr(block, norm2)(x))
        x = x + (block.layer_scale2(y) if hasattr(block, "layer_scale2") else y)
        counts.append(len(groups))
    last = next(getattr(model, n) for n in ("layernorm", "norm", "post_layernorm") if hasattr(model, n))
    return last(x), groups, counts


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", PARTS)
def test_a_batch_equals_its_images_one_by_one(kind, settings):
    model, images, specials = tower(kind), pixels(), PARTS[kind][2]
    with reduced(model, settings) as found:
        states = run(model, images)
    tokens = found.tokens
    for row, image in enumerate(images):
        wanted, groups, counts = naive_run(model, kind, image, settings)
        assert torch.allclose(states[row, : len(wanted)], wanted, atol=1e-5)
        assert [int(each[row]) for each in tokens.counts] == counts
        assert tokens.source[row].tolist() == [next(n for n, g in enumerate(groups) if p in g) for p in range(64)]
        assert tokens.sizes[row, : len(groups)].tolist() == [len(group) for group in groups]
    assert states.shape[1] == specials + int(tokens.number.max())
    assert int(tokens.counts[-1].min()) < 64


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("method", ["none", "tome", "adamerge", "cubist"])
def test_nothing_to_merge_is_bit_equal_to_the_plain_tower(kind, method):
    model, images = tower(kind), pixels()
    plain = run(model, images)
    with reduced(model, ReduceConfig(method, r=0)) as found:
        assert torch.equal(run(model, images), plain)
    assert found.tokens.counts[-1].tolist() == [64] * 3
    with reduced(model, SETTINGS["cubist"]):
        assert run(model, images).shape != plain.shape
    assert torch.equal(run(model, images), plain)  # undone


@pytest.mark.parametrize("name", ["tome", "adamerge", "cubist at two"])
@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "siglip"])
def test_unmerged_every_patch_has_its_token_in_every_hidden_state(kind, name):
    model, images, specials = tower(kind), pixels(), PARTS[kind][2]
    with torch.no_grad(), reduced(model, SETTINGS[name]) as few:
        short = model(pixel_values=images, output_hidden_states=True)
    whole = ReduceConfig(**{**vars(SETTINGS[name]), "unmerge": True})
    with torch.no_grad(), reduced(model, whole) as found:
        full = model(pixel_values=images, output_hidden_states=True)
    assert torch.equal(few.tokens.source, found.tokens.source)
    assert all(each.shape[1] == specials + 64 for each in full.hidden_states)
    wanted = found.tokens.spread(short.last_hidden_state[:, specials:])
    assert torch.allclose(full.last_hidden_state[:, specials:], wanted, atol=1e-5)
    assert torch.allclose(full.last_hidden_state[:, :specials], short.last_hidden_state[:, :specials], atol=1e-5)
    if kind == "siglip":  # its pooling head is given every patch either way
        assert torch.allclose(full.pooler_output, short.pooler_output, atol=1e-5)


def test_dinov3_on_a_smaller_grid_is_dinov3_given_that_grid():
    model, images = tower("dinov3"), pixels(2, 32, 48)
    seen = {}
    hook = model.model.layer[1].norm1.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    with reduced(model, SETTINGS["cubist"]):
        states = run(model, images)
    hook.remove()
    with torch.no_grad():
        rope = model.rope_embeddings(images.new_zeros(1, 3, (8 - 2) * 4, (12 - 2) * 4))
        x = seen["x"]
        assert x.shape[1] == 4 + 6 * 10
        for block in model.model.layer[1:]:
            x = block(x, position_embeddings=rope)
        assert torch.equal(model.norm(x), states)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_a_backbone_gives_whole_feature_maps_when_unmerged(kind):
    stages = {"out_features": ["stage2", "stage5"], "reshape_hidden_states": True}
    if kind == "dinov2":
        plain = {name: value for name, value in PLAIN.items() if name != "intermediate_size"}
        model = Dinov2Backbone(Dinov2Config(**plain, **PICTURE, **stages)).double().eval()
    else:
        model = DINOv3ViTBackbone(DINOv3ViTConfig(**PLAIN, **PICTURE, **stages)).double().eval()
    images = pixels()
    with torch.no_grad():
        before = model(images).feature_maps
        with reduced(model, ReduceConfig("cubist", r=0.1, unmerge=True)) as found:
            after = model(images).feature_maps
    assert [each.shape for each in after] == [each.shape for each in before]
    assert not torch.allclose(after[1], before[1], atol=1e-4)
    flat = after[1].flatten(2).transpose(1, 2)
    one, other = next(
        (p, q) for p in range(64) for q in range(p) if found.tokens.source[0, p] == found.tokens.source[0, q]
    )
    assert torch.equal(flat[0, one], flat[0, other])


def test_for_good_and_undone_and_inside_a_larger_model():
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**PLAIN, **PICTURE)).double().eval()
    images = pixels()
    with torch.no_grad():
        plain = model(images).logits
        found = reduce_tower(model, SETTINGS["tome"])
        reduced_once, again = model(images).logits, model(images).logits
        assert torch.equal(reduced_once, again)
        assert not torch.equal(reduced_once, plain)
        assert torch.stack(found.tokens.counts)[:, 0].tolist() == [59, 54, 49, 44, 39]
        with pytest.raises(InputError, match="reduced already"):
            reduce_tower(model, SETTINGS["tome"])
        found.detach()
        assert torch.equal(model(images).logits, plain)
    assert not any("forward" in vars(block) for block in model.vit.layers)


def test_a_share_of_a_batch_is_the_mean_of_what_its_images_ask_for():
    model, images = tower("vit"), pixels()
    with reduced(model, SETTINGS["adamerge"]) as own:
        run(model, images)
    with reduced(model, ReduceConfig("adamerge", r=9, batch="shared", **STATISTICS)) as shared:
        run(model, images)
    first = 64 - own.tokens.counts[0]
    assert len(set(first.tolist())) > 1
    assert (64 - shared.tokens.counts[0]).tolist() == [round(first.float().mean().item())] * 3
    assert shared.tokens.mask is None
    assert own.tokens.mask is not None


def sam(**more):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_dim": 32, "image_size": 64}
    vision |= {
        "patch_size": 4,
        "window_size": 5,
        "global_attn_indexes": [1, 3],
        "output_channels": 16,
        "num_pos_feats": 8,
    }
    config = SamConfig(
        vision_config={**vision, **more},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 4, "image_embedding_size": 16},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    model = SamModel(config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model.double().eval()


@torch.no_grad()
def naive_sam(encoder, image, layer, r):
    """SAM's encoder on one picture (1, 3, 64, 64), windows merged one by one before block `layer`, and spread again."""
    x = encoder.patch_embed(image) + encoder.pos_embed
    window, back = encoder.config.window_size, None
    for number, block in enumerate(encoder.layers):
        if number == layer:
            rows, target, base = [], torch.zeros(16, 16, dtype=torch.long), [0, 0]
            for top in range(0, 16, window):
                parts, base[1] = [], 0
                for first in range(0, 16, window):
                    part = x[0, top : top + window, first : first + window]
                    y, own = naive.cubist(part, r, r)
                    own = torch.tensor(own).view(part.shape[:2])
                    cell = (base[0] + own // y.shape[1]) * 1000 + base[1] + own % y.shape[1]
                    target[top : top + window, first : first + window] = cell
                    parts.append(y)
                    base[1] += y.shape[1]
                rows.append(torch.cat(parts, 1))
                base[0] += rows[-1].shape[0]
            x, back, window = torch.cat(rows)[None], target, window - r
        # a window at a time, padded with zeros as SAM pads, through the block's own attention and tables
        residual, normed = x, block.layer_norm1(x)
        size = window if block.window_size else max(x.shape[1:3])
        y = torch.zeros_like(x)
        for top in range(0, x.shape[1], size):
            for first in range(0, x.shape[2], size):
                part = normed[:, top : top + size, first : first + size]
                high, wide = part.shape[1:3]
                part = torch.nn.functional.pad(part, (0, 0, 0, size - wide, 0, size - high))
                y[:, top : top + high, first : first + wide] = block.attn(part)[0][:, :high, :wide]
        x = residual + y
        x = x + block.mlp(block.layer_norm2(x))
    if back is not None:
        x = torch.stack([torch.stack([x[0, int(c) // 1000, int(c) % 1000] for c in row]) for row in back])[None]
    return encoder.neck(x)


@pytest.mark.parametrize(("layer", "window"), [(0, 5), (1, 4), (2, 4), (3, 5)])
def test_sam_merges_in_its_windows_and_masks_keep_their_size(layer, window):
    model, images = sam(window_size=window), pixels(2, 64, 64)
    points = torch.tensor([[[[20.0, 30.0]]], [[[50.0, 10.0]]]]).double()
    small = 16 % window or window
    if small < 2:  # a window of a single row can lose none
        with (
            pytest.raises(InputError, match="would not be whole"),
            reduced(model, ReduceConfig("cubist", r=1, layers=(layer,))),
        ):
            run(model.vision_encoder, images)
        return
    with torch.no_grad():
        plain = model(pixel_values=images, input_points=points)
        with reduced(model, ReduceConfig("cubist", r=0)):
            same = model(pixel_values=images, input_points=points)
        with reduced(model, ReduceConfig("cubist", r=1, layers=(layer,))) as found:
            fewer = model(pixel_values=images, input_points=points)
            states = run(model.vision_encoder, images)
    assert torch.equal(same.pred_masks, plain.pred_masks)
    assert fewer.pred_masks.shape == plain.pred_masks.shape
    assert not torch.allclose(fewer.pred_masks, plain.pred_masks, atol=1e-5)
    for row in range(2):
        wanted = naive_sam(model.vision_encoder, images[row : row + 1], layer, 1)
        assert torch.allclose(states[row], wanted[0], atol=1e-5)
    left = (16 - -(-16 // window)) ** 2
    assert [int(each[0]) for each in found.tokens.counts] == [256] * layer + [left] * (4 - layer)
    assert [block.window_size for block in model.vision_encoder.layers] == [window, 0, window, 0]  # as it was


def test_sam_takes_only_what_leaves_a_grid():
    model = sam()
    with pytest.raises(InputError, match="windows of a grid, and tome leaves none"):
        reduce_tower(model, SETTINGS["tome"])
    with reduced(model, ReduceConfig("cubist", r=3)), pytest.raises(InputError, match="would not be whole"):
        run(model.vision_encoder, pixels(1, 64, 64))


def test_what_does_not_fit_a_tower_is_refused():
    model = tower("vit")
    with pytest.raises(InputError, match=r"SwinModel is or holds no vision tower .* there are ViTModel, DeiTModel"):
        reduce_tower(VISION["swin"]()[0], SETTINGS["tome"])
    with pytest.raises(InputError, match="'tomme' is unknown; use one of none, tome, adamerge, cubist"):
        reduce_tower(model, ReduceConfig("tomme", r=1))
    with pytest.raises(InputError, match="block 5; the tower has 5, from 0 to 4"):
        reduce_tower(model, ReduceConfig("tome", r=1, layers=(2, 5)))
    with pytest.raises(InputError, match=r"needs statistics; make them with scripts/calibrate\.py"):
        reduce_tower(model, ReduceConfig("adamerge", r=3))
    with pytest.raises(InputError, match="statistics of 2 blocks, the tower 5"):
        reduce_tower(model, ReduceConfig("adamerge", r=3, mean=[0, 0], deviation=[1, 1]))
    with reduced(model, ReduceConfig("tome", r=20)), pytest.raises(InputError, match=r"block 2 has 24, of which 12"):
        run(model, pixels())
    with (
        reduced(model, ReduceConfig("cubist", r=5)),
        pytest.raises(InputError, match="a row of 8 tokens can lose 0 to 4"),
    ):
        run(model, pixels())
    with reduced(model, SETTINGS["tome"]), pytest.raises(InputError, match="takes no attention mask of its own"):
        model(pixels(), attention_mask=torch.tensor([[True] * 60 + [False] * 5] * 3))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="computes attention by 'flash_attention_2'"):
        reduce_tower(model, SETTINGS["tome"])


@pytest.mark.parametrize(
    "values",
    [
        {"r": -1},
        {"r": 1.5},
        {"r": float("inf")},
        {"order": "best"},
        {"batch": "each"},
        {"layers": [-1]},
        {"alpha": 0},
        {"method": "none"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(values):
    with pytest.raises(InputError, match=f"reduce.{next(iter(values))} must be"):
        ReduceConfig(**{"method": "tome", "r": 2, **values})


def test_siglip_alone_and_in_a_model_of_both_are_the_same_tower():
    both = VISION["siglip"]()[0].double().eval()
    images = pixels()
    alone = SiglipVisionModel(both.config.vision_config).double().eval()
    alone.load_state_dict(both.vision_model.state_dict())
    with reduced(both, SETTINGS["tome"]), reduced(alone, SETTINGS["tome"]):
        assert torch.equal(run(both.vision_model, images), run(alone, images))
