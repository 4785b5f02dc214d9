"""What is in `examples/` at toy size, and what the figure of tokens shows."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """A script as a module, from its folder and name."""

    def load(folder, name):
        monkeypatch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module(name)

    return load


@pytest.mark.slow
def test_a_decoder_learns(script, capsys):
    """Without knowing anything, the loss is log(100), 4.6."""
    decoder = script("examples", "decoder")
    decoder.main(decoder.Options(width=32, context=16, batch=8, steps=120, tangents=8, rate=0.01))
    found = re.findall(r"(.*): ([\d.]+) nats a character", capsys.readouterr().out)
    assert [name for name, _ in found] == [
        "backpropagation",
        "backpropagation, greedy losses",
        "activity perturbation, greedy losses",
    ]
    assert all(float(loss) < 3.7 for _, loss in found)


@pytest.mark.parametrize("greedy", [False, True])
def test_who_hears_a_perturbation(script, greedy):
    """The figure's shades: one's own loss where a token is kept, and else all later ones too."""
    figure = script("benchmarks", "tokens_figure")
    count = 0
    measured, said = figure.heard(greedy), figure.kept(greedy)
    for block, of_block in zip(measured, said, strict=True):
        for kind, keeps in of_block.items():
            heard = block[kind] > 1e-6 * block[kind].max()
            later = np.tri(len(heard), k=-1, dtype=bool)
            # But for the first token's attention, which has nothing to choose from.
            first = 1 if kind in ("query", "key") else 0
            assert np.diag(heard)[first:].all(), kind
            assert not heard[~later & ~np.eye(len(heard), dtype=bool)].any(), kind
            expected = np.zeros_like(later) if keeps else later
            np.testing.assert_array_equal(
                heard[first:, first:] & later[first:, first:],
                expected[first:, first:],
                err_msg=kind,
            )
            count += keeps
    assert count == (8 if greedy else 4)


def test_the_figure_is_drawn(script, tmp_path):
    figure = script("benchmarks", "tokens_figure")
    figure.main(figure.Options(out=tmp_path / "tokens.png"))
    assert (tmp_path / "tokens.png").stat().st_size > 5000
