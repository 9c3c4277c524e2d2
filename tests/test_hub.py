"""Models, tokenizers and LoRAs by their names on the Hub, with a local server of its API."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from btx_jax import hub, hub_names, rundir, stages
from btx_jax.checkpoints import router_statistics
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params
from btx_jax.checkpoints.training_state import elsewhere
from btx_jax.commands import adapter, convert, experts, mix
from btx_jax.commands.verify import verify
from btx_jax.config.config import DataConfig
from btx_jax.config.config_dict import from_config_dict
from btx_jax.data.prepare import resolve_tokenizer
from btx_jax.errors import UserError
from btx_jax.paths import refuse_links_out
from btx_jax.presets import recipes
from btx_jax.presets.recipes import expert
from tests.hub_process import GOLDEN, LLAMA, MIXED, MODEL, environment, files_of, point_at, run_cli
from tests.hub_server import GOOD, READ

NOT_READ = {  # other files in repositories
    "modeling_llama.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "optimizer.pkl": b"pickle",
    "consolidated.safetensors": b"other weights",
    "onnx/config.json": b"{}",
    "trainer_state.json": b"{}",
}


def refused(name, key="config.init"):
    with pytest.raises(UserError) as caught:
        find_checkpoint(name, key)
    line = str(caught.value)
    assert line.startswith(f"{key}: ") and "\n" not in line
    return line


# Models


def test_statistics_of_routers_are_fetched_where_they_are_used(server, tmp_path):
    recipe = {
        "base_model": str(MIXED / "base"),
        "gate_mode": "ridge",
        "experts": [
            {"source_model": str(MIXED / name), "positive_prompts": [text * 9]}
            for name, text in (("a", "1 + 2 "), ("b", "a river "), ("c", "def f "))
        ],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    mix.run(str(tmp_path / "recipe.yml"), str(tmp_path / "mixed"))
    files = files_of(tmp_path / "mixed")
    server.add("org/mixed", {f"inside/{name}": data for name, data in files.items()})
    find_checkpoint("org/mixed/inside")
    assert not server.asked(router_statistics.FILE)
    told = experts.drop("org/mixed/inside", 0, str(tmp_path / "less"))
    assert told.endswith("2 experts; all router rows were recomputed")
    assert (tmp_path / "less" / router_statistics.FILE).exists()


def test_a_model_by_its_name_is_the_directory_itself(server):
    repo = server.add("org/llama", LLAMA)
    found = find_checkpoint("org/llama", "config.init")
    ours = find_checkpoint(GOLDEN / "llama")
    assert digest(load_params(found)) == digest(load_params(ours))
    commit = repo.refs["main"]
    assert found.path.name == commit
    assert found.identity() == f"org/llama@{commit}" and found.name == "org/llama"
    assert found.metadata.history == elsewhere(found.path) == {f"org/llama@{commit}": None}


@pytest.mark.parametrize("how", ["org/m@v1", "hf://org/m@v1", "hf://models/org/m@v1", "COMMIT"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(server, how):
    repo = server.add("org/m", LLAMA)
    old = repo.commit(LLAMA, "v1")
    repo.commit({"config.json": b"{}"})
    assert find_checkpoint(how.replace("COMMIT", f"org/m@{old}")).path.name == old


def test_a_model_may_lie_in_a_folder_of_a_repository(server):
    server.add("org/many", {f"models/small/{name}": data for name, data in MODEL.items()})
    found = find_checkpoint("org/many/models/small")
    assert found.path.name == "small" and found.name == "org/many/models/small"
    assert "append one of its folders: models/small" in refused("org/many")
    assert "no folder large; append one of its folders: models/small" in refused("org/many/large")


def test_what_lies_here_wins_and_its_neighbours_are_not_looked_for(server, tmp_path):
    server.add("org/llama", LLAMA)
    server.add("org/other", LLAMA)
    shutil.copytree(MIXED / "a", "org/llama")
    assert find_checkpoint("org/llama").path == Path.cwd() / "org/llama"
    assert "does not exist; for a repository of the Hub write hf://org/other" in refused(
        "org/other"
    )
    assert not server.log
    assert hub_names.origin(find_checkpoint("hf://org/other").path).repo == "org/other"


def test_nothing_is_fetched_that_is_not_read(server):
    shards = {"model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    index = {"weight_map": {"a": "model-1.safetensors"}}
    server.add("org/llama", {**LLAMA, **NOT_READ})
    server.add(
        "org/shards", {"config.json": b"{}", **shards, hub._INDEX: json.dumps(index).encode()}
    )
    folder = hub.resolve("org/llama", "init")
    assert set(files_of(folder)) == set(LLAMA)
    assert set(files_of(hub.resolve("org/shards", "init"))) == {
        "config.json", hub._INDEX, "model-1.safetensors",
    }  # fmt: skip
    assert not any(server.asked(f"/{name}") for name in NOT_READ)


def test_a_tokenizer_by_its_name_comes_without_the_weights(server):
    server.add("org/m", {**MODEL, **NOT_READ})
    found = resolve_tokenizer(DataConfig(train="x", tokenizer="org/m"), None)
    ours = resolve_tokenizer(DataConfig(train="x", tokenizer=str(MIXED / "a")), None)
    assert found.sha256 == ours.sha256
    assert set(files_of(found.path.parent)) == set(MODEL) - {"model.safetensors"}
    find_checkpoint("org/m")
    assert len(server.asked("/cdn/", "GET")) == 1


def test_a_recipe_names_models_of_the_hub(server, tmp_path):
    for name in ("base", "a", "b", "c"):
        server.add(f"org/{name}", files_of(MIXED / name))
    recipe = yaml.safe_load((MIXED / "recipe.yml").read_text()) | {"gate_mode": "random"}
    for folder, prefix in (("named", "org/"), ("local", f"{MIXED}/")):
        text = yaml.safe_dump(
            recipe
            | {
                "base_model": prefix + recipe["base_model"],
                "experts": [
                    {**each, "source_model": prefix + each["source_model"]}
                    for each in recipe["experts"]
                ],
            }
        )
        Path(f"{folder}.yml").write_text(text)
        mix.run(f"{folder}.yml", folder)
    assert digest(load_params(find_checkpoint("named"))) == digest(
        load_params(find_checkpoint("local"))
    )


def test_a_lora_and_its_base_by_their_names(server):
    server.add("org/base", LLAMA)
    server.add("org/lora", files_of(GOLDEN / "peft"))
    adapter.import_peft("org/lora", "org/base", "imported")
    found = find_checkpoint("imported")
    assert hub_names.origin(found.metadata.base.path).repo == "org/base"
    shutil.rmtree(constants.HF_HUB_CACHE)  # recorded names can be downloaded again
    huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    adapter.merge("imported", "merged")
    adapter.export("imported", "peft", "peft")
    told = json.loads(Path("peft/adapter_config.json").read_text())
    commit = server.repos["model", "org/base"].refs["main"]
    assert (told["base_model_name_or_path"], told["revision"]) == ("org/base", commit)


def test_a_conversion_and_its_card_name_the_repository(server):
    server.add("org/m", MODEL)
    convert.run("org/m", "run")
    convert.run("run", "back")
    commit = server.repos["model", "org/m"].refs["main"]
    assert list(find_checkpoint("back").metadata.history) == [f"org/m@{commit}"]


def test_what_was_loaded_is_verified_by_the_hubs_own_hashes(server):
    server.add("org/m", MODEL)
    assert all(finding.good for finding in verify("org/m"))
    blob = (find_checkpoint("org/m").path / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert [f.name for f in verify("org/m") if not f.good] == ["model.safetensors"]


def test_weights_of_the_caches_shared_store_are_read_and_verified(server):
    server.add("org/m", MODEL)
    blob = (find_checkpoint("org/m").path / "model.safetensors").resolve()
    store = Path(constants.HF_HUB_CACHE, "blobs", "ab", "ab" * 32)  # xet's location
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    assert load_params(find_checkpoint("org/m"))
    assert all(finding.good for finding in verify("org/m"))
    Path("elsewhere").mkdir()
    Path("elsewhere/model.safetensors").symlink_to(store)
    with pytest.raises(UserError, match=r"a link to .*, outside the directory"):
        refuse_links_out(Path("elsewhere"))


def test_an_index_cannot_ask_for_anything_but_weights(server):
    for wanted in ("model.py", "../x.safetensors", "pytorch_model.bin"):
        index = json.dumps({"weight_map": {"a": wanted}}).encode()
        files = {"config.json": LLAMA["config.json"], hub._INDEX: index, wanted: b"x"}
        server.add("org/index", files)
        hub._pins.clear()
        line = refused("org/index")
        assert "holds no safetensors" in line or "cannot contain a '..' path segment" in line
    assert not server.asked("model.py") and not server.asked(".bin")


# One commit


def test_a_run_that_goes_on_takes_the_commit_that_it_began_with(server, tmp_path, monkeypatch):
    repo = server.add("org/m", MODEL)
    began = repo.refs["main"]
    config = from_config_dict(expert("math", "tiny"))
    rundir.settle_names(tmp_path / "run", config)
    find_checkpoint("org/m")
    rundir.claim(tmp_path / "run", config)
    repo.commit({"config.json": LLAMA["config.json"]})
    assert find_checkpoint("org/m").path.name == began  # within the same process
    monkeypatch.setattr(hub, "_pins", {})
    rundir.settle_names(tmp_path / "run", config)
    assert find_checkpoint("org/m").path.name == began
    monkeypatch.setattr(hub, "_pins", {})
    rundir.settle_names(tmp_path / "another", config)
    assert find_checkpoint("org/m").path.name == repo.refs["main"]


@pytest.mark.slow
def test_a_second_process_fetches_nothing_again_and_needs_no_network(server, tmp_path):
    server.add("org/m", MODEL)
    first = run_cli(server, tmp_path, "digest", "org/m")
    assert first.returncode == 0 and not first.stderr
    fetched = server.bodies("/")
    server.log.clear()
    second = run_cli(server, tmp_path, "digest", "org/m")
    assert second.stdout == first.stdout and fetched > 10_000
    assert not server.asked("/resolve/") and not server.asked("/cdn/")
    server.log.clear()
    offline = run_cli(server, tmp_path, "digest", "org/m", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout and not server.log
    other = run_cli(server, tmp_path, "digest", "org/n", HF_HUB_OFFLINE="1")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set; unset it" in other.stderr


JOB = """
import dataclasses, sys
from pathlib import Path
from btx_jax.parallel import hosts
hosts.start()
from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.config.config_dict import from_config_dict
from btx_jax.paths import refuse_links_out
from btx_jax.presets import recipes
from btx_jax.presets.recipes import expert
from btx_jax.rundir import settle_names
config = dataclasses.replace(from_config_dict(expert("math", "tiny")), init="org/m")
settle_names(Path("run"), config)
print(find_checkpoint("org/m").path.name)
"""


def test_all_processes_of_a_run_take_the_commit_of_the_first(server, tmp_path):
    repo = server.add("org/m", MODEL)
    began = repo.refs["main"]

    def move(request):
        """main moves as soon as it has been requested."""
        if request.path == "/api/models/org/m":
            repo.commit({"config.json": LLAMA["config.json"]})

    server.after = move
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", JOB],
            env=environment(
                server, tmp_path / str(i), JAX_PROCESS_ID=str(i),
                JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2",
            ),
            stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for i in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120)[0].split()[-1] for process in both]
    assert told == [began, began]
    assert repo.refs["main"] != began
    assert len(server.asked("/api/models/org/m", "GET")) == 3  # by name, and each commit's list


# Errors


def test_a_name_that_the_hub_has_not_is_told_with_the_nearest(server):
    server.add("meta-llama/Llama-3.2-1B", LLAMA)
    for name in ("meta-llama/Llama-3.2-1b", "meta-lama/Llama-3.2-1B"):
        line = refused(name)
        assert f"{name} does not exist here, and the Hub has no model {name}" in line
        assert "did you mean 'meta-llama/Llama-3.2-1B'?" in line and "hf auth login" in line


def test_gated_and_private_repositories(server, monkeypatch):
    server.add("org/gated", LLAMA, gated=True)
    server.add("org/private", LLAMA, private=True)
    line = refused("org/gated")
    assert f"accept its licence at {server.url}/org/gated, then: hf auth login" in line
    assert "if it is private: hf auth login" in refused("org/private")
    monkeypatch.setenv("HF_TOKEN", READ)
    assert "accept its licence" in refused("org/gated")
    assert "the Hub has no model org/private that you can see with this token" in refused(
        "org/private"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "rejected your token" in refused("org/private")
    monkeypatch.setenv("HF_TOKEN", GOOD)
    assert find_checkpoint("org/gated") and find_checkpoint("org/private")
    assert all(not r.token for r in server.asked("/cdn/"))  # tokens are not sent to another host


def test_a_revision_that_is_not_there_is_told_with_those_that_are(server):
    server.add("org/m", LLAMA).commit(LLAMA, "step-1000")
    line = refused("org/m@step-100")
    assert (
        "org/m has no revision 'step-100'; did you mean 'step-1000'? it has main, step-1000" in line
    )


def test_a_repository_of_pickles_is_refused_before_they_are_fetched(server):
    server.add("org/bin", {"config.json": LLAMA["config.json"], "pytorch_model.bin": b"x"})
    server.add("org/lora", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    server.add("org/none", {"README.md": b"x"})
    assert "only pytorch_model.bin" in (line := refused("org/bin"))
    assert "spaces/safetensors/convert" in line and "save_pretrained" in line
    assert "only adapter_model.bin" in refused("org/lora")
    assert "holds no model (config.json)" in refused("org/none")
    assert not server.asked(".bin")


def test_no_network(tmp_path, monkeypatch):
    point_at("http://127.0.0.1:9", tmp_path, monkeypatch)
    line = refused("org/m")
    assert "there is no connection to http://127.0.0.1:9" in line and "HF_ENDPOINT" in line


def test_a_hub_that_is_down(server):
    server.status = 503
    assert "returned 503" in refused("org/m")


def test_a_cut_download_goes_on_where_it_was(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.add("org/m", LLAMA)
    server.cuts["/cdn/"] = [50_000, 20_000]
    found = find_checkpoint("org/m")
    assert [r.range for r in server.asked("/cdn/", "GET")] == ["", "bytes=50000-", "bytes=70000-"]
    assert files_of(found.path) == LLAMA
    assert server.bodies() == len(LLAMA["model.safetensors"])


def test_a_download_that_is_cut_again_and_again_is_told_and_can_be_run_again(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.add("org/m", LLAMA)
    server.cuts["/cdn/"] = [10] * 1000
    line = refused("org/m")
    assert (
        "the download of org/m was interrupted repeatedly" in line
        and "run the same command again" in line
    )
    server.cuts.clear()
    find_checkpoint("org/m")


def test_a_full_disk(server, monkeypatch):
    server.add("org/m", LLAMA)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    assert "no space left in" in (line := refused("org/m")) and "HF_HOME" in line


def test_an_evaluation_of_models_and_test_sets_of_the_hub(server, tmp_path, monkeypatch):
    repo = server.add("org/m", MODEL)
    items = [{"question": f"{i} + 1 =", "choices": ["1", "2"], "gold": 1} for i in range(9)]
    lines = "\n".join(map(json.dumps, items)).encode()
    server.add("org/set", {"test.jsonl": lines}, "dataset")
    config = recipes.tasks({"m": "org/m"}, ("arc_easy",), 3, "float32", 8)
    where = "hf://datasets/org/set/test.jsonl"
    task = dataclasses.replace(config.evaluate.tasks["arc_easy"], file=where, prompt="{question}")
    evaluate = dataclasses.replace(config.evaluate, tasks={"mine": task})
    config = dataclasses.replace(config, evaluate=evaluate)
    stages.run(config, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert told["models.m"] == f"org/m@{repo.refs['main']}"
    repo.commit({"config.json": LLAMA["config.json"]})
    monkeypatch.setattr(hub, "_pins", {})
    stages.run(config, tmp_path / "run")  # uses the commit with which it began
    monkeypatch.setattr(hub, "_pins", {})
    (tmp_path / "run" / "hub.json").unlink()
    with pytest.raises(UserError, match=r"models\.m: differs from what was measured there before"):
        stages.run(config, tmp_path / "run")
