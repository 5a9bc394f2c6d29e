"""The examples of docs/fsspec.md run as they are, but for the id and the repository."""

import re
from pathlib import Path

from replicated.fsspec_files import ReplicateFileSystem

GUIDE = Path(__file__).parents[2] / "docs/fsspec.md"


def test_the_examples_of_the_guide_run(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_REPOSITORY", saved.url)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    text = "\n".join(blocks).replace("3f9c2a1", saved.experiment[:7]).replace("s3://lab/models", saved.url)
    found = {}
    exec(compile(text, str(GUIDE), "exec"), found)
    assert len(blocks) >= 6
    assert len(found["table"]) == 60_000 and len(found["parts"]) == 120_000
    assert found["some"].num_rows == 60_000 and found["total"] == 2 * sum(range(60_000))
    assert found["header_bytes"] > 50 and [len(head) for head in found["heads"]] == [100, 100]
    assert len(found["names"]) == 6 and len(list((tmp_path / "parts").rglob("*.parquet"))) == 6
    assert found["path"] == f"{saved.checkpoints[0]}/data" and len(found["files"]) > 6


def test_every_option_is_in_the_guide():
    options = re.findall(r"^\| `([a-z_]+)` \|", GUIDE.read_text(), re.MULTILINE)
    code = ReplicateFileSystem.__init__.__code__
    names = set(code.co_varnames[1 : code.co_argcount])
    assert names == set(options)
