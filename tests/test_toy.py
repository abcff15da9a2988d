"""What a newcomer adds in one file: a retriever with a grid of 3 x 5 and no bias, and a reader; then every step runs.

Each picture is 120 x 48 pixels, grey, with two cells of the grid in colours that the captions name: so it is known
which cell a word speaks of, and a grid that is turned anywhere shows. Shape letters: B images or texts, N tokens.
"""

import io
import json
import re
import zlib
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import naive_merge
from PIL import Image
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from samer.config import InputError, load_config
from samer.data import READERS
from samer.data.reader import Reader
from samer.data.records import Caption, ImageRecord, Phrase
from samer.evaluation import both_directions, evaluate_records
from samer.features.read import open_encoder
from samer.index.read import Index
from samer.index.write import build_index
from samer.report.gallery import Shown, make_gallery
from samer.report.page import write_report
from samer.retrievers import FAMILIES
from samer.retrievers.family import Family
from samer.retrievers.projectors import load_projector
from samer.search.models import Models
from samer.search.open_index import SearchIndex
from samer.training.loop import train

ROWS, COLUMNS, CELL = 3, 5, (24, 16)  # a cell's width and height in pixels
COLOURS = {
    "red": (220, 20, 30),
    "green": (20, 170, 60),
    "blue": (30, 40, 210),
    "yellow": (235, 215, 20),
    "purple": (140, 30, 170),
    "orange": (245, 130, 10),
    "cyan": (20, 200, 220),
}

# --- the reader -----------------------------------------------------------------------------------------------------


class Lines(Reader):
    """`<split>.jsonl`: a line per image, {"id", "file", "captions": [{"text", "phrases": [[start, end, boxes]]}]}."""

    def load_split(self, root, split, *, boxes, limit_images=None, strict=False):
        root = Path(root)
        try:
            lines = (root / f"{split}.jsonl").read_text().splitlines()[:limit_images]
        except FileNotFoundError:
            raise InputError(f"{root}: no {split}.jsonl; write one") from None
        return [self.record(root, json.loads(line), boxes) for line in lines]

    def record(self, root, row, boxes):
        captions = []
        for caption in row["captions"]:
            phrases = tuple(
                Phrase(
                    caption["text"][start:end], str(k), ("other",), start, end, tuple(map(tuple, found[: 9 * boxes]))
                )
                for k, (start, end, found) in enumerate(caption["phrases"])
            )
            captions.append(Caption(caption["text"], phrases, related=True))
        return ImageRecord(row["id"], root / row["file"], tuple(captions))


# --- the retriever --------------------------------------------------------------------------------------------------

PAD, IMAGE, LOOK, ASK, WORDS = 0, 1, 2, 3, 4  # token ids; words follow, by their hash


class ColoursConfig(PretrainedConfig):
    model_type = "colours"

    def __init__(self, width=64, embedding_dim=24, words=256, **more):
        self.width, self.embedding_dim, self.words = width, embedding_dim, words
        super().__init__(**more)


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.words = nn.Embedding(WORDS + config.words, config.width)
        self.sight = nn.Linear(3, config.width)

    def forward(self, ids, pixels):
        states = self.words(ids)
        return states if pixels is None else states.masked_scatter((ids == IMAGE)[..., None], self.see(pixels))

    def see(self, colours):
        return torch.tanh(3 * self.sight(colours))


class ColoursForRetrieval(PreTrainedModel):
    config_class = ColoursConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.body = Body(config)
        self.to_tokens = nn.Linear(config.width, config.embedding_dim, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask, pixel_values=None):
        tokens = self.to_tokens(self.body(input_ids, pixel_values))
        return SimpleNamespace(embeddings=tokens / tokens.norm(dim=-1, keepdim=True))


def word_id(word):
    return WORDS + zlib.crc32(word.encode()) % 256


class ColoursProcessor:
    image_token, image_token_id, query_prefix = "<cell>", IMAGE, ""

    def __call__(self, images=None, text=None, return_offsets_mapping=False):
        if images is not None:
            small = [image.resize((COLUMNS, ROWS), Image.BOX) for image in images]  # mean colours
            cells = [torch.from_numpy(np.asarray(each, dtype=np.float32) / 255).reshape(-1, 3) for each in small]
            ids = torch.tensor([[LOOK, *[IMAGE] * (ROWS * COLUMNS)]] * len(images))
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.cat(cells)}
        found = [list(re.finditer(r"\S+", each)) for each in text]
        width = 1 + max(map(len, found))
        ids = torch.full((len(text), width), PAD)
        spans = torch.zeros(len(text), width, 2, dtype=torch.long)
        for row, words in enumerate(found):
            ids[row, : len(words) + 1] = torch.tensor([ASK, *(word_id(word.group()) for word in words)])
            spans[row, 1 : len(words) + 1] = torch.tensor([word.span() for word in words])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "offset_mapping": spans}


class Colours(Family):
    architecture = "ColoursForRetrieval"
    model_type = "colours"
    projection = "to_tokens"
    options = MappingProxyType({})
    grid = (ROWS, COLUMNS)
    image_token_id = IMAGE

    @classmethod
    def model_class(cls):
        return ColoursForRetrieval

    @classmethod
    def load_processor(cls, name, **where):
        return ColoursProcessor()

    @property
    def backbone(self):
        return self.model.body


@torch.no_grad()
def save_retriever(folder):
    """A retriever whose word for a colour is near what it makes of that colour, so that there is something to learn."""
    torch.manual_seed(3)
    model = ColoursForRetrieval(ColoursConfig())
    model.body.sight.weight.normal_()
    model.body.sight.bias.normal_(std=0.3)
    model.body.words.weight.normal_()
    model.to_tokens.weight.normal_(std=0.25)
    for name, colour in COLOURS.items():
        seen = model.body.see(torch.tensor(colour) / 255)
        model.body.words.weight[word_id(name)] = seen + 0.8 * torch.randn(len(seen))
    model.save_pretrained(folder)


# --- the world ------------------------------------------------------------------------------------------------------


def write_world(root):
    """28 train, 7 val and 7 test images of two colours each, in other places in every split."""
    rng = np.random.default_rng(5)
    pairs = list(combinations(COLOURS, 2))
    for split, chosen in {"train": pairs + pairs[::3], "val": pairs[::3], "test": pairs[1::3]}.items():
        lines = []
        for number, names in enumerate(chosen):
            pixels = np.repeat(rng.integers(60, 200, (ROWS, COLUMNS, 1)), 3, axis=2).astype(np.uint8)  # grey
            places = rng.choice(ROWS * COLUMNS, 2, replace=False).tolist()
            for name, place in zip(names, places):
                pixels[divmod(place, COLUMNS)] = COLOURS[name]
            whole = Image.fromarray(pixels).resize((COLUMNS * CELL[0], ROWS * CELL[1]), Image.NEAREST)
            whole.save(root / f"{split}-{number}.png")
            boxes = [
                [x / COLUMNS, y / ROWS, (x + 1) / COLUMNS, (y + 1) / ROWS]
                for y, x in (divmod(place, COLUMNS) for place in places)
            ]
            captions = []
            for text, order in (("a {} spot and a {} one on stone", (0, 1)), ("{} beside {} in grey", (1, 0))):
                words = text.format(*(names[k] for k in order))
                spans = [(words.index(names[k]), boxes[k], names[k]) for k in order]
                phrases = [[start, start + len(name), [box]] for start, box, name in spans]
                captions.append({"text": words, "phrases": phrases})
            lines.append(json.dumps({"id": f"{split}-{number}", "file": f"{split}-{number}.png", "captions": captions}))
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def cell_of(box):
    """Row and column of the only cell that a box covers."""
    return round(box[1] * ROWS), round(box[0] * COLUMNS)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Both registered, a world on disk, a trained projector and an index of the test split."""
    folder = tmp_path_factory.mktemp("toy")
    root, model = folder / "world", folder / "colours"
    root.mkdir()
    write_world(root)
    save_retriever(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "lines", Lines())
        patch.setitem(FAMILIES, Colours.architecture, Colours)
        settings = {
            "model.name": model,
            "data.root": root,
            "data.reader": "lines",
            "merge.num_regions": 7,
            "merge.center_init": "farthest",
            "train.output_dir": folder / "trained",
            "train.train_batch_size": 4,
            "train.grad_accum_steps": 1,
            "train.num_train_epochs": 2,
            "train.learning_rate": 0.02,
            "train.bf16": "false",
            "train.dataloader_num_workers": 0,
            "train.logging_steps": 1,
        }
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        trained = train(config)
        encoder = open_encoder(str(model), "cpu", adapter_path=folder / "trained")
        build_index(
            folder / "index", root, ["test"], encoder, config.merge, dtype="float32", reader="lines", assignments=True
        )
        yield SimpleNamespace(folder=folder, root=root, config=config, trained=trained, encoder=encoder)


def brute_scores(toy, records):
    """Every caption against every image, one at a time, from merges written as plain loops."""
    images = []
    for record in records:
        visual = toy.encoder.encode_images(toy.encoder.record_inputs([record]))
        images.append(naive_merge(visual.tokens[0], visual.coords[0], toy.config.merge)[0])
    scores = []
    for record in records:
        for caption in record.captions:
            query = toy.encoder.encode_queries(toy.encoder.query_inputs([caption.text])).tokens[0]
            scores.append([sum(max(float(u @ m) for m in image) for u in query) / len(query) for image in images])
    return scores


def recall(scores, k):
    """Percent of captions, two an image, whose image is among the k best; no two scores are alike here."""
    hits = 0
    for number, row in enumerate(scores):
        assert len(set(row)) == len(row)
        hits += number // 2 in sorted(range(len(row)), key=lambda image: -row[image])[:k]
    return 100 * hits / len(scores)


def test_the_retriever_is_what_it_says(toy):
    assert toy.encoder.base_projector.bias is None
    assert toy.encoder.grid == (ROWS, COLUMNS)
    records = READERS["lines"].load_split(toy.root, "test", boxes=True)
    layout = toy.encoder.image_layout(toy.encoder.record_inputs(records[:2]))
    assert layout.grid.tolist() == [[ROWS, COLUMNS]] * 2
    assert layout.source.tolist() == [list(range(1, 16))] * 2  # the prompt's token stands first
    assert Image.open(records[0].image_path).size == (120, 48)
    assert len({word_id(name) for name in [*COLOURS, "a", "spot", "and", "one", "on", "stone", "beside", "in"]}) == 15


def test_it_trains(toy):
    history = json.loads((toy.folder / "trained" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == toy.trained.steps == 2 * 14  # 56 captions in batches of 4
    assert np.mean(losses[14:]) < 0.8 * np.mean(losses[:14])
    weights = load_projector(toy.folder / "trained", toy.encoder)
    assert weights.bias is None
    assert (weights.weight - toy.encoder.base_projector.weight).abs().max() > 0.01
    untouched = open_encoder(toy.config.model.name, "cpu")
    records = READERS["lines"].load_split(toy.root, "val", boxes=False)
    before = evaluate_records(untouched, records, toy.config.merge, batch_size=4)
    assert toy.trained.validation["mrr@10"] > before["mrr@10"]


def test_evaluation_equals_brute_force(toy):
    records = READERS["lines"].load_split(toy.root, "test", boxes=False)
    expected = brute_scores(toy, records)
    scores, image_of = Index(toy.folder / "index").scores("test")
    assert image_of.tolist() == [image for image in range(len(records)) for _ in range(2)]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-5)
    metrics = both_directions(scores, image_of)["text_to_image"]
    for k in (1, 5):
        assert metrics[f"r@{k}"]["value"] == pytest.approx(recall(expected, k))
    assert metrics["r@1"]["value"] > 60  # of 7 images


def test_the_index_holds_grids_and_the_region_of_every_patch(toy):
    records = READERS["lines"].load_split(toy.root, "test", boxes=False)
    ((ids, regions, grids),) = Index(toy.folder / "index").assignments("test")
    assert ids == [record.image_id for record in records]
    assert grids.tolist() == [[ROWS, COLUMNS]] * len(records)
    for record, row in zip(records, regions):
        visual = toy.encoder.encode_images(toy.encoder.record_inputs([record]))
        clusters = naive_merge(visual.tokens[0], visual.coords[0], toy.config.merge)[3]
        assert row.tolist() == clusters[1:].tolist()


@pytest.fixture(scope="module")
def gallery(toy):
    records = READERS["lines"].load_split(toy.root, "test", boxes=True)
    everything = replace(toy.config.merge, compressor="none")
    shown = [
        Shown("all tokens", everything, toy.encoder.base_projector),
        Shown("merged", toy.config.merge, Index(toy.folder / "index").projector()),
    ]
    return make_gallery(toy.encoder, records, shown, shown[1:])


def test_evidence_stands_on_the_cell_that_the_word_names(gallery):
    assert len(gallery.cases) >= 4
    for case in gallery.cases:
        assert case.phrase.text in COLOURS
        cell = cell_of(case.phrase.boxes[0])
        evidence, mass = case.evidence[1], case.box_mass[1]
        assert evidence.shape == (ROWS, COLUMNS)
        assert evidence.sum() == pytest.approx(1, abs=1e-5)
        assert np.unravel_index(evidence.argmax(), evidence.shape) == cell
        assert mass == pytest.approx(evidence[cell], abs=1e-5)  # the box is that cell
        assert mass > 0.5
    for item in gallery.regions:
        assert [tuple(regions.shape) for _, regions in item.assignments] == [(ROWS, COLUMNS)]


def lit_cells(figure, size):
    """How colourful each cell of a case's last picture is, (ROWS, COLUMNS), away from the lines between cells."""
    width, height = round(size[0] * 300 / size[1]), 300
    left, top = figure.width - 14 - width, figure.height - 56 - height
    pixels = np.asarray(figure.crop((left, top, left + width, top + height)).convert("RGB"), dtype=float)
    inner = np.zeros((ROWS, COLUMNS))
    for y in range(ROWS):
        for x in range(COLUMNS):
            rows = slice(round(height * (y + 0.3) / ROWS), round(height * (y + 0.7) / ROWS))
            columns = slice(round(width * (x + 0.3) / COLUMNS), round(width * (x + 0.7) / COLUMNS))
            cell = pixels[rows, columns]
            inner[y, x] = (cell.max(2) - cell.min(2)).mean()
    return inner


def test_the_report_lights_that_cell(gallery, tmp_path):
    page, *files = write_report(
        tmp_path / "report.html", title="toy", about=[], tiles=[], tables=[], gallery=gallery, note=""
    )
    names = [file.name for file in files]
    assert names[: len(gallery.cases)] == [f"case-{k:02d}.png" for k in range(1, len(gallery.cases) + 1)]
    for case, file in zip(gallery.cases, files):
        colourful = lit_cells(Image.open(io.BytesIO(file.read_bytes())), (120, 48))
        cell = cell_of(case.phrase.boxes[0])
        assert np.unravel_index(colourful.argmax(), colourful.shape) == cell
        assert np.sort(colourful.ravel())[-2] < 0.6 * colourful[cell]  # the other colour is dim
    html = page.read_text()
    assert all(case.phrase.text in html for case in gallery.cases)


def test_the_script_evaluates_and_reports_it(toy, script, tmp_path):
    words = ["--cache-dir", toy.folder / "index", "--split", "test", "--output-json", tmp_path / "test.json"]
    words += ["--data-root", toy.root, "--reader", "lines"]
    result = script("eval").main([str(word) for word in words])
    records = READERS["lines"].load_split(toy.root, "test", boxes=False)
    assert result["text_to_image"]["r@1"]["value"] == pytest.approx(recall(brute_scores(toy, records), 1))
    assert len(list((tmp_path / "test_figures").glob("case-*.png"))) >= 3


def test_the_search_page_explains_by_cells(toy):
    index = SearchIndex(toy.folder / "index", Models("cpu"), data_root=toy.root, reader="lines")
    records = READERS["lines"].load_split(toy.root, "test", boxes=True)
    expected = brute_scores(toy, records)
    assert index.has_boxes
    for number, record in enumerate(records):
        caption = record.captions[0]
        found = index.search(caption.text, len(records))
        row = expected[2 * number]
        assert [name for name, _ in found.hits] == [
            records[k].image_id for k in sorted(range(len(records)), key=lambda k: -row[k])
        ]
        words, rows = index.explain(caption.text, found)
        assert [word.text for word in words] == caption.text.split()
        place = [name for name, _ in found.hits].index(record.image_id)
        own = rows[place]
        assert own["grid"] == [ROWS, COLUMNS]
        assert len(own["regions"]) == 15
        for phrase in caption.phrases:
            told = own["words"][[word.text for word in words].index(phrase.text)]
            row, column = cell_of(phrase.boxes[0])
            (vector,) = told["vectors"]
            region = [k for k, owner in enumerate(own["regions"]) if owner == vector]
            assert row * COLUMNS + column in region
            assert told["boxes"] == list(phrase.boxes)
            assert told["box_mass"] == pytest.approx(1 / len(region))
            assert told["box_mass"] > 0.5
        assert index.picture(own["number"]) == record.image_path
