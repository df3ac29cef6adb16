"""liger push and push_to_hub: the files, the card, and what the hub is asked for."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from liger_cli.report.model_card import model_card
from liger_cli.report.summary import SavedReport
from liger_cli.report.values import RunReport


class Hub:
    """A stand-in of huggingface_hub.HfApi that keeps what it is asked for."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.error: Exception | None = None

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        if self.error is not None:
            raise self.error
        self.created.append({"repo_id": repo_id, "private": private, "exist_ok": exist_ok})
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def create_commit(self, repo_id: str, *, operations: list[Any], commit_message: str) -> None:
        assert "/" in repo_id
        self.messages.append(commit_message)
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hub


def header(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_a_run_is_pushed_with_its_card_when_it_ends(train, liger, run_dir, hub):
    """Trained once: the keys, then the command on the same run."""
    out = train(
        *("--push-to-hub", "--hub-model-id", "org/tiny", "--eval-fraction", 0.2),
        *("--adapter", "lora", "--max-steps", 2),
    )
    assert out.code == 0, out.err
    assert hub.created == [{"repo_id": "org/tiny", "private": True, "exist_ok": True}]
    assert "pushed: https://huggingface.co/org/tiny" in out.err
    checkpoint = run_dir / "checkpoint-2"
    assert "adapter_model.safetensors" in hub.files
    assert {"adapter_config.json", "tokenizer.json", "README.md"} <= hub.files.keys()
    # What resumes a run stays here.
    left = {path.name for path in checkpoint.iterdir()} - hub.files.keys()
    assert left == {"manifest.json", "rng-0.pt", "trainer_state.pt"}
    weights = (checkpoint / "adapter_model.safetensors").read_bytes()
    assert hub.files["adapter_model.safetensors"] == weights
    card = hub.files["README.md"].decode()
    data = header(card)
    assert (data["library_name"], data["tags"]) == ("peft", ["liger", "lora", "sft"])
    report = json.loads((run_dir / "report.json").read_text())
    assert f"| last loss | {report['train']['final_loss']:.4f} |" in card
    assert f"{report['eval']['perplexity']:.2f}" in card
    # Neither the folders of this machine nor the login.
    assert str(run_dir.parent) not in card
    assert "hf_secret" not in card
    assert "data.jsonl" in card

    shown = liger("push", run_dir, "org/other", "--dry-run")
    assert shown.code == 0
    assert len(hub.created) == 1
    for name, content in hub.files.items():
        assert name in shown.out, len(content)
    assert f"{len(hub.files)} files" in shown.out
    assert "private if it is new" in shown.out
    # The base model of random weights is a folder of the run.
    assert "a folder of this machine" in shown.err

    found = liger("push", checkpoint, "mine", "--public", "-m", "first try", "--json")
    assert found.code == 0
    assert hub.created[-1] == {"repo_id": "mine", "private": False, "exist_ok": True}
    assert hub.messages[-1] == "first try"
    values = found.json()
    assert values["url"] == "https://huggingface.co/me/mine"
    assert values["files"]["adapter_model.safetensors"] == len(weights)

    # A checkpoint that is named is checked as those of a run are.
    damaged = shutil.copytree(checkpoint, run_dir.parent / "damaged")
    with (damaged / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    out = liger("push", damaged, "org/tiny", "--dry-run")
    assert out.code == 4
    assert "adapter_model.safetensors has 100 bytes" in " ".join(out.err.split())
    assert "a copy without manifest.json" in " ".join(out.err.split())

    # A run that has not ended, written by a version that had another key.
    (run_dir / "report.json").unlink()
    with (run_dir / "config.yaml").open("a") as file:
        file.write("key_of_old: 1\n")
    assert liger("push", run_dir, "org/tiny").code == 0
    assert "| last loss |" in hub.files["README.md"].decode()


def test_a_push_that_fails_leaves_the_run_and_names_the_command(train, run_dir, hub):
    hub.error = ConnectionError("no route to the hub")
    out = train("--push-to-hub", "--max-steps", 1)
    assert out.code == 3
    text = " ".join(out.err.split())
    assert "run was not pushed: no route to the hub" in text
    assert f"liger push {run_dir} run" in text
    assert json.loads((run_dir / "report.json").read_text())["train"]["steps"] == 1
    assert (run_dir / "checkpoint-1" / "model.safetensors").is_file()
    # Asked again, the finished run is pushed.
    hub.error = None
    assert train("--push-to-hub", "--max-steps", 1, "--resume", "auto").code == 0
    assert hub.created[0]["repo_id"] == "run"
    assert "model.safetensors" in hub.files


@pytest.mark.parametrize("case", ["login", "offline", "name"])
def test_a_push_that_cannot_succeed_ends_before_training(case, train, run_dir, hub, monkeypatch):
    words = ["--push-to-hub", "--hub-model-id", "a/b/c" if case == "name" else "org/tiny"]
    if case == "login":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    if case == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    out = train(*words)
    expected = {"login": "hf auth login", "offline": "HF_HUB_OFFLINE", "name": "'a/b/c' cannot be"}
    assert expected[case] in " ".join(out.err.split())
    assert out.code == (2 if case == "name" else 3)
    assert not (run_dir / "metrics.jsonl").exists()
    assert hub.created == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--hub-model-id", "org/tiny"), "hub_model_id is for push_to_hub"),
        (("--no-hub-private-repo",), "hub_private_repo is for push_to_hub"),
        (
            ("--push-to-hub", "--save-consolidated", "none"),
            "push_to_hub needs the safetensors of the last checkpoint",
        ),
    ],
)
def test_keys_that_do_not_go_together(words, text, train):
    out = train(*words)
    assert out.code == 2
    assert text in " ".join(out.err.split())


def test_other_directories(liger, tmp_path, hub):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    out = liger("push", empty, "org/tiny")
    assert out.code == 2
    assert "holds no weights that other programs load" in " ".join(out.err.split())
    assert liger("push", tmp_path / "nowhere", "org/tiny").code == 2
    # A name that the hub does not take is an error without a network too.
    out = liger("push", empty, "a name", "--dry-run")
    assert out.code == 2
    assert "'a name' cannot be a repository of the hub" in " ".join(out.err.split())
    # A merged model with a card of the user's own.
    merged = tmp_path / "merged"
    merged.mkdir()
    for name in ("config.json", "model.safetensors"):
        (merged / name).write_text("{}")
    (merged / "README.md").write_text("# Mine\n")
    assert liger("push", merged, "org/tiny").code == 0
    assert hub.files["README.md"] == b"# Mine\n"
    (merged / "README.md").unlink()
    assert liger("push", merged, "org/tiny").code == 0
    assert header(hub.files["README.md"].decode())["library_name"] == "transformers"


def test_the_card_links_names_of_the_hub_alone(tmp_path):
    report = RunReport(
        command="train",
        config={
            "model": "org/base",
            "dataset": f"trl-lib/pairs,{tmp_path}/secret/rows.jsonl",
            "objective": "dpo",
            "learning_rate": 3e-5,
            "chat_template": "/home/me/template.jinja",
        },
    )
    card = model_card("org/new", SavedReport(report), is_adapter=False)
    data = header(card)
    assert data["base_model"] == "org/base"
    assert data["datasets"] == ["trl-lib/pairs"]
    assert data["tags"] == ["dpo", "liger"]
    assert "# new" in card
    assert "`rows.jsonl`" in card
    assert "secret" not in card
    assert "/home/me" not in card
    assert "learning_rate" in card
    assert SimpleNamespace(**data).pipeline_tag == "text-generation"
