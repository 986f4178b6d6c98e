"""To import this lets the commands of this folder import the recipes, and the equipment of the tests."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("recipes", "tests")]
