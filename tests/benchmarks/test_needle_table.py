"""benchmarks/long_texts.py: its table and its picture say what the results hold."""

from PIL import Image

from benchmarks.long_texts import draw, row


def results(share: float) -> tuple[dict, dict]:
    """A model that finds all needles in 128 and 256 tokens and this share in 512; its perplexity rises."""
    answers = [{"length": length, "right": length < 512 or number < 10 * share}
               for length in (128, 256, 512) for number in range(10)]
    found = {"512": {"0.0": share, "0.5": share, "1.0": share}}
    return {"found": found, "answers": answers}, {"perplexity": [[16 * n, float(n)] for n in range(1, 32)]}


def test_the_table_and_the_picture(tmp_path):
    line = row("both", *results(0.4))
    assert line == {"": "both", "found at 128": "100.0%", "found at 256": "100.0%", "found at 512": "40.0%",
                    "perplexity at 120": "7.00", "perplexity at 250": "16.00", "perplexity at 500": "31.00"}
    draw({name: results(0.4) for name in ("neither", "YaRN", "steps", "both")}, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 800
