"""Small data sets of every kind but Flickr30k-Entities, written from plain values, for the tests of readers."""

import json

from PIL import Image


def picture(path, width=40, height=20, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def annotation(number, image, category, bbox, crowd=0):
    row = {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": 1.0, "iscrowd": crowd}
    return {**row, "segmentation": [[1, 2, 3, 4, 5, 6]]}


def coco(root, split="val2017", count=4):
    """COCO's own form: image k has k + 4 captions, a dog on its left half; image 2 a cat, a second dog and a crowd."""
    images = [{"id": k, "file_name": f"{k:012d}.jpg", "width": 40, "height": 20} for k in range(1, count + 1)]
    for row in images:
        picture(root / split / row["file_name"], colour=(60 * row["id"] % 256, 30, 30))
    captions = [
        {"id": 100 * k + n, "image_id": k, "caption": f"A  dog {n} of\n{k} ."}
        for n in range(8)
        for k in range(count, 0, -1)
        if n < k + 4
    ]
    boxes = [annotation(k, k, 18, [0, 0, 20, 20]) for k in range(1, count + 1)]
    boxes += [annotation(50, 2, 17, [30, 10, 10, 10]), annotation(51, 2, 18, [20, 0, 10.5, 5])]
    boxes.append(annotation(52, 2, 1, {"counts": []}, crowd=1))
    names = [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    write(root / f"annotations/captions_{split}.json", {"images": images, "annotations": captions})
    value = {"images": images, "annotations": boxes, "categories": names}
    write(root / f"annotations/instances_{split}.json", value)
    return root


def karpathy(root, rows):
    """`rows`: (cocoid, split, captions); pictures where 2014 has them."""
    images = []
    for number, (coco_id, split, texts) in enumerate(rows):
        folder = "train2014" if split in ("train", "restval") else "val2014"
        name = f"COCO_{folder}_{coco_id:012d}.jpg"
        picture(root / folder / name)
        sentences = [{"imgid": number, "sentid": n, "raw": text, "tokens": []} for n, text in enumerate(texts)]
        row = {"cocoid": coco_id, "filename": name, "filepath": folder, "split": split, "sentences": sentences}
        images.append({**row, "imgid": number, "sentids": list(range(len(texts)))})
    write(root / "dataset_coco.json", {"dataset": "coco", "images": images})
    return root


def imagecode(root, sets=2):
    """Sets set-0, set-1, ...: frames 7, 14, ..., 70; a caption of frames 2 and 9 of each."""
    value = {}
    for number in range(sets):
        for frame in range(1, 11):
            picture(root / f"data/image-sets/set-{number}/img{7 * frame}.jpg", colour=(20 * frame, 90 * number, 0))
        value[f"set-{number}"] = {"2": f"The third of {number}.", "9": f"The last of {number}."}
    write(root / "data/valid_data.json", value)
    return root


def captions(root, count=3):
    """Images 10, 11, ... with five captions each; ids once a caption for test, once an image for dev."""
    ids = [str(10 + k) for k in range(count)]
    texts = "\n".join(f"Caption {n} of {each}." for each in ids for n in range(5))
    for split, times in (("test", 5), ("dev", 1)):
        write(root / f"{split}_caps.txt", texts + "\n")
        write(root / f"{split}_ids.txt", "\n".join(each for each in ids for _ in range(times)) + "\n")
    write(root / "id_mapping.json", {each: f"val2014/{each}.jpg" for each in ids})
    for k, each in enumerate(ids):
        picture(root.parent / "coco-images/val2014" / f"{each}.jpg", colour=(40 * k, 90, 250 - 40 * k))
    rows = [{"text": f"A long text of {each}.", "metadata": {"length": 3}} for each in ids]
    write(root / "coco_test.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
    return root


def lines(root, split="train", rows=None):
    """One's own: three images, the first with boxes, the last without captions."""
    rows = rows or [
        {"image": "a/1.png", "captions": ["A dog.", "A red dog."], "boxes": [[10, 0, 30, 20], [0, 0, 40, 10]]},
        {"image": "a/2.png", "captions": "A cat."},
        {"image": "3.png", "captions": []},
    ]
    for row in rows:
        picture(root / "images" / row["image"])
    write(root / f"{split}.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
    return root
