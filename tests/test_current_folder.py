"""Modules beside the user are found, whatever the script that started Python left on the path."""

import importlib
import sys

from pack_ptq.current_folder import make_importable


def test_a_module_beside_the_user_is_found(tmp_path, monkeypatch):
    (tmp_path / "beside_the_user.py").write_text("answer = 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    make_importable()
    assert importlib.import_module("beside_the_user").answer == 42
    before = list(sys.path)
    make_importable()
    assert sys.path == before
