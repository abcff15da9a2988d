"""Settings: what YAML and overrides may say, and that everything else is refused by name."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samer.config import (
    Config,
    DataConfig,
    InputError,
    MergeConfig,
    ModelConfig,
    ObjectsConfig,
    ReduceConfig,
    TrainConfig,
    dump_config,
    load_config,
)


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refuse(path, overrides=()):
    """The one-line message that a bad config is refused with."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_published_recipe():
    config = load_config(None)
    assert config == Config()
    assert config.merge == MergeConfig(64, 3, 0.1, 0.07, 1.0, "raster")
    assert config.objects == ObjectsConfig(0.005, 1.0, 4)
    train = config.train
    assert (train.learning_rate, train.weight_decay, train.warmup_ratio) == (2e-4, 1e-5, 0.1)
    assert (train.num_train_epochs, train.train_batch_size, train.grad_accum_steps) == (3.0, 32, 2)
    assert (train.bf16, train.max_grad_norm, train.temperature) == (True, 1.0, 0.07)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "merge:\ntrain: {}\n"])
def test_an_empty_file_or_section_means_the_defaults(write, text):
    assert load_config(write(text)) == Config()


@pytest.mark.parametrize(
    ("written", "value"),
    [("5e-5", 5e-5), ("1e-3", 1e-3), ("2.0e-4", 2e-4), ("'0.5'", 0.5), ("1", 1.0), (".5", 0.5), ("1E-6", 1e-6)],
)
def test_floats_as_people_write_them(write, written, value):
    """PyYAML reads `5e-5` as text (trap 1)."""
    config = load_config(write(f"train: {{learning_rate: {written}}}\n"))
    assert config.train.learning_rate == value
    assert type(config.train.learning_rate) is float
    assert load_config(None, [f"train.learning_rate={written}"]) == config


@pytest.mark.parametrize(("written", "value"), [("3", 3), ("3.0", 3), ("0x10", 16)])
def test_whole_numbers(write, written, value):
    number = load_config(write(f"merge: {{num_regions: {written}}}\n")).merge.num_regions
    assert number == value
    assert type(number) is int


@pytest.mark.parametrize(
    ("section", "key", "written", "rule"),
    [
        ("merge", "num_regions", "3.5", "a whole number"),
        ("merge", "num_regions", "true", "a whole number"),
        ("merge", "num_regions", "'64'", "a whole number"),
        ("merge", "cluster_iters", "[64]", "a whole number"),
        ("merge", "num_regions", ".inf", "a whole number"),
        ("merge", "num_regions", "-.inf", "a whole number"),
        ("merge", "num_regions", ".nan", "a whole number"),
        ("train", "seed", "9" * 400, "a whole number"),
        ("merge", "num_regions", "null", "a whole number"),
        ("train", "learning_rate", "9" * 400, "a number"),
        ("train", "learning_rate", "true", "a number"),
        ("train", "learning_rate", "fast", "a number"),
        ("train", "learning_rate", "{a: 1}", "a number"),
        ("train", "learning_rate", "null", "a number"),
        ("train", "bf16", "1", "true or false"),
        ("train", "bf16", "'true'", "true or false"),
        ("train", "bf16", "null", "true or false"),
        ("train", "run_name", "true", "text"),
        ("train", "run_name", "null", "text"),
        ("model", "name", "[a]", "text"),
        ("data", "limit_train_images", "1.5", "a whole number"),
        ("data", "limit_train_images", "true", "a whole number"),
    ],
)
def test_a_wrong_type_is_refused_by_name(write, section, key, written, rule):
    path = write(f"{section}: {{{key}: {written}}}\n")
    message = refuse(path)
    assert message.startswith(f"{path}: {section}.{key} must be {rule}; it is ")
    override = f"{section}.{key}={written}"
    if rule == "text":  # typed on a command line, anything is text
        assert vars(vars(load_config(None, [override]))[section])[key] == written
        return
    message = refuse(None, [override])
    assert override in message
    assert f"{section}.{key} must be {rule}; it is " in message


FLOATS = [
    (f.name, g.name)
    for f, cls in zip(
        dataclasses.fields(Config),
        (ModelConfig, DataConfig, MergeConfig, ObjectsConfig, TrainConfig, ReduceConfig),
        strict=True,
    )
    for g in dataclasses.fields(cls)
    if g.type == "float"
]


@pytest.mark.parametrize(("section", "key"), FLOATS, ids=".".join)
@pytest.mark.parametrize("written", [".nan", "nan", ".inf", "-inf", "-1"])
def test_no_float_may_be_nan_infinite_or_negative(write, section, key, written):
    path = write(f"{section}: {{{key}: {written}}}\n")
    message = refuse(path)
    assert message.startswith(f"{path}: {section}")
    assert key in message


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("merge: {num_regions: 0}", "merge.num_regions must be at least 1; it is 0"),
        ("merge: {center_init: Raster}", "merge.center_init must be 'raster' or 'farthest'; it is 'Raster'"),
        ("merge: {assignment_temperature: 0}", "merge.assignment_temperature must be a finite number > 0; it is 0.0"),
        ("objects: {min_area: 0.5, max_area: 0.4}", "objects must be 0 <= objects.min_area <= objects.max_area <= 1"),
        ("objects: {max_area: 1.5}", "objects must be 0 <= objects.min_area <= objects.max_area <= 1"),
        ("objects: {max_phrases: 0}", "objects.max_phrases must be at least 1; it is 0"),
        ("data: {limit_eval_images: 0}", "data.limit_eval_images must be at least 1, or null for all; it is 0"),
        ("train: {train_batch_size: 0}", "train.train_batch_size must be at least 1; it is 0"),
        ("train: {dataloader_num_workers: -1}", "train.dataloader_num_workers must be a finite number >= 0; it is -1"),
        ("train: {warmup_ratio: 1}", "train.warmup_ratio must be in [0, 1); it is 1.0"),
        ("train: {temperature: 0}", "train.temperature must be a finite number > 0; it is 0.0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(write, text, rule):
    path = write(text)
    assert refuse(path).startswith(f"{path}: {rule}")


def test_null_only_where_it_means_all(write):
    config = load_config(write("data: {limit_train_images: null, limit_eval_images: 7}\n"))
    assert config.data.limit_train_images is None
    assert config.data.limit_eval_images == 7
    assert load_config(None, ["data.limit_eval_images=null"]).data.limit_eval_images is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mrege: {num_regions: 3}", "unknown key mrege; did you mean merge?"),
        ("merge: {num_region: 3}", "unknown key merge.num_region; did you mean merge.num_regions?"),
        ("train: {lerning_rate: 1}", "unknown key train.lerning_rate; did you mean train.learning_rate?"),
        ("zzz: 1", "unknown key zzz; known keys: data, merge, model, objects, reduce, train"),
        ("objects: {zzz: 1}", "unknown key objects.zzz; known keys: max_area, max_phrases, min_area"),
        ("7: 1", "unknown key 7; known keys"),
        ("num_regions: 3", "unknown key num_regions; known keys"),  # a key without its section
    ],
)
def test_an_unknown_key_is_refused_with_a_hint(write, text, words):
    path = write(text)
    assert refuse(path).startswith(f"{path}: {words}")


@pytest.mark.parametrize(
    ("text", "what"),
    [("- merge\n", "the file"), ("just words\n", "the file"), ("0\n", "the file"), ("merge: 64\n", "merge")],
)
def test_what_is_no_mapping_is_refused(write, text, what):
    path = write(text)
    assert refuse(path).startswith(f"{path}: {what} must be a mapping of keys; it is ")


@pytest.mark.parametrize(
    "text",
    [
        "merge: [64",
        "merge: {num_regions: 3",
        "a: b: c",
        "\tmerge: 1",
        "merge: *nowhere",
        "[" * 5000,
        "merge: {? [a] : 1}",
        "train: {run_name: 2024-13-45}",  # these four PyYAML answers with exceptions that are not its own
        "merge: {num_regions: !!int x}",
        "train: {bf16: !!bool x}",
        "train: {run_name: !!timestamp x}",
    ],
)
def test_what_is_no_yaml_is_refused(write, text):
    path = write(text)
    assert refuse(path).startswith(f"{path}: not a readable YAML file")


def test_unreadable_files_are_refused(tmp_path):
    absent = tmp_path / "absent.yaml"
    assert refuse(absent).startswith(f"{absent}: no such file; name a YAML config")
    assert refuse(tmp_path).startswith(f"{tmp_path}: not a readable YAML file")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00merge")
    assert refuse(binary).startswith(f"{binary}: not a readable YAML file")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/new:os.system ['touch {canary}']",
        "!!python/name:os.system ''",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
    ],
)
def test_yaml_tags_build_nothing(write, tmp_path, tag):
    canary = tmp_path / "canary"
    text = tag.format(canary=canary)
    for where in (f"model: {{name: {text}}}\n", f"{text}\n", f"merge: {text}\n"):
        path = write(where)
        assert refuse(path).startswith(f"{path}: not a readable YAML file")
    assert load_config(None, [f"model.name={text}"]).model.name == text
    assert "not valid YAML" in refuse(None, [f"train.seed={text}"])
    assert not canary.exists()


def test_overrides(write):
    path = write("merge: {num_regions: 32, spatial_weight: 0.2}\ntrain:\n")
    config = load_config(
        path,
        [
            "merge.num_regions=16",
            "train.learning_rate=5e-5",
            "train.bf16=false",
            "train.run_name=a=b",
            "data.root=",
            "model.name=vidore/colpali",
            "merge.num_regions=8",  # the last one wins
        ],
    )
    assert config.merge == MergeConfig(num_regions=8, spatial_weight=0.2)
    assert config.train == TrainConfig(learning_rate=5e-5, bf16=False, run_name="a=b")
    assert config.data.root == ""
    assert config.model.name == "vidore/colpali"
    assert load_config(path).merge.num_regions == 32  # nothing sticks


@pytest.mark.parametrize(
    "override", ["", "=", "merge", "merge.num_regions", "num_regions=3", ".num_regions=3", "merge.=3", "--merge 3"]
)
def test_a_badly_formed_override_is_refused(override):
    message = refuse(None, [override])
    assert message.startswith(f"override {override!r} is not of the form section.key=value")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("merge.num_region=3", "unknown key merge.num_region; did you mean merge.num_regions?"),
        ("mrege.num_regions=3", "unknown key mrege; did you mean merge?"),
        ("merge.num_regions.x=3", "unknown key merge.num_regions.x"),
        ("merge.num_regions=0", "merge.num_regions must be at least 1; it is 0"),
        ("merge.num_regions=[3", "not valid YAML"),
        ("train.seed=2024-13-45", "not valid YAML"),
        ("train.seed=a: b", "train.seed must be a whole number"),
    ],
)
def test_a_bad_override_is_refused_by_name(write, override, words):
    message = refuse(write("merge: {num_regions: 32}\n"), ["train.seed=1", override])
    assert override in message
    assert words in message


def test_ranges_are_checked_once_file_and_overrides_are_together(write):
    path = write("objects: {min_area: 0.001}\n")
    assert load_config(path, ["objects.max_area=0.004"]).objects == ObjectsConfig(0.001, 0.004)
    both = ["objects.max_area=0.004", "objects.min_area=0.002"]
    assert load_config(None, both).objects == ObjectsConfig(0.002, 0.004)
    assert "objects.max_area=0.004" in refuse(None, both[:1])


def test_a_bad_file_is_refused_whatever_the_overrides(write):
    path = write("merge: {num_regions: 0}\n")
    assert refuse(path, ["merge.num_regions=3"]).startswith(f"{path}: merge.num_regions must be at least 1")


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().merge.num_regions = 3


words = st.text(max_size=12) | st.sampled_from(["5e-5", "null", "true", "1", "- a", "a: b", "#", "~", "0x10", "'"])
positive = st.floats(1e-12, 1e12)
configs = st.builds(
    Config,
    model=st.builds(ModelConfig, name=words, local_files_only=st.booleans()),
    data=st.builds(DataConfig, root=words, limit_train_images=st.none() | st.integers(1, 2**62)),
    merge=st.builds(
        MergeConfig,
        num_regions=st.integers(1, 10**9),
        spatial_weight=st.floats(0, 1e300),
        assignment_temperature=positive,
        center_init=st.sampled_from(["raster", "farthest"]),
    ),
    train=st.builds(
        TrainConfig, learning_rate=positive, run_name=words, bf16=st.booleans(), seed=st.integers(0, 9**19)
    ),
)


@given(config=configs)
def test_dumped_configs_load_equal(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_dumped_config_is_plain_yaml():
    text = dump_config(Config())
    assert not re.search(r"!!|!python", text)
    assert text.startswith("model:\n  name: vidore/colpali-v1.3-hf\n")


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("train:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(InputError, match=r"twice\.yaml.*'seed' stands twice"):
        load_config(path)


def test_a_key_given_twice_is_refused_wherever_it_stands(write):
    for text in ("merge: {num_regions: 3}\nmerge: {}\n", "merge: {num_regions: 3, 'num_regions': 3}\n"):
        assert "stands twice" in refuse(write(text))


def test_aliases_are_plain_yaml(write):
    path = write("merge: {num_regions: &k 16, cluster_iters: *k}\ntrain: &t {seed: *k}\n")
    config = load_config(path)
    assert (config.merge.num_regions, config.merge.cluster_iters, config.train.seed) == (16, 16, 16)


@pytest.mark.parametrize("key", ["merge: {num_regions: *j}", "merge: *j", "train: {run_name: *j}", "train: {seed: *j}"])
def test_a_message_stays_short_whatever_the_value_holds(write, key):
    """Nested aliases: ten of ten of ten ..., a million million values in half a kilobyte of YAML."""
    nested = [f"&{name} [{', '.join([f'*{inner}'] * 10)}]" for inner, name in zip("abcdefghijk", "bcdefghijkl")]
    inside = f"[&a [x, x], {', '.join(nested)}]"
    section, _, rest = key.partition(": ")
    message = refuse(write(f"{section}: {rest.replace('*j', inside)}\n"))
    assert section in message
    assert len(message) < 600
    long = refuse(write(f"{section}: {rest.replace('*j', '[' + 'y' * 100_000 + ']')}\n"))
    assert len(long) < 600


@pytest.mark.parametrize("number", ["9" * 3000, "0x" + "f" * 9000, "9" * 9000])
def test_a_number_of_thousands_of_digits_is_refused_in_a_line(write, number):
    for text in (f"merge: {{num_regions: {number}}}", f"{number}: 1", f"train: {{learning_rate: {number}}}"):
        assert len(refuse(write(text))) < 500
    if len(number) > 3000:  # as text it can be had as long as Python writes it
        assert len(refuse(write(f"train: {{run_name: {number}}}"))) < 500


@pytest.mark.parametrize("text", ["/data/a: b", "[x]", "2024", "yes", "~/flickr", "#1"])
def test_text_overrides_stay_as_typed(text):
    assert load_config(None, [f"data.root={text}"]).data.root == text


def test_a_list_of_budgets_trains_them_together(write):
    config = load_config(write("merge: {num_regions: [16, 64, 32]}\n"))
    assert (config.merge.num_regions, config.train.budgets) == (64, (16, 64, 32))
    assert load_config(write(dump_config(config))) == config
    assert load_config(None, ["merge.num_regions=[4, 8]"]).train.budgets == (4, 8)
    assert load_config(None, ["merge.num_regions=8"]).train.budgets == ()


@pytest.mark.parametrize("text", ["[]", "[a]", "[1.5]", "[true]", "[[64]]", "[0]"])
def test_bad_budgets_are_refused(text):
    assert "merge.num_regions" in refuse(None, [f"merge.num_regions={text}"])


def test_a_single_budget_replaces_a_list(write):
    path = write("merge: {num_regions: [16, 32]}\n")
    assert load_config(path, ["merge.num_regions=64"]).train.budgets == ()
    written = write(dump_config(load_config(path)))
    assert load_config(written, ["merge.num_regions=8"]) == load_config(None, ["merge.num_regions=8"])
    assert "train.budgets" in refuse(None, ["train.budgets=[16, 32]"])
    assert "train must be a mapping" in refuse(write("merge: {num_regions: [16, 32]}\ntrain: 3\n"))
