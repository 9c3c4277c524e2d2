"""The rows that Hugging Face's datasets reads from the files of `file_kinds`, for `test_files.py`.

    python -m tests.data.datasets_peer > tests/data/golden/datasets.json

Made with datasets 5.2.0 and pandas 3.1.1. Not run by the tests.
"""

import json
import sys
import tempfile
from pathlib import Path

import datasets

from tests.data.file_kinds import FILES

LOADERS = {"csv": "csv", "tsv": "csv", "parquet": "parquet", "txt": "text"}


def read(file: Path) -> list | str:
    """The rows of a file, or the reason why there are none."""
    endings = [ending for ending in file.name.split(".")[1:] if ending not in ("gz", "bz2", "zst")]
    loader = LOADERS.get(endings[0], "json")
    options = {"tsv": {"sep": "\t"}, "txt": {"sample_by": "document"}}.get(endings[0], {})
    try:
        return datasets.load_dataset(
            loader, data_files=str(file), split="train", cache_dir=str(file) + "-cache", **options
        ).to_list()
    except Exception as error:
        return f"{type(error).__name__}: {str(error.__cause__ or error).splitlines()[0]}"


if __name__ == "__main__":
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, content in FILES.items():
            file = Path(folder) / name
            file.write_bytes(content)
            found[name] = read(file)
    json.dump(found, sys.stdout, indent=1)
