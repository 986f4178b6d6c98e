"""`import rdp` is light: it brings in nothing but torch and the standard library."""

import subprocess
import sys

PROGRAM = """
import sys, torch
before = set(sys.modules)
import rdp
new = {name.split('.')[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {'torch'}))
print(sorted(name for name in sys.modules if name.startswith(('rdp.analysis', 'rdp.tensorboard', 'torch._dynamo'))))
"""


def test_import_brings_in_nothing_but_torch():
    shown = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    assert shown.splitlines() == ["['rdp']", "[]"]
