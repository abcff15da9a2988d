"""A small retriever goes through training, features, index, evaluation and search, against plain loops."""

import json
from dataclasses import replace

import pytest
import torch
from oracle import naive_merge
from PIL import Image

from samer.data import flickr
from samer.data.records import ImageRecord
from samer.features.read import FeatureStore
from samer.index.read import Index
from samer.retrievers.attention import ATTENTION
from samer.retrievers.hf import Retriever
from samer.settings import vectors_of

SHAPES = [(96, 60), (40, 90), (50, 50), (90, 96)]


def pictures(sizes=SHAPES, seed=0):
    """Pictures of coarse noise, in colour."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for width, height in sizes:
        points = torch.randint(256, (5, 6, 3), generator=generator, dtype=torch.uint8)
        found.append(Image.fromarray(points.numpy()).resize((width, height), Image.BICUBIC))
    return found


def saved(folder, images):
    """Records of pictures written to `folder`."""
    folder.mkdir(exist_ok=True)
    records = []
    for number, image in enumerate(images):
        path = folder / f"{number}.png"
        image.save(path)
        records.append(ImageRecord(str(number), path, ()))
    return records


def tokens_equal_transformers(retriever, stock, inputs, queries):
    """Pictures and texts have the vectors that the model gives by itself; `stock`: loaded from the same files."""
    visual = retriever.encode_images(inputs)
    with torch.no_grad():
        expected = stock(**inputs).embeddings
        asked = stock(**{name: queries[name] for name in ("input_ids", "attention_mask")}).embeddings
    torch.testing.assert_close(visual.tokens[visual.mask], expected[visual.mask], atol=1e-5, rtol=0)
    found = retriever.encode_queries(queries)
    torch.testing.assert_close(found.tokens[found.mask], asked[found.mask], atol=1e-5, rtol=0)


def alone_equals_batch(retriever, images):
    """Each picture of a ragged batch has the tokens and signals that it has alone."""
    inputs = retriever.image_inputs(images)
    assert not inputs["attention_mask"].all()
    together = retriever.encode_images(inputs, ATTENTION)
    for row, image in enumerate(images):
        single = retriever.encode_images(retriever.image_inputs([image]), ATTENTION)
        own = together.mask[row]
        torch.testing.assert_close(together.tokens[row][own], single.tokens[0], atol=1e-5, rtol=0)
        assert torch.equal(together.coords[row][own], single.coords[0])
        assert torch.equal(together.views[row][own], single.views[0])
        assert together.grid[row].tolist() == single.grid[0].tolist()
        cells = int(single.grid.prod())
        place = own.nonzero().flatten()
        assert torch.equal(together.source[row][:cells], place[single.source[0]])
        assert (together.source[row][cells:] == -1).all()
        for name in ATTENTION:
            torch.testing.assert_close(
                together.attention[name][row][own], single.attention[name][0], atol=1e-5, rtol=1e-5
            )


def queries_alone_equal_batch(retriever, texts):
    together = retriever.encode_queries(retriever.query_inputs(texts))
    assert not together.mask.all()
    for row, text in enumerate(texts):
        single = retriever.encode_queries(retriever.query_inputs([text]))
        own = together.mask[row]
        torch.testing.assert_close(together.tokens[row][own], single.tokens[0], atol=1e-5, rtol=0)
        assert torch.equal(together.offsets[row][own], single.offsets[0])


def text_of(offsets, text):
    """What a query's tokens say they stand for, in order."""
    return [text[first:last] for first, last in offsets.tolist() if first >= 0]


def expected_signals(attentions, patches, middle, last):
    """Signals of METHOD section 7 of eager attention, (B, heads, N, N) by layer: an image and a head at a time."""

    def columns(layer):
        found = torch.zeros(*patches.shape, attentions[layer].shape[1])
        for image in range(len(patches)):
            own = patches[image].nonzero().flatten()
            for head in range(found.shape[2]):
                found[image, own, head] = attentions[layer][image, head][own][:, own].sum(0)
        return found

    return {
        "middle_mean": torch.stack([columns(layer).mean(-1) for layer in middle]).mean(0),
        "middle_max": torch.stack([columns(layer).amax(-1) for layer in middle]).mean(0),
        "last": columns(last).mean(-1),
    }


def brute_scores(retriever, records, merge):
    """Every caption against every image, one at a time, from merges written as plain loops."""
    images = []
    for record in records:
        visual = retriever.encode_images(retriever.record_inputs([record]))
        own = replace(merge, num_regions=vectors_of(merge.num_regions, visual.tokens.shape[1]))
        images.append(naive_merge(visual.tokens[0], visual.coords[0], own, views=visual.views[0])[0])
    rows = []
    for record in records:
        for caption in record.captions:
            query = retriever.encode_queries(retriever.query_inputs([caption.text])).tokens[0]
            rows.append([float((query @ image.T).amax(1).mean()) for image in images])
    return torch.tensor(rows)


def every_step(base, world, script, tmp_path, capsys, *settings):
    """Trains from pixels and from a store, builds an index of each, evaluates and searches."""
    store = tmp_path / "store"
    making = ["--data-root", world, "--out", store, "--splits", "train", "val", "test", "--dtype", "float32"]
    script("features").main([str(word) for word in (*making, "--batch-size", 4, f"model.name={base}")])
    losses, config = {}, tmp_path / "config.yaml"
    config.write_text(f"model: {{name: {base}}}\n")
    for name, more in (("pixels", []), ("stored", [f"data.features={store}"])):
        words = ["--config", str(config), f"data.root={world}", f"train.output_dir={tmp_path / name}", *settings, *more]
        words += ["train.bf16=false", "train.train_batch_size=8", "train.grad_accum_steps=1", "data.eval_split=val"]
        words += ["train.num_train_epochs=2", "train.learning_rate=1e-2", "train.dataloader_num_workers=0"]
        script("train").main([*words, "train.logging_steps=1", "data.limit_train_images=6"])
        history = json.loads((tmp_path / name / "history.json").read_text())
        losses[name] = torch.tensor([entry["loss"] for entry in history if "loss" in entry])
    torch.testing.assert_close(losses["pixels"], losses["stored"], atol=1e-4, rtol=0)
    assert losses["pixels"][-3:].mean() < losses["pixels"][:3].mean()
    retriever = Retriever.load(str(base))
    records = flickr.load_split(world, "test", boxes=False)
    stored = FeatureStore(store, str(base))
    ours, theirs = (each.encode_images(each.record_inputs(records), ATTENTION) for each in (stored, retriever))
    assert torch.equal(ours.grid, theirs.grid)
    for row in range(len(records)):
        mine, other = (each.mask[row] if each.mask is not None else slice(None) for each in (ours, theirs))
        torch.testing.assert_close(ours.tokens[row][mine], theirs.tokens[row][other], atol=1e-5, rtol=0)
        assert torch.equal(ours.views[row][mine], theirs.views[row][other])
    scores = {}
    for name, more in (("pixels", []), ("stored", ["--features", store])):
        making = ["--data-root", world, "--adapter-path", tmp_path / "pixels", "--splits", "test", *more]
        making += ["--cache-dir", tmp_path / f"{name}.index", "--cache-dtype", "float32", "--batch-size", 3]
        script("cache").main([str(word) for word in making])
        scores[name] = Index(tmp_path / f"{name}.index").scores("test")
        assert Index(tmp_path / f"{name}.index").manifest.processing == retriever.processing
    index = Index(tmp_path / "pixels.index")
    retriever.use_projector(index.projector())
    expected = brute_scores(retriever, records, index.manifest.merge)
    for found, _ in scores.values():
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    about = ["--cache-dir", str(tmp_path / "pixels.index")]
    output = ["--output-json", str(tmp_path / "metrics.json"), "--data-root", str(world)]
    found = script("eval").main([*about, *output])
    positives = scores["pixels"][1]
    hits = (expected > expected.gather(1, positives[:, None])).sum(1) == 0
    assert found["text_to_image"]["r@1"]["value"] == pytest.approx(100 * float(hits.double().mean()))
    assert "and the boxes of the phrase<" in (tmp_path / "metrics.html").read_text()  # grounding, drawn
    capsys.readouterr()
    script("search").main([*about, "--json", "--top", "3", records[0].captions[0].text])
    rows = json.loads(capsys.readouterr().out)["results"]
    best = expected[0].topk(3)
    assert [row["id"] for row in rows] == [records[place].image_id for place in best.indices.tolist()]
    assert [row["score"] for row in rows] == pytest.approx(best.values.tolist(), abs=1e-4)
    return index
