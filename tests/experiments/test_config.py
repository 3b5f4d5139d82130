"""Configs: strict, and refused with the field, the value and the nearest valid name."""

import dataclasses
import inspect
import math

import pytest

from bagua_jax.experiments.spec import catalog, config
from bagua_jax.experiments.spec.config import (
    AlgorithmConfig,
    ConfigError,
    ExperimentConfig,
    OptimizerConfig,
)

BASE = ExperimentConfig(
    experiment="e", task="quadratic", algorithms=(AlgorithmConfig("bytegrad"),)
)


SHIPPED = [name for name in config.shipped() if "/" not in name]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_resolve_and_say_what_they_show(name):
    path = config.shipped()[name]
    comments = path.read_text().splitlines()[:4]
    for line, word in zip(
        comments, ("Claim", "Expected", "Cost", "Command"), strict=True
    ):
        assert line.startswith(f"# {word}: ")
    assert comments[3].endswith(f"bagua-jax run {name}")
    runs = catalog.resolve(config.load(name))
    assert len(runs) == len(config.load(path).algorithms)


def test_demo_compares_the_six_algorithms_on_eight_workers():
    demo = config.load("demo")
    assert demo.workers == 8
    assert [a.name for a in demo.algorithms] == [
        "gradient_allreduce",
        "bytegrad",
        "qadam",
        "decentralized",
        "low_precision_decentralized",
        "async_model_average",
    ]


# What is wrong, and the words that must be in the message.
BAD_FIELDS = [
    ("stepz: 3", ["stepz", "= 3", "did you mean 'steps'"]),
    ("optimizer: {learning_rat: 1}", ["optimizer.learning_rat", "'learning_rate'"]),
    ("optimizer: {name: sdg}", ["optimizer.name", "'sdg'", "'sgd'"]),
    ("optimizer: {name: adam, momentum: 0.9}", ["optimizer.momentum", "0.9", "sgd"]),
    ("optimizer: {learning_rate: -1}", ["optimizer.learning_rate", "-1", "positive"]),
    ("optimizer: {learning_rate: .nan}", ["optimizer.learning_rate", "nan", "finite"]),
    ("optimizer: 3", ["optimizer", "mapping", "3"]),
    ("where: simulat", ["where", "'simulat'", "'simulate'", "devices"]),
    ("sharding: labels", ["sharding", "'labels'", "'label'"]),
    ("steps: 0", ["steps", "from 1 to 2,147,483,647", "got 0"]),
    ("steps: 2147483648", ["steps", "2,147,483,647", "got 2147483648"]),
    ("steps: ten", ["steps", "whole number", "'ten'"]),
    ("steps: 1.5", ["steps", "whole number", "1.5"]),
    ("steps: true", ["steps", "whole number", "True"]),
    ("steps: null", ["steps", "None"]),
    ("workers: -2", ["workers", "from 1 to", "-2"]),
    ("workers: 9223372036854775808", ["workers", "64 bits", "9223372036854775808"]),
    ("workers: 9223372036854775807", ["workers", "from 1 to", "9223372036854775807"]),
    ("batch_size: 99999999999", ["batch_size", "from 1 to", "99999999999"]),
    ("eval_every: 0", ["eval_every", "from 1 to"]),
    ("checkpoint_every: -1", ["checkpoint_every", "from 1 to"]),
    ("check_replicas_every: 0", ["check_replicas_every", "from 1 to"]),
    ("keep_checkpoints: 0", ["keep_checkpoints", "from 1 to"]),
    ("seed: -1", ["seed", "-1"]),
    ("optimizer: {momentum: .nan}", ["optimizer.momentum", "finite", "nan"]),
    ("optimizer: {momentum: 1.5}", ["optimizer.momentum", "from 0 to 1", "1.5"]),
    ("optimizer: {name: adam, b2: 1}", ["optimizer.b2", "from 0 to 0.99", "1.0"]),
    ("optimizer: {name: adam, eps: -1}", ["optimizer.eps", "from 0", "-1.0"]),
    ("optimizer: {name: adamw, weight_decay: .inf}", ["weight_decay", "finite"]),
    ("optimizer: {learning_rate: 1" + "0" * 400 + "}", ["learning_rate", "finite"]),
    ("optimizer: {learning_rate: 1e39}", ["learning_rate", "positive", "1e+39"]),
    ('output: "a\\tb\\0"', ["not valid YAML", "x00"]),
    ('output: ""', ["output", "path"]),
    ("experiment: " + "e" * 101, ["experiment", "at most 100 bytes", "101"]),
    ("experiment: a/b", ["experiment", "'a/b'", "folder"]),
    ("experiment: ..", ["experiment", "'..'"]),
    ("algorithms: bytegrad, qadam, 3", ["algorithms[2]", "3"]),
    ("algorithms: []", ["algorithms", "at least one", "list algorithms"]),
    ("algorithms: {name: bytegrad}", ["algorithms", "list"]),
    ("algorithms: [{label: a}]", ["algorithms[0].name", "required"]),
    ("algorithms: [{name: qadam, label: a b}]", ["label", "'a b'"]),
    ("algorithms: [bytegrad, bytegrad]", ["2 entries", "'bytegrad'", "label"]),
    ("steps: 3\nsteps: 4", ["'steps'", "twice"]),
    ("steps: [", ["not valid YAML", "line"]),
]


@pytest.mark.parametrize(("text", "words"), BAD_FIELDS, ids=[b[0] for b in BAD_FIELDS])
def test_bad_fields_are_named(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    given = text.partition(":")[0]
    rest = {"experiment": "e", "task": "quadratic", "algorithms": "[bytegrad]"}
    rest.pop(given, None)
    path.write_text("".join(f"{k}: {v}\n" for k, v in rest.items()) + text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("field", ["experiment", "task", "algorithms"])
def test_required_fields_are_named(tmp_path, field):
    path = tmp_path / "bad.yaml"
    lines = {"experiment": "e", "task": "quadratic", "algorithms": "[bytegrad]"}
    del lines[field]
    path.write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    with pytest.raises(ConfigError, match=f"{field}: is required and missing"):
        config.load(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "mapping"), (b"- 1", "mapping"), (b"\xff\xfe\x00", "cannot be read")],
)
def test_files_that_are_no_configs(tmp_path, content, word):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=word):
        config.load(path)


def test_a_folder_is_no_config_and_unknown_names_have_neighbours(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)
    with pytest.raises(ConfigError, match="'dmo'; did you mean 'demo'"):
        config.load("dmo")


# An algorithm's entry, and the words that must be in the message.
BAD_ALGORITHMS = [
    ({"name": "bytgrad"}, ["'bytgrad'", "'bytegrad'"]),
    ({"name": "bytegrad", "bucket_byte": 3}, ["bucket_byte", "3", "'bucket_bytes'"]),
    ({"name": "bytegrad", 1: 2}, ["algorithms.bytegrad.1", "= 2", "bucket_bytes"]),
    ({"name": "bytegrad", "axis_name": "x"}, ["axis_name", "'x'", "bucket_bytes"]),
    ({"name": "bytegrad", "bucket_bytes": 0}, ["bytegrad", "bucket_bytes", "0"]),
    ({"name": "bytegrad", "bucket_bytes": 2**63}, ["bucket_bytes", "64 bits"]),
    ({"name": "qadam", "learning_rate": math.nan}, ["qadam.learning_rate", "finite"]),
    ({"name": "qadam", "learning_rate": 0.1, "eps": math.inf}, ["eps", "finite"]),
    (
        {"name": "async_model_average", "local_steps": 2**40},
        ["async_model_average", "int"],
    ),
    ({"name": "delayed_gradients", "staleness": ["a"]}, ["delayed_gradients", "a"]),
    ({"name": "bytegrad", "bucket_bytes": "9"}, ["bucket_bytes", "whole number"]),
    ({"name": "bytegrad", "error_feedback": "workr"}, ["'workr'", "'worker'"]),
    ({"name": "qadam"}, ["algorithms.qadam.learning_rate", "missing"]),
    ({"name": "qadam", "learning_rate": "fast"}, ["learning_rate", "'fast'"]),
    (
        {"name": "qadam", "learning_rate": 0.1, "warmup_steps": 1},
        ["qadam", "warmup_steps", "1"],
    ),
    (
        {"name": "qadam", "learning_rate": 0.1, "optimizer": {"name": "sgd"}},
        ["algorithms.qadam.optimizer", "itself"],
    ),
    (
        {"name": "qadam", "learning_rate": 0.1, "compressor": "minmax"},
        ["compressor", "'minmax'", "'minmax_uint8'"],
    ),
    (
        {"name": "qadam", "learning_rate": 0.1, "compressor": {"name": "cast"}},
        ["compressor", "dtype"],
    ),
    (
        {
            "name": "qadam",
            "learning_rate": 0.1,
            "compressor": {"name": "cast", "dtype": "int8"},
        },
        ["compressor", "cast", "int8"],
    ),
    (
        {
            "name": "qadam",
            "learning_rate": 0.1,
            "compressor": {"name": "cast", "type": "int8"},
        },
        ["compressor.type", "dtype"],
    ),
    ({"name": "qadam", "learning_rate": 0.1, "compressor": 3}, ["compressor", "3"]),
    ({"name": "ef21"}, ["ef21.compressor", "missing"]),
    ({"name": "ef21", "compressor": "topk(2)"}, ["compressor", "topk", "ratio", "2"]),
    ({"name": "ef21", "compressor": "topk(a)"}, ["compressor.ratio", "'a'"]),
    ({"name": "ef21", "compressor": "topk(1, 2)"}, ["topk takes 1 parameter", "1, 2"]),
    ({"name": "ef21", "compressor": "topk(rato=0.1)"}, ["rato = 0.1", "'ratio'"]),
    ({"name": "ef21", "compressor": "topk("}, ["compressor", "'topk('"]),
    ({"name": "ef21", "compressor": {"name": "topk", 0: 0.1}}, ["names", "0: 0.1"]),
    ({"name": "ef21", "compressor": "topk(.nan)"}, ["compressor.ratio", "finite"]),
    (
        {"name": "ef21", "compressor": "hadamard(sgn)"},
        ["compressor.inner", "'sgn'", "'sign'"],
    ),
    ({"name": "decentralized", "topology": "ring(2)"}, ["topology", "self_weight"]),
    (
        {"name": "decentralized", "topology": {"name": "torus", "shap": [2, 4]}},
        ["topology.shap", "'shape'"],
    ),
    ({"name": "decentralized", "topology": "rng"}, ["topology", "'rng'", "'ring'"]),
    (
        {"name": "low_precision_decentralized", "topology": "shift_one"},
        ["low_precision_decentralized", "shift_one"],
    ),
    ({"name": "async_model_average"}, ["local_steps", "missing"]),
    (
        {"name": "async_model_average", "local_steps": 2, "staleness": 3},
        ["async_model_average", "staleness", "3"],
    ),
    ({"name": "bytegrad", "optimizer": {"name": "sgdd"}}, ["optimizer.name", "'sgd'"]),
]


@pytest.mark.parametrize(
    ("entry", "words"), BAD_ALGORITHMS, ids=[str(b[0]) for b in BAD_ALGORITHMS]
)
def test_bad_algorithms_are_named(entry, words):
    with pytest.raises(ConfigError) as caught:
        algorithms = config.parse_algorithms([entry])
        resolved = catalog.resolve(dataclasses.replace(BASE, algorithms=algorithms))
        assert resolved == ()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", catalog.compressors.REGISTRY)
def test_compressors_are_read_as_they_are_called(name):
    text = "cast(bfloat16)" if name == "cast" else name
    facts = catalog.compressor(text).facts
    assert catalog.compressor(facts.name).facts.name == facts.name


def test_the_ways_to_write_a_compressor_or_a_topology():
    ways = ["topk(0.5)", "topk(ratio=0.5)", {"name": "topk", "ratio": 0.5}]
    assert {catalog.compressor(way).facts.name for way in ways} == {"topk(0.5)"}
    nested = {"name": "hadamard", "inner": {"name": "topk", "ratio": 0.5}}
    written = "hadamard(topk(0.5))"
    names = {catalog.compressor(way).facts.name for way in (nested, written)}
    assert len(names) == 1
    torus = {"name": "torus", "shape": [2, 4]}
    matrices = [
        catalog.topology(way, 8).mixing_matrix(0) for way in (torus, "torus([2, 4])")
    ]
    assert (matrices[0] == matrices[1]).all()


UNBIASED = ("diana", "ecd_psgd", "marina")  # algorithms that refuse other compressors


@pytest.mark.parametrize("name", catalog.ALGORITHMS)
def test_every_algorithm_can_be_configured(tmp_path, name):
    needed = {
        "compressor": "natural" if name in UNBIASED else "topk(0.6)",
        "consensus_step_size": 0.1,
        "fragments": 1,
        "learning_rate": 0.1,
        "local_steps": 2,
        "periods": {2: 4, 8: None},
        "probability": 0.2,
        "theta": 1.0,
        "topology": "ring(self_weight=0.5)",
    }
    accepted = inspect.signature(catalog.ALGORITHMS[name].factory).parameters
    required = {
        key: needed[key]
        for key, parameter in accepted.items()
        if parameter.default is parameter.empty and key != "axis_name"
    }
    algorithms = config.parse_algorithms([{"name": name} | required])
    (run,) = catalog.resolve(dataclasses.replace(BASE, algorithms=algorithms))
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(run))
    assert catalog.resolve(config.load(path)) == (run,)
    assert set(run.algorithms[0].arguments) == {*accepted} - {"axis_name"}


def test_old_names_of_arguments_are_read_with_a_warning():
    def resolved(text):
        algorithms = config.parse_algorithms(text)
        (run,) = catalog.resolve(dataclasses.replace(BASE, algorithms=algorithms))
        return run

    for name, old, new in (
        (
            "local_sgd",
            "local_steps: 2, start_step: 3",
            "local_steps: 2, warmup_steps: 3",
        ),
        ("async_model_average", "period: 4", "local_steps: 4"),
        (
            "compressed_mean",
            "compressor: topk(0.5), error_feedback: null",
            "compressor: topk(0.5), error_feedback: auto",
        ),
    ):
        with pytest.warns(DeprecationWarning, match=f"{name}: .* works until 0"):
            run = resolved(f"[{{name: {name}, {old}}}]")
        assert run == resolved(f"[{{name: {name}, {new}}}]")
    with pytest.raises(ConfigError, match="period is the old name of local_steps"):
        resolved("[{name: async_model_average, period: 4, local_steps: 4}]")


def test_the_command_line_shows_old_names(lab):
    algorithms = [{"name": "async_model_average", "period": 2}]
    status, _, complaint = lab.run(algorithms=algorithms)
    assert status == 0
    assert "async_model_average: period is called local_steps; the old" in complaint


def test_a_topology_that_does_not_fit_the_workers_is_refused():
    odd = config.parse_algorithms("[{name: decentralized, topology: shift_one}]")
    with pytest.raises(ConfigError, match="topology"):
        catalog.resolve(dataclasses.replace(BASE, workers=7, algorithms=odd))
    assert catalog.resolve(dataclasses.replace(BASE, workers=6, algorithms=odd))


def test_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "experiment: e\ntask: digits\nalgorithms: [bytegrad]\n"
        "optimizer: {learning_rate: 1e-3}\n"
    )
    assert config.load(path).optimizer.learning_rate == 1e-3


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_written_out_reads_back_equal(tmp_path, name):
    for run in catalog.resolve(config.load(name)):
        path = tmp_path / "config.yaml"
        path.write_text(config.dump(run))
        (again,) = catalog.resolve(config.load(path))
        assert again == run
        assert config.run_name(again) == config.run_name(run)


def test_every_argument_is_written_out():
    (run,) = catalog.resolve(BASE)
    assert run.algorithms[0].arguments == {
        "bucket_bytes": 10 * 2**20,
        "error_feedback": "none",
    }
    qadam = config.parse_algorithms("[{name: qadam, learning_rate: 1}]")
    (run,) = catalog.resolve(dataclasses.replace(BASE, algorithms=qadam, seed=7))
    assert run.algorithms[0].arguments["compressor"] == "minmax_uint8"
    assert run.algorithms[0].arguments["seed"] == 7
    assert run.algorithms[0].arguments["learning_rate"] == 1.0


def name_of(**changes) -> str:
    (run,) = catalog.resolve(dataclasses.replace(BASE, **changes))
    return config.run_name(run)


@pytest.mark.parametrize(
    "change",
    [
        {"task": "digits"},
        {"workers": 4},
        {"where": "devices"},
        {"sharding": "label"},
        {"steps": 7},
        {"batch_size": 7},
        {"eval_every": 7},
        {"optimizer": OptimizerConfig(learning_rate=0.2)},
        {
            "algorithms": config.parse_algorithms(
                [{"name": "bytegrad"} | {"label": "x"}]
            )
        },
        {"seed": 7},
    ],
    ids=str,
)
def test_what_changes_numbers_changes_the_folder(change):
    assert name_of(**change) != name_of()


@pytest.mark.parametrize(
    "change",
    [
        {"experiment": "other"},
        {"output": "elsewhere"},
        {"checkpoint_every": 7},
        {"keep_checkpoints": 7},
    ],
    ids=str,
)
def test_what_changes_no_number_keeps_the_folder(change):
    assert name_of(**change) == name_of()


def test_seeds_share_the_hash_and_qadam_ignores_the_optimizer():
    assert name_of(seed=1).removesuffix("-s1") == name_of(seed=2).removesuffix("-s2")
    qadam = config.parse_algorithms("[{name: qadam, learning_rate: 0.1}]")
    other = OptimizerConfig(learning_rate=0.7)
    assert name_of(algorithms=qadam) == name_of(algorithms=qadam, optimizer=other)


def test_bare_names_are_looked_up_by_label_then_by_name():
    listed = config.parse_algorithms(
        "[{name: bytegrad, label: a}, {name: bytegrad, label: b}, qadam]"
    )
    whole = dataclasses.replace(BASE, algorithms=listed)

    def labels(wanted):
        chosen = config.select(whole, config.parse_algorithms(wanted))
        return [a.label for a in chosen]

    assert labels("b") == ["b"]
    assert labels("bytegrad") == ["a", "b"]
    assert labels("qadam,a") == ["qadam", "a"]
    assert labels("decentralized") == ["decentralized"]
    (own,) = config.select(
        whole, config.parse_algorithms("[{name: bytegrad, error_feedback: owner}]")
    )
    assert own.arguments == {"error_feedback": "owner"}
