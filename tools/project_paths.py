"""To import this lets the commands of this folder import the recipes, and the equipment of the tests.

Ctrl-C ends what they import next at once, see `engine.start`.
"""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("recipes", "tests")]

import engine  # noqa: F401 (here, because tyro takes a moment)
