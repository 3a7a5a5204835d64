"""Golden losses: 50 steps of three small recipes, compared to the last bit (see tools/make_golden.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOL, FOLDER = ROOT / "tools" / "make_golden.py", ROOT / "tests" / "golden"
PYTHONPATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_the_losses_are_the_golden_ones() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--check"], capture_output=True, text=True, env=os.environ | PYTHONPATH, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The losses are the golden ones." in done.stdout


def test_a_changed_loss_would_be_noticed() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import make_golden

    golden = json.loads((FOLDER / "resnet.json").read_text())
    losses = list(golden["losses"])
    assert (
        len(losses) == 50 and len(set(losses)) == 50 and make_golden.compared(golden, golden["versions"], losses) == []
    )
    value = float.fromhex(losses[7])
    losses[7] = (value + 2**-24).hex()
    told = make_golden.compared(golden, golden["versions"], losses)
    assert len(told) == 1 and "the first at step 7" in told[0]
    on_another_processor = golden["versions"] | {"processor": "another", "torch": "2.14.1"}
    assert make_golden.compared(golden, on_another_processor, losses) == told
    elsewhere = golden["versions"] | {"torch": "0"}
    assert make_golden.compared(golden, elsewhere, losses) == []
    losses[7] = (value + 0.01).hex()
    assert make_golden.compared(golden, elsewhere, losses) != []
