"""The table of benchmarks/distillation.py: gains are paired, question by question and seed by seed."""

import pytest

from benchmarks.distillation import table


def run(seed, *hits):
    return {"seed": seed, "hits": [bool(hit) for hit in hits], "right": sum(hits) / len(hits), "n": len(hits),
            "loss": 0.5, "divergence": 0.25, "seconds": 60.0}


def test_a_row_for_each_way():
    pytest.importorskip("pandas")
    text = table({("sft", 0.01): [run(1, 0, 0, 1, 1), run(2, 0, 1, 1, 1)],
                  ("forward_kl", 0.01): [run(1, 0, 1, 1, 1), run(2, 1, 1, 1, 0)],
                  ("forward_kl", 0.02): [run(1, 0, 0, 0, 0)]})
    lines = text.splitlines()
    assert len(lines) == 2 + 3 and "0.500 0.750 | 0.625 |  |" in lines[2]
    # Differences: 0 1 0 0 and 1 0 0 -1: a mean of 1/8, a variance of 3/8 - 1/64
    assert "| 0.750 0.750 | 0.750 | +12.5 ± 41.5 |" in lines[3]
    assert "| 0.000 | 0.000 |  |" in lines[4]  # no SFT at this rate to compare with
