"""tools/ablate.py: its questions, and the comparison of arms."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lowmem.errors import LowmemError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import ablate  # noqa: E402
from paired import Arm, compared, draw, in_words  # noqa: E402


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("question = 1", "question"),
        ('question = "a"\nbase = "quickstart"\nfield = "seed"', "field and values"),
        ('question = "a"\nbase = "quickstart"\nfield = "seed"\nvalues = [1]', "at least two"),
        ("nonsense", "TOML"),
    ],
)
def test_a_bad_question_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "q.toml").write_text(text)
    with pytest.raises(LowmemError, match=told):
        ablate.read_question(tmp_path / "q.toml")


def test_every_shipped_question_has_valid_recipes() -> None:
    names = [path for path in ablate.QUESTIONS.rglob("*.toml") if path.stem != "small"]
    assert len(names) == 6
    for path in names:
        question = ablate.read_question(path)
        found = ablate.trials(question, ablate.base_recipe(path, question.base), 2, Path("runs"))
        assert len({trial.folder for trial in found}) == len(found) >= 4
    with pytest.raises(LowmemError, match="demo/cardinality"):
        ablate.question_file("nothing")


def test_the_comparison_is_scipys_paired_test(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a = random.normal(0.8, 0.05, 6)
    b = a + random.normal(0.03, 0.005, 6)
    item = compared([Arm("a", tuple(a)), Arm("b", tuple(b))])[0]
    assert item.p == pytest.approx(stats.ttest_1samp(b - a, 0).pvalue) and item.low > 0 and item.verdict() == "higher"
    unpaired = stats.ttest_ind(b, a).pvalue
    assert unpaired > 10 * item.p, "pairing by seed is what finds it"
    assert "n = 6" in in_words(item)
    one = compared([Arm("a", (0.5,)), Arm("b", (0.6,))])[0]
    assert one.low is None and "tells nothing" in in_words(one)
    assert compared([Arm("a", (0.5, 0.6)), Arm("b", (0.5, 0.6))])[0].verdict() == "no difference shown"
    draw("q", "accuracy", [Arm("a", (0.5,)), Arm("b", (0.6,))], tmp_path / "one.png")
