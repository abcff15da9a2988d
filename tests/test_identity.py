"""What a model is, whatever it is called: fingerprints, the hub's cache, and who refuses whom."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from samer.config import InputError, MergeConfig
from samer.features.read import FeatureStore, open_encoder
from samer.features.write import write_features
from samer.index.read import Index
from samer.index.settings import adapter_config
from samer.index.write import build_index
from samer.retrievers import identity
from samer.retrievers.base import Encoder, Projector
from samer.retrievers.colpali import ColPali
from samer.retrievers.hf import Retriever, identify
from samer.retrievers.identity import ModelIdentity, content_hash, fingerprint
from samer.retrievers.projectors import load_projector, save_projector
from samer.search.models import Models

MERGE = MergeConfig(num_regions=16)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub cache made by hand: `add(id, folder, revision)` puts a folder's files there as the hub's client would."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def add(name, folder, revision="main", large=1000):
        place = cache / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
        for part in ("blobs", "refs", f"snapshots/{commit}"):
            (place / part).mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        for file in folder.iterdir():
            data = file.read_bytes()
            small = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            blob = sha256(data) if file.suffix in (".safetensors", ".pt") or len(data) > large else small
            (place / "blobs" / blob).write_bytes(data)
            link = place / "snapshots" / commit / file.name
            if not link.is_symlink():
                link.symlink_to(f"../../blobs/{blob}")
        return place / "snapshots" / commit

    return add


@pytest.fixture
def noisy(base, tmp_path):
    """The base with a language model of noise: another backbone, the same untouched projection."""
    folder = shutil.copytree(base, tmp_path / "noisy")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "language_model" in name and tensor.ndim == 2:
            tensors[name] = (torch.randn(tensor.shape, generator=generator) * tensor.float().std()).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_projector(retriever):
    weight, bias = retriever.base_projector.weight, retriever.base_projector.bias
    return Projector(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), bias + 1)


# --- hashes ---------------------------------------------------------------------------------------------------------


def test_a_difference_is_known_only_where_both_are():
    one = ModelIdentity("A", "w", "p", "b")
    assert one.difference(one) is None
    assert one.difference(ModelIdentity()) is None
    assert ModelIdentity("", "w", "", "").difference(ModelIdentity("B", "", "q", "c")) is None
    assert one.difference(ModelIdentity("A", "v", "q", "b")) == "weights"
    assert one.difference(ModelIdentity("", "", "q", "c")) == "processor"
    assert one.difference(ModelIdentity("B", "w", "p", "b")) == "architecture"
    assert one.difference(ModelIdentity("A", "w", "p", "c")) == "base_projector"


def test_a_fingerprint_is_that_of_the_files(base):
    found = fingerprint(base)
    for names, value in (
        (["config.json", "model.safetensors"], found.weights),
        (["processor_config.json", "tokenizer.json", "tokenizer_config.json"], found.processor),
    ):
        lines = "".join(f"{name}\n{sha256((base / name).read_bytes())}\n" for name in names)
        assert value == sha256(lines.encode())


def test_weights_that_are_not_all_there_are_unknown(base, world, tmp_path, capsys):
    """As a hub cache is after an interrupted download: nothing can be said of the model, so nothing is refused."""
    half = shutil.copytree(base, tmp_path / "half")
    (half / "model.safetensors").unlink()
    assert (fingerprint(half).weights, identify(str(half)).weights) == ("", "")
    write_features(tmp_path / "store", world, ["val"], Retriever.load(str(base)), dtype="int8")
    FeatureStore(tmp_path / "store", str(half))


def test_the_hubs_large_blobs_are_not_read_and_its_small_ones_are(base, hub, monkeypatch):
    snapshot = hub("owner/model", base)
    read = []
    file_hash = identity.file_hash
    monkeypatch.setattr(identity, "file_hash", lambda file: read.append(file.name) or file_hash(file))
    monkeypatch.setattr(identity, "_known", {})
    assert fingerprint(snapshot) == fingerprint(base)
    links = {os.path.basename(os.readlink(snapshot / file.name)): file.name for file in base.iterdir()}
    from_hub = sorted(links[name] for name in read if name in links)
    assert "model.safetensors" not in from_hub
    assert "tokenizer.json" not in from_hub
    assert "tokenizer_config.json" in from_hub  # 40 digits are git's SHA-1, which also counts a header
    assert all(len(os.readlink(snapshot / name)) == len("../../blobs/") + 40 for name in from_hub)


def test_a_folders_files_are_read_once_and_again_when_they_change(base, tmp_path, monkeypatch):
    folder = shutil.copytree(base, tmp_path / "base")
    read = []
    file_hash = identity.file_hash
    monkeypatch.setattr(identity, "file_hash", lambda file: read.append(file.name) or file_hash(file))
    first = fingerprint(folder)
    assert "model.safetensors" in read
    read.clear()
    assert fingerprint(folder) == first
    assert read == []
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1  # of the same size
    (folder / "model.safetensors").write_bytes(data)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    second = fingerprint(folder)
    assert read == ["model.safetensors"]
    assert (second.processor, second.weights != first.weights) == (first.processor, True)


def test_a_link_elsewhere_is_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "short").write_bytes(b"one")
    (tmp_path / ("0" * 64)).write_bytes(b"two")
    for target, data in (("blobs/short", b"one"), ("0" * 64, b"two")):
        link = tmp_path / f"to {data}"
        link.symlink_to(tmp_path / target)
        assert content_hash(link) == sha256(data)


# --- the identity of a retriever ------------------------------------------------------------------------------------


def test_an_identity_does_not_depend_on_the_name(base, hub):
    local = Retriever.load(str(base)).identity
    hub("owner/model", base)
    assert Retriever.load("owner/model").identity == local
    assert local.architecture == "ColPaliForRetrieval"
    assert local.base_projector == Retriever.load(str(base)).base_projector.hash
    assert identify("owner/model") == ModelIdentity(local.architecture, local.weights, local.processor)
    assert identify("owner/other") is None
    found = Encoder("drawn", Projector(torch.eye(3), None), grid=(1, 1)).identity
    assert found == ModelIdentity("Encoder", "", "", Projector(torch.eye(3), None).hash)


def test_a_revision_is_loaded_and_identified(base, noisy, hub):
    hub("owner/model", base)
    hub("owner/model", noisy, "next")
    main, following = Retriever.load("owner/model"), open_encoder("owner/model", "cpu", revision="next")
    assert (main.revision, following.revision) == ("main", "next")
    assert main.identity.difference(following.identity) == "weights"
    assert following.identity == Retriever.load(str(noisy)).identity
    query = main.query_inputs(["a dog"])
    assert not torch.allclose(main.hidden_states(query), following.hidden_states(query), atol=1e-2)
    with pytest.raises(InputError, match="'owner/model' can't be loaded"):
        Retriever.load("owner/model", revision="none")


def test_the_picture_backend_is_part_of_it(base, monkeypatch):
    before = Retriever.load(str(base)).identity
    monkeypatch.setattr(ColPali, "settings", {"backend": "torchvision"})
    assert identify(str(base)).difference(before) == "processor"


# --- who refuses whom -----------------------------------------------------------------------------------------------


def test_a_projector_of_another_backbone_is_refused(base, noisy, tmp_path):
    """The untouched projection is the same; nothing but the backbone's hash tells."""
    retriever, other = Retriever.load(str(base)), Retriever.load(str(noisy))
    assert retriever.base_projector.hash == other.base_projector.hash
    save_projector(tmp_path / "saved", random_projector(retriever), retriever, MERGE)
    words = rf"trained on '{base}', not on '{noisy}' \(weights differs\)"
    with pytest.raises(InputError, match=words):
        load_projector(tmp_path / "saved", other)
    copy = shutil.copytree(base, tmp_path / "copy")
    load_projector(tmp_path / "saved", Retriever.load(str(copy)))  # the same files, elsewhere
    about = json.loads((tmp_path / "saved/config.json").read_text())
    assert ModelIdentity(**about["model"]) == retriever.identity
    assert about["revision"] == "main"


def test_a_projector_from_before_identities_loads(base, noisy, tmp_path):
    retriever = Retriever.load(str(base))
    projector = random_projector(retriever)
    save_projector(tmp_path, projector, retriever, MERGE)
    about = json.loads((tmp_path / "config.json").read_text())
    for key in ("model", "revision"):
        del about[key]
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert load_projector(tmp_path, Retriever.load(str(noisy))).hash == projector.hash
    for strange in ([], "x", {"weights": 3}):
        (tmp_path / "config.json").write_text(json.dumps({**about, "model": strange}))
        with pytest.raises(InputError, match=r"config\.json: model or base_projector is no identity"):
            load_projector(tmp_path, retriever)


def test_a_store_knows_its_model(base, noisy, world, tmp_path, monkeypatch):
    retriever = Retriever.load(str(base))
    write_features(tmp_path / "store", world, ["val"], retriever, dtype="int8")
    stored = FeatureStore(tmp_path / "store", str(base))
    assert stored.identity == retriever.identity
    save_projector(tmp_path / "saved", random_projector(retriever), stored, MERGE)
    load_projector(tmp_path / "saved", retriever)
    with pytest.raises(InputError, match="weights differs"):
        load_projector(tmp_path / "saved", Retriever.load(str(noisy)))
    with pytest.raises(InputError, match="stale, its weights"):
        FeatureStore(tmp_path / "store", str(noisy))
    monkeypatch.setattr(ColPali, "settings", {"backend": "torchvision"})
    with pytest.raises(InputError, match="stale, its processor"):
        FeatureStore(tmp_path / "store", str(base))


def test_an_index_is_not_opened_with_another_backbone(base, noisy, world, tmp_path):
    """The untouched projection is the same, so its hash tells nothing."""
    retriever, other = Retriever.load(str(base)), Retriever.load(str(noisy))
    assert retriever.base_projector.hash == other.base_projector.hash
    build_index(tmp_path / "index", world, ["val"], retriever, MERGE, dtype="float16")
    index = Index(tmp_path / "index")
    index.check_model(retriever)
    index.check_model(Retriever.load(str(shutil.copytree(base, tmp_path / "elsewhere"))))  # the same files
    with pytest.raises(InputError, match="weights"):
        index.check_model(other)
    with pytest.raises(InputError, match="weights"):
        build_index(tmp_path / "index", world, ["test"], other, MERGE, dtype="float16")
    with pytest.raises(InputError, match="weights"):
        Models("cpu", str(noisy)).load(index)


@pytest.mark.parametrize(
    ("recorded", "name", "came_from", "refused"),
    [
        ("vidore/colpali-v1.3-hf", "vidore/colpali-v1.3-hf", None, False),
        ("vidore/colpali-v1.3", "Vidore/ColPali-v1.3-hf", None, False),
        ("vidore/colpali-v1.2", "vidore/colpali-v1.3-hf", None, True),
        ("vidore/colpali-v1.2", "models/colpali", None, False),  # neither name can be compared
        ("/somewhere/colpali", "vidore/colpali-v1.3-hf", None, False),
        ("vidore/colpali-v1.2", "models/colpali", "vidore/colpali-v1.3-hf", True),
        ("vidore/colpali-v1.3", "models/colpali", "vidore/colpali-v1.3-hf", False),
        ("vidore/colpali-v1.2", "models/colpali", "/somewhere/colpali", False),
        (None, "vidore/colpali-v1.3-hf", None, False),
    ],
)
def test_a_legacy_projectors_base_is_compared_with_the_model(tmp_path, monkeypatch, recorded, name, came_from, refused):
    monkeypatch.chdir(tmp_path)
    if name.startswith("models"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"_name_or_path": came_from} if came_from else {}))
    encoder = Encoder(name, Projector(torch.eye(3), torch.zeros(3)), grid=(1, 1))
    content = {"projector_state_dict": {"weight": torch.eye(3) * 2, "bias": torch.ones(3)}}
    torch.save({**content, **({"base_model_name_or_path": recorded} if recorded else {})}, "projector.pt")
    if refused:
        with pytest.raises(InputError, match=rf"projector\.pt: .*trained on '{recorded}', not on '{name}'"):
            load_projector("projector.pt", encoder)
    else:
        assert load_projector("projector.pt", encoder).weight[0, 0] == 2


# --- projectors of the hub ------------------------------------------------------------------------------------------


@pytest.fixture
def released(base, hub, tmp_path):
    """Two projectors on the hub: ours and a legacy one."""
    retriever = Retriever.load(str(base))
    projector = random_projector(retriever)
    save_projector(tmp_path / "ours", projector, retriever, MergeConfig(num_regions=7))
    hub("owner/samer-k7", tmp_path / "ours")
    (tmp_path / "legacy").mkdir()
    state = {"weight": projector.weight, "bias": projector.bias}
    content = {"format": "samer_projector_v1", "base_model_name_or_path": str(base), "projector_state_dict": state}
    torch.save(content, tmp_path / "legacy/projector.pt")
    hub("owner/samer_old", tmp_path / "legacy")
    return SimpleNamespace(retriever=retriever, projector=projector)


@pytest.mark.parametrize("name", ["owner/samer-k7", "owner/samer_old"])
@pytest.mark.parametrize("local", [False, True])
def test_a_projector_may_be_named_by_its_hub_id(released, base, name, local):
    assert load_projector(name, released.retriever, local_files_only=local).hash == released.projector.hash
    encoder = open_encoder(str(base), "cpu", adapter_path=name, local_files_only=local)
    assert encoder.current_projector().hash == released.projector.hash


def test_settings_come_from_a_projector_of_the_hub(released, base, tmp_path):
    config = adapter_config("owner/samer-k7", None, ["merge.cluster_iters=5"])
    assert (config.model.name, config.model.revision) == (str(base), "main")
    assert (config.merge.num_regions, config.merge.cluster_iters) == (7, 5)
    assert adapter_config("owner/samer_old", None, []).merge == MergeConfig()
    (tmp_path / "config.yaml").write_text("merge: {num_regions: 9}\n")
    assert adapter_config("owner/samer-k7", str(tmp_path / "config.yaml"), []).merge.num_regions == 9
    assert adapter_config("", None, ["merge.num_regions=3"]).merge.num_regions == 3


def test_a_projectors_file_brings_the_settings_beside_it(base, tmp_path):
    retriever = Retriever.load(str(base))
    save_projector(tmp_path / "run", random_projector(retriever), retriever, MergeConfig(num_regions=7))
    ours = adapter_config(str(tmp_path / "run" / "projector.safetensors"), None, [])
    assert ours == adapter_config(str(tmp_path / "run"), None, [])
    assert (ours.merge.num_regions, ours.model.name) == (7, str(base))


def test_a_projectors_revision_is_the_models(base, noisy, hub, tmp_path):
    hub("owner/model", base)
    hub("owner/model", noisy, "next")
    retriever = Retriever.load("owner/model", revision="next")
    save_projector(tmp_path / "saved", random_projector(retriever), retriever, MERGE)
    config = adapter_config(str(tmp_path / "saved"), None, [])
    assert (config.model.name, config.model.revision) == ("owner/model", "next")
    with pytest.raises(InputError, match="weights differs"):
        load_projector(tmp_path / "saved", Retriever.load("owner/model"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", "nobody/nothing: no such projector here, and not to be had from the hub"),
        ("checkpoints/run/three", "checkpoints/run/three: no such projector; name the folder"),
        ("no", "no: no such projector; name the folder that scripts/train.py wrote"),
        ("../elsewhere", r"\.\./elsewhere: no such projector; name"),
    ],
)
def test_a_projector_that_is_nowhere_is_refused_by_name(hub, name, words):
    encoder = Encoder("drawn", Projector(torch.eye(3), None), grid=(1, 1))
    for look in (lambda: adapter_config(name, None, []), lambda: load_projector(name, encoder)):
        with pytest.raises(InputError, match=words):
            look()


def test_a_repository_without_a_projector_is_refused(released, base, hub, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    hub("owner/empty", tmp_path / "empty")
    with pytest.raises(InputError, match=r"no projector\.safetensors, projector\.pt or adapter_config\.json here"):
        load_projector("owner/empty", released.retriever)
