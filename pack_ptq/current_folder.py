"""Classes of the user's own, in the folder where a program was started."""

import os
import sys


def make_importable() -> None:
    """Let modules of the current folder be imported.

    The console script does not put the folder on the path, unlike `python file.py`.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
