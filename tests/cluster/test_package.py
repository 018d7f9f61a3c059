"""What a submission would send: counted as Ray does it, and refused before anything is sent."""

import zipfile
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package

from cluster.errors import ConfigError
from cluster.package import digest, shipment

ROOT = Path(__file__).parents[2]


def tree(root: Path, files: dict[str, str | int]) -> Path:
    """Files with a text, or of so many bytes that take no room on the disk."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            with path.open("wb") as file:
                file.truncate(content)
        else:
            path.write_text(content)
    return root


def zipped(root: Path, target: Path) -> set[str]:
    """What Ray itself puts into its package."""
    create_package(str(root), target, include_gitignore=True, excludes=ray_constants.get_runtime_env_default_excludes())
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def test_it_counts_what_ray_sends(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "work",
        {
            "train.py": "print()",
            "data/rows.jsonl": "{}",
            "pkg/deep/data/kept.txt": "kept, for the line is anchored",
            "pkg/notes.log": "ignored below",
            "pkg/.gitignore": "*.log",
            ".gitignore": "/data/\n",
            ".rayignore": "/tests/",
            "tests/test_a.py": "",
            ".venv/lib/large.so": 10,
            ".git/index": "",
            "link.txt": "x",
        },
    )
    (root / "linked").symlink_to(root / "link.txt")
    found = shipment(root)
    assert {str(path) for path in found.files} == zipped(root, tmp_path / "package.zip")
    assert "pkg/deep/data/kept.txt" in {str(path) for path in found.files}
    assert found.bytes == sum((root / path).stat().st_size for path in found.files)


def test_this_project_can_be_sent(tmp_path: Path) -> None:
    found = shipment(ROOT)
    found.check(["configs/recipes/quickstart-base.yaml"])
    assert {str(path) for path in found.files} == zipped(ROOT, tmp_path / "package.zip")


def test_a_tree_that_is_too_large_is_refused_with_what_makes_it_so(tmp_path: Path) -> None:
    files: dict[str, str | int] = {f"src/file-{number}.py": 1000 for number in range(3000)}
    root = tree(tmp_path, {**files, "runs/old/model.safetensors": 500_000_000, "corpus.txt": 30_000_000})
    with pytest.raises(ConfigError) as error:
        shipment(root).check()
    message = str(error.value)
    assert "533.0 MB would be sent" in message
    assert "largest: runs/ 500.0 MB, corpus.txt 30.0 MB, src/ 3.0 MB" in message
    assert ".rayignore" in message
    (root / ".rayignore").write_text("/runs/\n")
    shipment(root).check()


@pytest.mark.parametrize("name", [".env", "deploy/.env.production", "keys/host.pem", "id_rsa", ".aws/credentials"])
def test_files_that_are_secrets_are_not_sent(name: str, tmp_path: Path) -> None:
    root = tree(tmp_path, {name: "AWS_SECRET_ACCESS_KEY=x", "train.py": ""})
    with pytest.raises(ConfigError, match=r"looks like a secret.*\.rayignore"):
        shipment(root).check()
    (root / ".rayignore").write_text(f"/{name}\n")
    shipment(root).check()


@pytest.mark.parametrize("needed", ["ignored/rows.jsonl", "missing.yaml", "../outside.yaml"])
def test_what_the_job_reads_must_be_sent_along(needed: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "work", {"ignored/rows.jsonl": "{}", ".rayignore": "/ignored/", "a/recipe.yaml": ""})
    with pytest.raises(ConfigError, match="is not sent along"):
        shipment(root).check([needed])
    shipment(root).check(["a/recipe.yaml", "./a/../a/recipe.yaml", "store:rows.jsonl", "s3://b/rows", "/mnt/rows"])


def test_a_digest_is_of_what_is_sent_and_nothing_else(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train.py": "1", ".rayignore": "/notes/", "notes/a": "1"})
    before = digest(root)
    tree(root, {"notes/a": "2"})
    assert digest(root) == before
    tree(root, {"train.py": "2"})
    assert digest(root) != before


KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", KEY),
        ("deploy", KEY.replace("OPENSSH", "RSA")),
        ("account.json", '{"private_key": "-----BEGIN PRIVATE KEY-----\\nMIIE\\n-----END PRIVATE KEY-----"}'),
        ("prod.env", "A=1"),
    ],
)
def test_a_private_key_is_found_whatever_its_file_is_called(tmp_path: Path, name: str, text: str) -> None:
    root = tree(tmp_path, {f"sub/{name}": text, "doc.md": "it begins with -----BEGIN PRIVATE KEY----- and goes on"})
    with pytest.raises(ConfigError, match="1 fault") as refused:
        shipment(root).check()
    assert f"sub/{name}" in str(refused.value)
