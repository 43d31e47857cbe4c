"""The stand-in of the hub answers the libraries as the hub does."""

from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.tiny import models as tiny_lm


def test_a_file_is_fetched_once_and_found_again(hub):
    made = hub.model("some/model", {"a.bin": b"0123456789", "sub/b.txt": "b"})
    path = hf_hub_download("some/model", "a.bin")
    assert Path(path).read_bytes() == b"0123456789"
    assert made.commit in path
    assert hf_hub_download("some/model", "a.bin") == path
    assert hub.downloads == {("some/model", "a.bin"): 1}
    info = HfApi().model_info("some/model", files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings} == {"a.bin": 10, "sub/b.txt": 1}
    assert [f.path for f in HfApi().list_repo_tree("some/model")] == ["a.bin", "sub"]
    assert HfApi().get_paths_info("some/model", ["a.bin"])[0].size == 10
    assert HfApi().list_repo_refs("some/model").branches[0].target_commit == made.commit


def test_models_and_tokenizers_of_transformers(hub):
    hub.model("some/llama", tiny_lm.model("llama"))
    model = AutoModelForCausalLM.from_pretrained("some/llama")
    assert model.num_parameters() > 0
    assert AutoTokenizer.from_pretrained("some/llama").decode([5])
    folder = snapshot_download("some/llama")
    assert hub.downloads["some/llama", "model.safetensors"] == 1, folder


def test_a_data_set_of_parquet_files_in_configurations(hub, tmp_path):
    for split, rows in (("train", 3), ("test", 2)):
        made = datasets.Dataset.from_dict({"x": list(range(rows))})
        made.to_parquet(tmp_path / "set" / "plain" / f"{split}-00000-of-00001.parquet")
    card = "---\nconfigs:\n- config_name: plain\n  data_files:\n"
    for split in ("train", "test"):
        card += f"  - split: {split}\n    path: plain/{split}-*\n"
    (tmp_path / "set" / "README.md").write_text(card + "---\n")
    hub.dataset("some/set", tmp_path / "set")
    cache = str(tmp_path / "cache")
    assert datasets.load_dataset("some/set", "plain", split="test", cache_dir=cache).num_rows == 2


def test_a_data_set_that_is_a_script_is_refused_by_datasets(hub):
    hub.dataset("some/script", {"script.py": "print('never run')"})
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        datasets.load_dataset("some/script")


def test_faults_are_told_apart(hub, monkeypatch):
    made = hub.model("some/model", {"a.bin": b"0", "b.bin": b"1"})
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("some/other", "a.bin")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("some/model", "a.bin", revision="v9")
    with pytest.raises(EntryNotFoundError), hub.without(made, "a.bin"):
        hf_hub_download("some/model", "a.bin")
    made.gated = True
    with pytest.raises(GatedRepoError):
        hf_hub_download("some/model", "a.bin")
    made.gated = False
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401"):
        hf_hub_download("some/model", "a.bin")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hf_hub_download("some/model", "a.bin")
    with hub.offline(), pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("some/model", "b.bin")
    hf_hub_download("some/model", "b.bin")
