"""Small stores of every kind that the tool reads, and what they say, read by other code."""

import json
import shutil
import xml.dom.minidom

import numpy as np
import torch
from harness import read_header
from PIL import Image, ImageOps
from safetensors.torch import save_file

from samer.config import MergeConfig
from samer.data import flickr
from samer.index import manifest as index_manifest
from samer.index import pictures as index_pictures
from samer.index import read as index_read
from samer.index import write as index_write
from samer.retrievers.base import Encoder, Projector
from samer.retrievers.projectors import save_projector
from samer.tokens import QueryTokens

DIM, GRID = 16, 4
MERGE = MergeConfig(num_regions=6)
KINDS = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1", "BOOL": "u1", "I64": "<i8", "I32": "<i4"}


class Drawn(Encoder):
    """Hidden states drawn from an id's or a text's letters; what is stored of them is all that matters here."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        weight = torch.eye(DIM) + 0.05 * torch.randn(DIM, DIM, generator=generator)
        super().__init__("drawn", Projector(weight, torch.zeros(DIM)), grid=(GRID, GRID), image_token_id=1)
        self.origin = {"computed_in": "float32", "stored_in": "nothing"}

    def draw(self, words, count):
        seeds = [torch.Generator().manual_seed(sum(word.encode()) + 7 * len(word)) for word in words]
        hidden = torch.stack([torch.randn(count, DIM, generator=seed) for seed in seeds])
        ids = torch.ones(hidden.shape[:2], dtype=torch.long)
        return {"hidden": hidden, "input_ids": ids, "attention_mask": ids}

    def image_inputs(self, images):
        return self.draw([str(sum(image.tobytes()[::97])) for image in images], GRID * GRID)

    def record_inputs(self, records):
        return self.draw([record.image_id for record in records], GRID * GRID)

    def query_inputs(self, texts):
        inputs = self.draw(texts, 5)
        lengths = torch.tensor([1 + len(text) % 5 for text in texts])
        return {**inputs, "attention_mask": (torch.arange(5) < lengths[:, None]).long()}

    def hidden_states(self, inputs):
        return inputs["hidden"]


def small_data(world, folder, count=3):
    """The first images of a world's test split, with captions and boxes."""
    source = flickr.find_layout(world)
    ids = (source.splits / "test.txt").read_text().split()[:count]
    for name in ("annotations/Sentences", "annotations/Annotations", "images/Images"):
        (folder / name).mkdir(parents=True)
    (folder / "annotations/test.txt").write_text("\n".join(ids) + "\n")
    (folder / "annotations/UNRELATED_CAPTIONS").write_text(f"{ids[0]} 2\n{ids[1]} 5\n")
    for name in ids:
        shutil.copy(source.sentences / f"{name}.txt", folder / "annotations/Sentences")
        shutil.copy(source.annotations / f"{name}.xml", folder / "annotations/Annotations")
        shutil.copy(source.images / f"{name}.jpg", folder / "images/Images")
    return folder


def make_cache(folder, data, dtype):
    """An index of the test split in shards of 2 images and 6 queries; of a float16 one an image is deleted."""
    before = index_write.IMAGES_PER_SHARD, index_write.QUERIES_PER_SHARD
    index_write.IMAGES_PER_SHARD, index_write.QUERIES_PER_SHARD = 2, 6
    try:
        index_write.build_index(folder, data, ["test"], Drawn(), MERGE, dtype=dtype, assignments=dtype == "float32")
    finally:
        index_write.IMAGES_PER_SHARD, index_write.QUERIES_PER_SHARD = before
    if dtype == "float16":
        index_pictures.delete_images(folder, "test", list(index_read.Index(folder).numbers("test"))[1:2])
    return folder


def questions(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.nn.functional.normalize(torch.randn(count, 4, DIM, generator=generator), dim=-1)
    return QueryTokens(tokens, torch.arange(4) < torch.tensor([4, 2, 3])[:count, None])


def tensors_of(data):
    """A safetensors file read by numpy: name -> array (bfloat16 as float32), and our own metadata."""
    header, body = read_header(data)
    own = json.loads(header.pop("__metadata__", {}).get("samer", "{}"))
    found = {}
    for name, about in header.items():
        start, end = about["data_offsets"]
        raw = body[start:end]
        if about["dtype"] == "BF16":
            array = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            array = np.frombuffer(raw, KINDS[about["dtype"]])
            array = array != 0 if about["dtype"] == "BOOL" else array  # a spoiled byte may be neither 0 nor 1
        found[name] = array.reshape(about["shape"])
    return found, own


def maxsim64(queries, images, masks):
    """Scores by float64 loops: queries [(M, D)], images [(K, D)], masks [(K,)]."""
    return np.array(
        [
            [
                np.mean([max(float(t @ v) for v in image[mask.astype(bool)]) for t in query])
                for image, mask in zip(images, masks)
            ]
            for query in queries
        ]
    )


def cache_says(folder, queries, top):
    """What an index holds as its files are now, read by other code; raises where they contradict each other."""
    manifest = json.loads((folder / "manifest.json").read_text())
    split = manifest["splits"]["test"]
    assert manifest["dtype"] in index_manifest.DTYPES
    shards, names, values, masks, numbers, regions, deleted = [], [], [], [], {}, [], split.get("deleted", {})
    for entry in split["images"]:
        tensors, own = tensors_of((folder / "test" / entry["file"]).read_bytes())
        ids, tokens, mask = own["stamp"]["ids"], tensors["tokens"], tensors["mask"]
        assert len(ids) == entry["count"] == len(tokens) == len(mask)
        assert len(set(ids)) == len(ids)
        assert entry["regions"] == mask.shape[1] == tokens.shape[1]
        assert type(entry["count"]) is int
        assert type(entry["bytes"]) is int
        exact = tokens
        if manifest["dtype"] == "binary":
            exact = tensors_of((folder / "test" / entry["exact"]["file"]).read_bytes())[0]["tokens"]
            assert exact.shape[:2] == tokens.shape[:2]
        factor = tensors["scales"].astype("f8") if manifest["dtype"] == "int8" else np.ones(len(ids))
        assert tensors["grids"].shape == (len(ids), 2)
        assert (tensors["grids"] > 0).all()
        assert np.isfinite(factor).all()
        assert (factor > 0).all()
        live = [k for k in range(len(ids)) if k not in deleted.get(entry["file"], [])]
        if "assignments" in tensors:
            assert tensors["assignments"].shape[1] >= tensors["grids"].astype("i8").prod(1).max()
            regions.append(([ids[k] for k in live], tensors["assignments"][live], tensors["grids"][live]))
        numbers |= {ids[k]: sum(s[0] for s in shards) + k for k in live}
        shards.append((len(ids), [ids[k] for k in live], tokens[live], mask[live].astype(bool), entry["bytes"]))
        names += [ids[k] for k in live]
        values += [exact[k].astype("f8") * factor[k] for k in live]
        masks += [mask[k] for k in live]
    scores = maxsim64([t[m].double().numpy() for t, m in zip(queries.tokens, queries.mask)], values, masks)
    found = [sorted(zip(names, row), key=lambda pair: -pair[1])[:top] for row in scores]
    asked, total = [], 0
    for entry in split["queries"]:
        tensors, own = tensors_of((folder / "test" / entry["file"]).read_bytes())
        assert tensors["lengths"].sum() == len(tensors["tokens"])
        assert len(own["stamp"]["texts"]) == len(tensors["image"]) == len(tensors["lengths"]) == entry["count"]
        assert (tensors["image"] >= 0).all()
        assert (tensors["image"] < sum(s[0] for s in shards)).all()
        parts = np.split(tensors["tokens"], np.cumsum(tensors["lengths"])[:-1])
        asked += list(zip(parts, tensors["image"].tolist(), own["stamp"]["texts"]))
        total += entry["count"]
    images = sum(s[0] for s in shards)
    return {
        "size": (len(names), total, max(s[3].shape[1] for s in shards), sum(s[4] for s in shards) / images),
        "images": [(s[1], s[2], s[3]) for s in shards if s[1]],
        "assignments": regions,
        "numbers": numbers,
        "vectors": [(v.astype("f4"), m.astype(bool)) for v, m in zip(values, masks)],
        "queries": asked,
        "search": found,
        "scores": maxsim64([part.astype("f8") for part, _, _ in asked], values, masks),
    }


def make_projectors(folder):
    """A projector in each of the forms that can be read: ours, PEFT's, the published one."""
    from peft import LoraConfig, get_peft_model

    encoder = Drawn()
    base = encoder.base_projector
    save_projector(folder / "ours", Projector(base.weight + 0.01, base.bias), encoder, MERGE)
    host = torch.nn.Module()
    host.embedding_proj_layer = torch.nn.Linear(DIM, DIM)
    torch.manual_seed(2)
    adapted = get_peft_model(
        host, LoraConfig(r=2, lora_alpha=4, target_modules=["embedding_proj_layer"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "lora")
    (folder / "lora" / "README.md").unlink(missing_ok=True)
    shutil.copytree(folder / "lora", folder / "whole")
    names = {n: f"base_model.model.embedding_proj_layer.{n}" for n in ("weight", "bias")}
    tensors = {names["weight"]: base.weight + 0.02, names["bias"]: base.bias.clone()}
    save_file(tensors, folder / "whole" / "adapter_model.safetensors")
    (folder / "legacy").mkdir()
    state = {"weight": base.weight + 0.03, "bias": base.bias.clone()}
    torch.save({"format": "samer_projector_v1", "projector_state_dict": state}, folder / "legacy" / "projector.pt")
    return folder


def projector_says(folder, kind):
    """The weight and bias that files hold as they are now."""
    base = Drawn().base_projector
    if kind == "legacy":
        return None  # no checksum in that format: see the test
    name = "projector.safetensors" if kind == "ours" else "adapter_model.safetensors"
    tensors, _ = tensors_of((folder / kind / name).read_bytes())
    tensors = {key.removeprefix("base_model.model.embedding_proj_layer."): value for key, value in tensors.items()}
    if kind != "lora":
        return tensors["weight"], tensors["bias"]
    config = json.loads((folder / kind / "adapter_config.json").read_text())
    a, b = (tensors[f"lora_{which}.weight"].astype("f8") for which in "AB")
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    weight = base.weight.numpy() + b @ a * scaling
    return weight.T if config["fan_in_fan_out"] else weight, base.bias.numpy()


def boxes_say(path, picture=None):
    """Chain id -> boxes of an annotation file by another XML reader.

    With a picture bad boxes are left out, and all of them where no scale makes one size the other within two pixels,
    unless one of both is a square.
    """
    root = xml.dom.minidom.parseString(path.read_bytes()).documentElement
    children = lambda node, tag: [n for n in node.childNodes if n.nodeType == n.ELEMENT_NODE and n.tagName == tag]

    def text(node):
        head = list(node.childNodes[:1])
        value = ""
        for child in node.childNodes:
            if child.nodeType in (child.TEXT_NODE, child.CDATA_SECTION_NODE):
                value += child.data
            elif child.nodeType == child.ELEMENT_NODE:
                break
        return value.strip() if head else ""

    value = lambda node, tag: float(text(children(node, tag)[0]))
    (size, *_) = children(root, "size")
    width, height = value(size, "width"), value(size, "height")
    found = {}
    for obj in children(root, "object"):
        for bound in children(obj, "bndbox"):
            x1, y1, x2, y2 = (value(bound, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
            good = min(x1, y1) >= -1e-9 and x2 <= width + 1 and y2 <= height + 1
            good = good and max(x1, 1) <= min(x2, width) and max(y1, 1) <= min(y2, height)
            if picture is not None and not good:
                continue
            assert good
            box = (
                (max(x1, 1) - 1) / width,
                (max(y1, 1) - 1) / height,
                min(x2, width) / width,
                min(y2, height) / height,
            )
            assert 0 <= box[0] <= box[2] <= 1
            assert 0 <= box[1] <= box[3] <= 1
            for name in children(obj, "name"):
                found.setdefault(text(name), []).append(box)
    if picture is not None:
        with Image.open(picture) as opened:
            size = ImageOps.exif_transpose(opened).size
        if width != height and size[0] != size[1] and not _scaled(size, (width, height)):
            return {}
    return found


def _scaled(one, two):
    """Whether some scale of a size is the other within two pixels; it is tried at the ends of where each side fits."""
    return any(
        all(abs(a - scale * b) <= 2 + 1e-9 for a, b in zip(small, large))
        for small, large in ((one, two), (two, one))
        for side in (0, 1)
        for scale in ((small[side] - 2) / large[side], (small[side] + 2) / large[side])
    )
