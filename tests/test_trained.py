"""What becomes of a run: any architecture and any prompt, through the run folder, an exported adapter and a merged model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, OPTConfig, Phi3Config, PretrainedConfig

from console import Command, refused
from flexlora import Config, rundir
from flexlora import run as play
from flexlora.modeling import load_model
from flexlora.prompts import load_template
from flexlora.rundir import Run, create_run
from flexlora.saved import load_adapter
from flexlora.trained import client_adapter, export, open_trained, records_of, score, standing_at
from flexlora.types import FlexLoraError, LowRank
from tiny import tiny_federation, tiny_model, tiny_tokenizer

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
ARCHITECTURES: dict[str, tuple[PretrainedConfig, str]] = {
    # configuration, its linear layers
    "opt": (OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2), "q_proj,v_proj,out_proj,fc1,fc2"),
    "gpt-neox": (
        GPTNeoXConfig(**SIZES, intermediate_size=48, initializer_range=0.2),
        "query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
    ),
    "phi3": (
        Phi3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, initializer_range=0.2),
        "qkv_proj,o_proj,gate_up_proj,down_proj",
    ),
}
FAST: dict[str, Any] = {
    "participation": 1.0,
    "rounds": 1,
    "eval_every": 0,
    "eval_batch_size": 4,
    "max_new_tokens": 5,
    "cutoff_len": 300,
    "validation_examples": 4,
    "learning_rate": 0.02,
    "ranks": {"types": {"a": 2, "b": 4}, "clients": {0: "a", 1: "b", 2: "a"}},
    "name": "r",
}


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_federation(tmp_path_factory.mktemp("data"), 3, train=4, eval=2, test=1)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def other(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One round of a model that is not like LLaMA."""
    folder = tmp_path_factory.mktemp(request.param)
    config, targets = ARCHITECTURES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    keys = {**FAST, "model": str(folder / "model"), "data": data, "output_dir": folder}
    return play(Config(**keys, lora_target_modules=tuple(targets.split(","))))


# --- any architecture ---------------------------------------------------------------------------------------------------


def test_every_command_opens_what_was_trained(other: Run, data: Path, command: Command, tmp_path: Path) -> None:
    for out, more in (("adapter", ()), ("merged", ("--merge",))):
        assert command("export", other.folder, "--out", tmp_path / out, *more).code == 0
    ours = logits(open_trained(str(other.folder)).model.network)
    bare = logits(AutoModelForCausalLM.from_pretrained(other.config.model))
    assert float((ours - bare).abs().max()) > 1e-2
    for target, expected in (
        (other.adapter, ours),
        (tmp_path / "adapter", ours),
        (tmp_path / "merged", ours),
        (Path(other.config.model), bare),
    ):
        opened = logits(open_trained(str(target)).model.network)
        torch.testing.assert_close(opened, expected, rtol=1e-4, atol=1e-4)
        predictions = ("--predictions", tmp_path / "p.jsonl")
        done = command("evaluate", target, "--data", data, "--examples", 2, "--max_new_tokens", 2, *predictions)
        assert done.code == 0, done.error
        done = command("generate", target, "--prompt", "Copy the word.", "--max_new_tokens", 2)
        assert done.code == 0, done.error


@pytest.mark.parametrize("said", ["all-linear", r".*\.(query_key_value|o_proj)", ["q_proj"]])
def test_the_weights_say_which_layers_an_adapter_has(other: Run, tmp_path: Path, said: Any) -> None:
    """PEFT writes names, a regular expression or a word for all."""
    folder = Path(shutil.copytree(other.adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": said}))
    ours, theirs = open_trained(str(folder)), open_trained(str(other.folder))
    assert ours.model.shapes == theirs.model.shapes
    assert torch.equal(logits(ours.model.network), logits(theirs.model.network))


def test_memory_of_ranks_is_told_for_the_layers_that_are_named(other: Run, command: Command) -> None:
    refused(command("ranks", "--model", other.config.model), "--lora_target_modules")
    named = other.config.lora_target_modules
    for words in ([",".join(named)], list(named)):
        done = command("ranks", "--model", other.config.model, "--cutoff_len", 32, "--lora_target_modules", *words)
        assert done.code == 0, done.error
        assert "type_4" in done.said
    refused(command("ranks", "--model", other.config.model, "--lora_target_modules", "absent"), "absent")


def test_data_inspect_needs_the_tokenizer_alone(data: Path, command: Command, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokens")
    assert command("data", "inspect", data, "--model", tmp_path / "tokens").code == 0
    refused(command("data", "inspect", data, "--model", tmp_path / "absent"), "--model", "absent")


def test_an_adapter_of_another_model_is_refused(other: Run, command: Command, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", hidden_size=16)
    folder = Path(shutil.copytree(other.adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}))
    refused(command("generate", folder, "--prompt", "x"), "adapter", "does not fit the model")


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "base_model_name_or_path": 3}']
)
def test_a_damaged_adapter_is_one_line(tuned: Run, command: Command, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(tuned.adapter, tmp_path / "adapter"))
    (folder / "adapter_config.json").write_text(text)
    refused(command("generate", folder, "--prompt", "x"), "adapter_config.json")


# --- how it is asked ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model with a chat template that was trained in another one."""
    folder = tmp_path_factory.mktemp("tuned")
    keys = {**FAST, "model": str(tiny_model(folder / "model")), "data": data, "output_dir": folder}
    return play(Config(**keys, prompt_template="alpaca"))


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_exported_is_asked_as_it_was_trained(tuned: Run, data: Path, tmp_path: Path, merge: bool) -> None:
    own = open_trained(str(tuned.folder))
    records = records_of(data, "global")
    folders = [export(tuned, tmp_path / "out", merge=merge), export(tuned, tmp_path / "one", client=1, merge=merge)]
    if not merge:
        folders.append(tuned.adapter)
    for folder in folders:
        opened = open_trained(str(folder))
        assert opened.template == own.template == load_template("alpaca")
        assert (opened.config.cutoff_len, opened.config.max_new_tokens) == (300, 5)
        if folder != folders[1]:
            said = [line["prediction"] for line in score(opened, records).predictions]
            assert said == [line["prediction"] for line in score(own, records).predictions]
        changed = open_trained(str(folder), {"prompt_template": "vigogne", "max_new_tokens": 3})
        assert (changed.template.name, changed.config.cutoff_len, changed.config.max_new_tokens) == ("vigogne", 300, 3)


def test_auto_becomes_the_template_that_it_stood_for(other: Run, tmp_path: Path) -> None:
    for folder in (other.adapter, export(other, tmp_path / "out"), export(other, tmp_path / "merged", merge=True)):
        assert json.loads((folder / "flexlora.json").read_text())["prompt_template"] == "chat"


def test_the_adapter_of_a_federation_says_how_it_is_asked(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    from flexlora.federate import Scoreless

    adapter = {"m": LowRank(torch.ones(3, 2), torch.ones(2, 4))}
    Scoreless(Config(cutoff_len=99), "alpaca_short", {0: {"m": 2}}).save(tmp_path, adapter, {"round": 3})
    assert json.loads((tmp_path / "flexlora.json").read_text()) == {
        "round": 3,
        "prompt_template": "alpaca_short",
        "cutoff_len": 99,
        "max_new_tokens": 64,
    }


@pytest.mark.parametrize("name", ["own", "alpaca"])
def test_a_template_of_ones_own_goes_along(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {"prompt_input": "Q: {instruction} ({input})\nA:", "prompt_no_input": "Q: {instruction}\nA:"}
    own = Path(f"{name}.json")
    own.write_text(json.dumps({**asked, "response_split": "A:", "stop": ["Q:"]}))
    template = load_template(str(own))
    keys = {**FAST, "model": str(tiny_model(tmp_path / "model")), "data": data, "output_dir": tmp_path}
    done = play(Config(**keys, prompt_template=str(own)))
    own.unlink()
    folders = [done.folder, done.adapter, export(done, tmp_path / "out"), export(done, tmp_path / "m", merge=True)]
    (tmp_path / "elsewhere").mkdir()
    folders.append(folders[2].rename(tmp_path / "elsewhere" / "out"))
    del folders[2]
    for folder in folders:
        opened = open_trained(str(folder))
        assert replace(opened.template, name=name) == template
        assert not any(str(tmp_path) in file.read_text() for file in folder.glob("flexlora.json"))


def test_adapters_of_others_and_older_ones_are_asked_as_before(tuned: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned.adapter, tmp_path / "adapter"))
    for about in ('{"round": 1}', '{"source": "a", "files": {}}', None):
        if about is None:
            (folder / "flexlora.json").unlink()
        else:
            (folder / "flexlora.json").write_text(about)
        opened = open_trained(str(folder))
        assert (opened.template.name, opened.config.cutoff_len, opened.config.max_new_tokens) == ("chat", 512, 64)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "[" * 100_000,
        "\xff",
        '{"prompt_template": 3}',
        '{"prompt_template": "nothing"}',
        '{"prompt_template": "../secret.json"}',
        '{"prompt_template": "prompt_template.json"}',
        '{"cutoff_len": "many"}',
        '{"cutoff_len": 1}',
        '{"cutoff_len": 1e999}',
        '{"max_new_tokens": 0}',
        '{"max_new_tokens": true}',
        '{"max_new_tokens": 1000000000000000000000000000000}',
    ],
)
def test_a_damaged_or_hostile_word_about_an_adapter_is_one_line(
    tuned: Run, command: Command, tmp_path: Path, text: str
) -> None:
    folder = Path(shutil.copytree(tuned.adapter, tmp_path / "adapter"))
    shutil.copyfile(folder / "adapter_config.json", tmp_path / "secret.json")
    (folder / "flexlora.json").write_bytes(text.encode("latin-1"))
    if "max_new_tokens" in text:  # which generate has of its own
        with pytest.raises(FlexLoraError, match=r"adapter/flexlora.json: cannot be (read|used) .*mend or remove it"):
            open_trained(str(folder))
        return
    done = command("generate", folder, "--prompt", "x", "--max_new_tokens", 2)
    refused(done, "adapter/prompt_template.json" if '"prompt_template.json"' in text else "adapter/flexlora.json")


def test_more_tokens_than_a_model_has_positions_are_refused(data: Path, tmp_path: Path, command: Command) -> None:
    """OPT's positions are learned: beyond the last one its embedding raises IndexError."""
    from flexlora.federate import serve  # needs Flower

    config, targets = ARCHITECTURES["opt"]
    short = type(config)(**{**config.to_dict(), "max_position_embeddings": 250})
    AutoModelForCausalLM.from_config(short, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    path = mine / "3" / "local_training_1.json"
    path.write_text(json.dumps([{**record, "input": "x" * 280} for record in json.loads(path.read_text())]))
    keys = {**FAST, "model": str(tmp_path / "model"), "data": mine, "output_dir": tmp_path}
    held_out = mine / "3" / "global_test.json"
    held_out.write_text(json.dumps([{**record, "input": "x" * 280} for record in json.loads(held_out.read_text())]))
    keys |= {"lora_target_modules": tuple(targets.split(",")), "cutoff_len": 251}
    model = keys["model"]
    message = f"cutoff_len: 251 are more tokens than {model} has positions; lower --cutoff_len to 250 or less"
    with pytest.raises(FlexLoraError) as caught:
        play(Config(**keys))
    assert str(caught.value) == message
    with pytest.raises(FlexLoraError) as caught:
        serve(None, {**keys, "lora_target_modules": targets, "output_dir": str(tmp_path), "data": "", "ranks": "homo"})
    assert str(caught.value) == message
    assert not (tmp_path / "r").exists()
    (line,) = play(Config(**{**keys, "cutoff_len": 250})).metrics
    assert not line["failed"]
    assert [client.get("cut_examples", 0) for client in line["clients"]] == [0, 4, 0]
    # What was trained is asked within them too, and a bare model by its own limit.
    done = command("generate", tmp_path / "r", "--prompt", "x" * 400, "--max_new_tokens", 3)
    assert done.code == 0, done.error
    done = command("evaluate", model, "--data", mine, "--examples", 1, "--max_new_tokens", 2)
    assert done.code == 0, done.error


# --- what one client runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["flora", "florist"])
def test_a_client_that_adapts_few_modules_gets_the_base_delta_of_all(data: Path, tmp_path: Path, method: str) -> None:
    ranks = {"types": {"a": {"q_proj": 4}, "b": 8}, "clients": {0: "a", 1: "b", 2: "b"}}
    keys = {**FAST, "model": str(tiny_model(tmp_path / "model")), "data": data, "output_dir": tmp_path, "ranks": ranks}
    done = play(Config(**{**keys, "rounds": 2}, method=method))
    found, standing, _ = standing_at(done)
    download = found.distribute(standing.state, standing.table[0])
    assert len(download.base_delta) > len(download.adapter)
    model = load_model(done.config.model)
    model.attach(download.adapter, base_delta=download.base_delta)
    expected = logits(model.network)
    for folder in (export(done, tmp_path / "one", client=0), export(done, tmp_path / "two", client=0, merge=True)):
        torch.testing.assert_close(logits(open_trained(str(folder)).model.network), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="session")
def personal(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("personal")
    keys = {**FAST, "model": str(tiny_model(folder / "model")), "data": data, "output_dir": folder}
    return play(Config(**{**keys, "participation": 0.67}, method="fedsa"))


def trained_clients(run: Run) -> set[int]:
    return {client["id"] for line in run.metrics for client in line["clients"]}


def test_a_client_that_never_trained_is_said_to_have_no_part_of_its_own(personal: Run, tmp_path: Path) -> None:
    some = min(trained_clients(personal))
    (never,) = {0, 1, 2} - trained_clients(personal)
    said = "has not trained yet"
    assert said in (export(personal, tmp_path / "never", client=never) / "README.md").read_text()
    assert said not in (export(personal, tmp_path / "some", client=some) / "README.md").read_text()


def test_what_stays_at_a_site_cannot_be_exported_here(personal: Run, command: Command, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(personal.folder, tmp_path / "run"))
    shutil.rmtree(folder / "kept")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("runner: local", "runner: flower"))
    refused(command("export", folder, "--client", 0, "--out", tmp_path / "out"), "its B stays at the site")
    assert not (tmp_path / "out").exists()
    method, standing, _ = standing_at(Run(folder))
    with pytest.raises(FlexLoraError, match="stays at the site"):
        client_adapter(Run(folder), method, standing, 0)


# --- a run without a round, other ranks ---------------------------------------------------------------------------------


def test_a_run_without_a_finished_round_says_how_to_finish_one(tuned: Run, command: Command, tmp_path: Path) -> None:
    folder = create_run(tuned.config, tmp_path / "new", rundir.environment()).folder
    for words in (("inspect", folder), ("export", folder, "--out", tmp_path / "out"), ("generate", folder)):
        refused(command(*words), f"finish a round with `flexlora resume {folder}`")
    refused(command("inspect", folder, "--round", 7), "round 7 has no checkpoint", f"`flexlora resume {folder}`")
    refused(command("inspect", tuned.folder, "--round", 7), "round 7 has no checkpoint; there are: 1")


def test_evaluate_scores_another_rank_and_what_a_client_runs(
    tuned: Run, data: Path, command: Command, tmp_path: Path
) -> None:
    common = ("--data", data, "--json", "--predictions", tmp_path / "p.jsonl")
    for words in (("--rank", 1), ("--client", 0), ("--client", 1, "--rank", 2)):
        out = tmp_path / "-".join(map(str, words))
        assert command("export", tuned.folder, "--out", out, *words).code == 0
        done, same = command("evaluate", tuned.folder, *common, *words), command("evaluate", out, *common)
        assert done.code == 0, done.error
        assert json.loads(done.said)["loss"] == pytest.approx(json.loads(same.said)["loss"], rel=1e-5)
    whole = json.loads(command("evaluate", tuned.folder, *common).said)
    least = json.loads(command("evaluate", tuned.folder, *common, "--rank", 1).said)
    assert whole["loss"] != pytest.approx(least["loss"], rel=1e-5)


def test_a_personal_run_is_scored_by_client(personal: Run, data: Path, command: Command, tmp_path: Path) -> None:
    words = ("evaluate", personal.folder, "--data", data, "--predictions", tmp_path / "p.jsonl")
    refused(command(*words), "--client")
    refused(command(*words, "--rank", 2), "--client")
    one = min(trained_clients(personal))
    done = command(*words, "--client", one)
    assert done.code == 0, done.error
    assert f"next: flexlora export {personal.folder} --client {one} --out my-adapter" in done.said.replace("\n", " ")


def test_another_rank_or_client_is_one_of_a_run(tuned: Run, data: Path, command: Command, tmp_path: Path) -> None:
    words = ("--data", data, "--predictions", tmp_path / "p.jsonl")
    for target in (tuned.adapter, tuned.config.model):
        refused(command("evaluate", target, *words, "--rank", 2), "rank: ", "run folder")
        refused(command("evaluate", target, *words, "--client", 0), "client: ", "run folder")
    refused(command("evaluate", tuned.folder, *words, "--rank", 0), "rank: 0")
    refused(command("evaluate", tuned.folder, *words, "--client", 9), "client 9")
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": "16"},
        {"lora_alpha": None},
        {"lora_alpha": [1]},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"q_proj": "z"}},
    ],
    ids=str,
)
def test_an_adapter_with_a_scaling_that_is_no_number_is_a_line(
    tuned: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tuned.adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(FlexLoraError, match=r"lora_alpha or rank of .* is no number above 0; save the adapter again"):
        load_adapter(folder)


def test_what_is_said_otherwise_is_not_asked_of_the_folder(tuned: Run, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tuned.adapter, folder)
    path = folder / "flexlora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cutoff_len": 2**30}))
    with pytest.raises(FlexLoraError, match=r"flexlora.json: cannot be (read|used) .*mend or remove it"):
        open_trained(str(folder))
    assert open_trained(str(folder), {"cutoff_len": 512}).config.cutoff_len == 512
    # a run's own lengths stand in its configuration
    run = tmp_path / "run"
    shutil.copytree(tuned.folder, run)
    shutil.copy(path, run / "adapter" / "flexlora.json")
    assert open_trained(str(run)).config.cutoff_len == tuned.config.cutoff_len


def test_a_template_that_is_gone_does_not_hinder_an_export(personal: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(personal.folder, run)
    path = run / "env.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "template": "gone.json"}))
    export(Run(run), tmp_path / "out", client=min(trained_clients(personal)))
    assert "prompt_template" not in json.loads((tmp_path / "out" / "flexlora.json").read_text())
