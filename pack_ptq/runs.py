"""The run folder: what is in it, atomic writes, and the check that it belongs to the same run."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from pack_ptq.cache import CACHE_FILE
from pack_ptq.errors import UserError, refuse

TEMPORARY = ".partial-"
TENSORBOARD = "tensorboard"


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, even if the process is killed.

    Raises:
        UserError: The file cannot be written, as on a full disk; nothing is left behind.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        with name.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        if name is not None:
            name.unlink(missing_ok=True)
        raise UserError(
            f"run_dir: {path} cannot be written: {error.strerror}; allowed: a writable folder with room"
        ) from error


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class RunFolder:
    """Typed paths into a run folder.

    Args:
        path: The folder; made on the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.identity = self.path / "identity.json"
        self.plan = self.path / "plan.json"
        self.network = self.path / "network.pt"
        self.calibration = self.path / "calibration.pt"
        self.norms = self.path / "norms.pt"
        self.tuned = self.path / "tuned.pt"
        self.measured = self.path / "measured.json"
        self.report = self.path / "report.json"

    def pack(self, index: int) -> Path:
        """Where the codes of a unit lie, counted from the stem on."""
        return self.path / "packs" / f"{index:03d}.pt"

    def claim(self, identity: dict[str, Any]) -> None:
        """Make the folder this run's, or check that it already is, and clear what a killed run left half-written.

        Args:
            identity: The configuration under `config`, and digests under `model` and `data`.

        Raises:
            UserError: The folder belongs to another run; the message names the keys that differ.
        """
        identity = json.loads(json.dumps(identity))
        if self.path.exists() and not self.path.is_dir():
            raise refuse("run_dir", str(self.path), "a folder")
        if self.identity.exists():
            self._compare(json.loads(self.identity.read_text()), identity)
        elif self.path.exists() and any(p for p in self.path.iterdir() if not p.name.startswith(TEMPORARY)):
            raise UserError(
                f"run_dir is {str(self.path)!r}, which holds files of something else; allowed: a new or empty folder"
            )
        for pattern in (f"{TEMPORARY}*", f"{CACHE_FILE}*"):
            for left in self.path.rglob(pattern):
                left.unlink(missing_ok=True)
        # The identity comes first: a folder without it is nobody's, and a run killed in between is still known.
        if not self.identity.exists():
            self.write_json(self.identity, identity)
        if not self.config.exists():
            atomic_write(self.config, yaml.safe_dump(identity["config"], sort_keys=False).encode())

    def release(self) -> None:
        """Give the folder up if nothing has been decided in it, so that mended settings may claim it."""
        if not self.plan.exists():
            for file in (self.identity, self.config, self.measured):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.path / TENSORBOARD, ignore_errors=True)

    def _compare(self, there: dict[str, Any], now: dict[str, Any]) -> None:
        old, new = flatten(there["config"]), flatten(now["config"])
        differ = [f"{k} ({old.get(k)!r} there, {new.get(k)!r} now)" for k in {**old, **new} if old.get(k) != new.get(k)]
        differ += [
            f"{what} (other {of})"
            for what, of in (("model", "weights"), ("data", "samples"))
            if there[what] != now[what]
        ]
        if differ:
            raise UserError(
                f"run_dir is {str(self.path)!r}, a folder of another run: {', '.join(differ)}; "
                "allowed: the same settings, to resume it, or another run_dir"
            )

    @staticmethod
    def write_json(path: Path, content: Any) -> None:
        """Write JSON atomically."""
        atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())

    @staticmethod
    def write_tensors(path: Path, content: Any) -> None:
        """Write tensors and plain values atomically; they load with `weights_only=True`."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        atomic_write(path, buffer.getvalue())

    @staticmethod
    def read_tensors(path: Path) -> Any:
        """Read what `write_tensors` wrote."""
        return torch.load(path, map_location="cpu", weights_only=True)
