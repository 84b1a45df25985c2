"""The configuration: old and new names, text values as from the command line, one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from flexlora.config import LEARNING_RATE, Config, alias_table, key_aliases, key_group, make_config, read_config
from flexlora.launch import method_of
from flexlora.types import FlexLoraError

ORIGINAL = {
    # option of the original document: (value as text, our key, value meant)
    "global_model": ("m", "model", "m"),
    "data_path": ("d", "data", "d"),
    "cache_dir": ("c", "cache_dir", "c"),
    "output_dir": ("o", "output_dir", "o"),
    "session_name": ("s", "name", "s"),
    "seed": ("7", "seed", 7),
    "client_selection_frac": ("0.25", "participation", 0.25),
    "num_communication_rounds": ("9", "rounds", 9),
    "num_clients": ("1613", "num_clients", 1613),
    "resume_epoch": ("4", "resume_from", 4),
    "aggregation": ("heavy_tail", "ranks", "heavy_tail"),
    "baseline": ("slora", "baseline", "slora"),
    "R_1": ("2", "sparse_rounds", 2),
    "early_stop": ("False", "early_stop", False),
    "patience": ("5", "patience", 5),
    "local_batch_size": ("8", "batch_size", 8),
    "local_micro_batch_size": ("4", "micro_batch_size", 4),
    "local_num_epochs": ("3", "epochs", 3),
    "local_learning_rate": ("1e-6", "learning_rate", 1e-6),
    "cutoff_len": ("256", "cutoff_len", 256),
    "warmup": ("10", "warmup", 10),
    "lr_decay": ("True", "lr_decay", True),
    "train_on_inputs": ("true", "train_on_inputs", True),
    "group_by_length": ("true", "group_by_length", True),
    "prompt_template_name": ("alpaca", "prompt_template", "alpaca"),
    "lora_r": ("16", "lora_r", 16),
    "lora_alpha": ("32", "lora_alpha", 32.0),
    "lora_dropout": ("0.1", "lora_dropout", 0.1),
    "lora_target_modules": ("[q_proj,v_proj]", "lora_target_modules", ("q_proj", "v_proj")),
    "lambd": ("0.01", "prune_lambda", 0.01),
}


@pytest.mark.parametrize("old", ORIGINAL)
def test_original_option_has_its_meaning(old: str) -> None:
    text, name, meant = ORIGINAL[old]
    batch = {"local_batch_size": "8"} if name == "micro_batch_size" else {}
    value = getattr(make_config({old: text, **batch}), name)
    assert str(value) == str(meant)
    assert type(value) is type(meant) or str(value) == meant


def test_none_as_text_is_null() -> None:
    assert make_config({"resume_epoch": "None", "name": "null"}).resume_from is None


def test_lists_take_commas_and_several_values() -> None:
    assert make_config({"lora_target_modules": ["q_proj", "k_proj,v_proj"]}).lora_target_modules == (
        "q_proj",
        "k_proj",
        "v_proj",
    )
    assert make_config({"method_options": ["eta=0.5", "keep_rank=8"]}).method_options == {"eta": 0.5, "keep_rank": 8}


def test_numbers_of_clients_may_be_numbers_in_yaml(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("client_memory: {0: 2GB, default: 8GB}\n")
    config = make_config(read_config(path))
    assert config.client_memory == {"0": "2GB", "default": "8GB"}
    assert make_config(config.dump()) == config


def test_method_and_optimizer_follow() -> None:
    assert make_config({"ranks": "homo"}).method_name == "fedavg"
    assert make_config({"ranks": "normal"}).method_name == "flexlora"
    assert [make_config({"baseline": b}).optimizer for b in ("fedavg", "fedit", "slora")] == ["sgd", "adamw", "adamw"]


def test_learning_rate_halves_once_after_round_15() -> None:
    config = make_config({"lr_decay": True})
    rates = [config.local_training(r, "chat").learning_rate for r in (1, 15, 16, 40)]
    full = LEARNING_RATE["adamw"]
    assert rates == [full, full, full / 2, full / 2]
    assert make_config({}).local_training(40, "chat").learning_rate == full


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rouns": 3}, "unknown key rouns: did you mean rounds?"),
        ({"rounds": "x"}, "rounds: input should be a valid integer"),
        ({"rounds": 0}, "rounds: input should be greater than or equal to 1"),
        ({"participation": 1.5}, "participation: input should be less than or equal to 1"),
        ({"early_stop": "maybe"}, "early_stop: input should be a valid boolean"),
        ({"name": "../x"}, "name: a name is one folder name"),
        ({"data": "a", "data_path": "b"}, "data_path is given twice"),
        ({"baseline": "adam"}, "baseline: input should be 'fedavg', 'fedit' or 'slora'"),
        ({"method_options": "eta"}, "method_options: write pairs as name=value"),
        ({"method_options": "eta=["}, "method_options: the value of eta is no YAML; "),
        ({"client_memory": ["0=2GB", "1={"]}, "client_memory: the value of 1 is no YAML; "),
    ],
)
def test_bad_values_are_one_line(values: dict, line: str) -> None:
    with pytest.raises(FlexLoraError) as caught:
        make_config(values)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a: [1", "cannot be read as YAML"), (b"- 1", "holds no map"), (b"\xff\xfe", "cannot be read")],
)
def test_bad_files_are_one_line(tmp_path, content: bytes, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(FlexLoraError, match=words) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dump_makes_the_same_config_again() -> None:
    config = make_config({"ranks": {"clients": {0: 4, 1: {"q_proj": 8}}}, "data": "d", "method_options": {"eta": 0.5}})
    assert make_config(config.dump()).dump() == config.dump()


def test_every_key_is_documented_and_grouped() -> None:
    for name, info in Config.model_fields.items():
        assert info.description, name
        assert key_group(name)
        assert all(alias_table()[alias] == name for alias in key_aliases(name))


def test_core_imports_are_light() -> None:
    code = (
        "import sys, flexlora, flexlora.config, flexlora.types, flexlora.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'flwr', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import flexlora.launch\n"
        "late = {'flwr', 'ray', 'wandb', 'tensorboard', 'mlflow', 'trackio', 'plotly'} & set(sys.modules)\n"
        "assert not late, late\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("baseline", ["fedit", "slora"])
def test_keys_reach_the_method_and_slora_hands_them_on(baseline: str) -> None:
    from flexlora.launch import method_of
    from flexlora.types import ClientUpdate

    keys = {"method": "hetlora", "prune_lambda": 0.25, "prune_gamma": 0.5, "sparse_rounds": 1}
    method, ranks = method_of(make_config({**keys, "baseline": baseline})), {"m": 2}
    state = method.init({"m": (6, 5)}, 1, (ranks,))
    if baseline == "slora":
        state = method.aggregate(state, [ClientUpdate(0, 1.0, method.distribute(state, ranks).adapter)])
    rule = method.distribute(state, ranks).rule
    assert rule.prune is not None
    assert rule.prune[:2] == (0.25, 0.5)


def test_the_second_stage_of_slora_is_the_one_that_was_said() -> None:
    from flexlora.launch import method_of, refuse_unequal
    from flexlora.ranks import read_plan

    def equal(**keys: object) -> bool:
        return method_of(make_config({"baseline": "slora", **keys})).equal_ranks

    assert [equal(), equal(method_options={"then": "fedavg"})] == [False, True]
    assert equal(method="fedavg", method_options={"then": "fedavg"})
    with pytest.raises(FlexLoraError) as caught:
        equal(method="hetlora", method_options={"then": "fedavg"})
    assert str(caught.value) == (
        "method_options: then is 'fedavg' and method is 'hetlora', which slora is to be followed by; leave one out"
    )
    with pytest.raises(FlexLoraError, match="method 5 does not exist"):
        equal(method_options={"then": 5})
    config = make_config({"baseline": "slora", "method_options": {"then": "fedavg"}})
    with pytest.raises(FlexLoraError, match="method fedavg needs equal ranks and ranks is 'random'"):
        refuse_unequal(config, method_of(config), read_plan("random", lora_r=8, hidden_size=64))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rounds: 7\nrounds: 1\n", "rounds stands here twice"),
        ("ranks: {types: {a: 2, a: 3}}\n", "a stands here twice"),
        ("name: 2001-99-99\n", "cannot be read as YAML"),
        ("seed: !!int abc\n", "cannot be read as YAML"),
        ("seed: !!bool foo\n", "cannot be read as YAML"),
        ("seed: !!timestamp foo\n", "cannot be read as YAML"),
        (f"seed: {'9' * 5000}\n", "cannot be read as YAML"),
        ("seed: " + "[" * 3000, "cannot be read as YAML"),
        ("? [a, b]\n: 1\n", "cannot be read as YAML"),
        ("rounds: true\n", "rounds: must be a number, not true or false"),
        ("dp_noise: true\n", "dp_noise: must be a number, not true or false"),
        (f"max_examples: {10**400}\n", "max_examples: must be a number of at most 9223372036854775807"),
        (f"warmup: {10**30}\n", "warmup: must be a number of at most"),
        ("dp_noise: 1e+200\n", "dp_noise: input should be less than or equal to 1000000"),
        (f"method: flexlora-carry\nmethod_options: {{eta: {10**400}}}\n", "eta is 10+, it must be a number"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nrounds: [*b, *b]\n", "a"),
    ],
)
def test_odd_yaml_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(FlexLoraError, match=says) as error:
        method_of(make_config(read_config(path), str(path)))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("method_options: &o {eta: 1.0}\nranks: {types: {<<: *o, a: 2}}\n")
    assert read_config(path)["ranks"]["types"] == {"eta": 1.0, "a": 2}


def test_seeds_may_have_all_the_bits_that_numbers_have() -> None:
    assert make_config({"seed": 2**63 - 1}).seed == 2**63 - 1
