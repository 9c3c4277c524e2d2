"""The sums from which closed-form routers are solved, in a file stored with the mixture. With it,
experts can be added and dropped exactly, without any expert's text.

router_statistics.safetensors holds, for each mixture layer, `layers.LAYER.gram` [experts, D (D + 1)
/ 2], the sum of x x^T over an expert's tokens, as the rows of the upper triangle;
`layers.LAYER.total` [experts, D], the sum of x; and `layers.LAYER.count` [experts], the number of
tokens; all float64. Its metadata describe the source (`About`), and contain the sha256 of the
tensors' bytes.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from btx_jax.checkpoints.safetensors_files import SafetensorsFile
from btx_jax.checkpoints.training_state import DIRECTORY
from btx_jax.config.ridge import RidgeConfig
from btx_jax.config.schema import from_dict
from btx_jax.errors import UserError

FILE = "router_statistics.safetensors"
FORMAT = "btx_jax router statistics 1"
_PARTS = ("gram", "total", "count")
LATER = "0" * 64  # placeholder for a sha256 that is not yet known


@dataclasses.dataclass(frozen=True)
class Expert:
    """The expert that sums belong to. name: of its model. digest: of its feed-forwards in all
    layers (`base_digest`)."""

    name: str
    digest: str = LATER


@dataclasses.dataclass(frozen=True)
class About:
    """What the statistics were computed from.

    layers: the mixture layers. width: of the model. tokenizer: its sha256. base: digest of the
    parameters before a router that belong to no single expert. ridge: settings of the regression.
    tokens: limit of tokens read from each text.
    """

    experts: tuple[Expert, ...]
    layers: tuple[int, ...]
    width: int
    tokenizer: str
    ridge: RidgeConfig
    tokens: int
    base: str = LATER

    def differences(self, other: "About") -> list[str]:
        """Reasons why the sums of two files cannot be combined."""
        told = {
            "width": "a different width",
            "layers": "mixtures in different layers",
            "tokenizer": "a different tokenizer",
            "base": "different weights outside the experts",
        }
        return [what for key, what in told.items() if getattr(self, key) != getattr(other, key)]


class Writer:
    """Writes statistics into a seekable file layer by layer, so that only one layer is in
    memory."""

    def __init__(self, file: BinaryIO, about: About):
        self._file, self._about = file, about
        self._pending = list(about.layers)
        self._sum = hashlib.sha256()
        file.write(_header(about, LATER))

    def write(
        self, layer: int, gram_EDD: np.ndarray, total_ED: np.ndarray, count_E: np.ndarray
    ) -> None:
        """Write the sums of a layer, in the order of `about.layers`."""
        assert (layer, len(gram_EDD)) == (self._pending.pop(0), len(self._about.experts))
        for gram_DD in gram_EDD:
            for i, row in enumerate(gram_DD):
                self._put(row[i:])
        self._put(total_ED)
        self._put(count_E)

    def _put(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, "<f8").data
        self._sum.update(data)
        self._file.write(data)

    def finish(self, base: str, experts: Sequence[str]) -> None:
        """Write the digests, which are known only after everything has been read, and rewind the
        file."""
        named = [expert.name for expert in self._about.experts]
        about = dataclasses.replace(
            self._about, base=base, experts=tuple(map(Expert, named, experts))
        )
        self._file.seek(0)
        self._file.write(_header(about, self._sum.hexdigest()))
        self._file.seek(0)


class RouterStatistics:
    """A statistics file, validated. Raises UserError when it is damaged or has another format."""

    def __init__(self, path: Path):
        self.path = path
        self._file = SafetensorsFile(path)
        told = self._file.metadata
        if told.get("format") != FORMAT:
            raise UserError(
                f"{path}: not router statistics that this version can read; make them again"
            )
        try:
            self.about = _about(json.loads(told["about"]))
        except (ValueError, LookupError, TypeError, RecursionError, UserError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        shapes = {name: list(tensor.shape) for name, tensor in self._file.tensors.items()}
        kinds = {tensor.dtype for tensor in self._file.tensors.values()}
        if shapes != _shapes(self.about) or kinds != {"F64"}:
            raise UserError(f"{path} is damaged: its tensors do not match its metadata")
        if self._file.sha256() != told.get("sha256"):
            raise UserError(f"{path} is damaged (checksum); download or make it again")

    def read(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums of one layer: gram [E, D, D], total [E, D] and count [E], as `Writer.write` takes
        them. Raises UserError for impossible values."""
        packed, total_ED, count_E = (self._file.read(f"layers.{layer}.{part}") for part in _PARTS)
        width = self.about.width
        gram_EDD = np.empty((len(packed), width, width))
        upper = np.triu_indices(width)
        for gram_DD, row in zip(gram_EDD, packed, strict=True):
            gram_DD[upper] = row
            gram_DD.T[upper] = row
        finite = np.isfinite(gram_EDD).all() and np.isfinite(total_ED).all()
        if not finite or not (np.isfinite(count_E) & (count_E >= 1)).all():
            raise UserError(f"{self.path}: NaN, infinity or no token in layer {layer}")
        return gram_EDD, total_ED, count_E


def find_statistics(checkpoint: Path) -> RouterStatistics | None:
    """The statistics stored with a checkpoint, or in the directory of its run; None if there are
    none."""
    places = [checkpoint]
    if checkpoint.parent.name == DIRECTORY:
        places.append(checkpoint.parent.parent)
    found = [place / FILE for place in places if (place / FILE).exists()]
    return RouterStatistics(found[0]) if found else None


def _about(values: dict[str, Any]) -> About:
    if (tokens := int(values["tokens"])) <= 0:
        raise ValueError(f"tokens={tokens}")
    return About(
        experts=tuple(Expert(str(e["name"]), str(e["digest"])) for e in values["experts"]),
        layers=tuple(int(layer) for layer in values["layers"]),
        width=int(values["width"]),
        tokenizer=str(values["tokenizer"]),
        ridge=from_dict(RidgeConfig, values["ridge"], "ridge"),
        tokens=tokens,
        base=str(values["base"]),
    )


def _shapes(about: About) -> dict[str, list[int]]:
    """Shapes of all tensors, in order."""
    experts, width = len(about.experts), about.width
    of_part = {"gram": [experts, width * (width + 1) // 2], "total": [experts, width]}
    of_part["count"] = [experts]
    return {f"layers.{layer}.{part}": of_part[part] for layer in about.layers for part in _PARTS}


def _header(about: About, sha256: str) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "about": json.dumps(dataclasses.asdict(about)),
            "sha256": sha256,
        }
    }
    end = 0
    for name, shape in _shapes(about).items():
        begin, end = end, end + 8 * math.prod(shape)
        header[name] = {"dtype": "F64", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text
