"""What is in `examples/` at toy size, and what the figure of tokens shows."""

import importlib
import json
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
    sizes = {"width": 32, "context": 16, "batch": 8, "steps": 120, "tangents": 8}
    decoder.main(decoder.Options(**sizes, rate=0.01, noisy_rate=0.01))
    found = re.findall(r"(.*): ([\d.]+) nats a character", capsys.readouterr().out)
    assert [name for name, _ in found] == [
        "backpropagation",
        "backpropagation, greedy losses",
        "activity perturbation, greedy losses",
    ]
    assert all(float(loss) < 3.7 for _, loss in found)


@pytest.mark.slow
def test_a_recurrence_is_trained_online(script, tmp_path, capsys):
    """Every method ends with a loss, and the memory is that of a step only where tangents go on."""
    online = script("examples", "online")
    out = tmp_path / "online.json"
    options = online.Options(
        length=8, units=4, batch=4, updates=3, tangents=(2,), rates=(0.01,), seeds=2, out=out
    )
    online.main(options)
    assert "delayed xor" in capsys.readouterr().out
    stored = json.loads(out.read_text())
    assert stored["length"] == 8
    results = stored["results"]
    assert set(results) == {*online.methods(options)}
    for name, found in results.items():
        assert all(0.5 < loss < 2 for loss in found["losses"])
        grown = found["bytes, 16 times as long"] / found["bytes"]
        if "online" in name:
            assert grown < 1.5, name
    whole = results["backpropagation, all steps"]
    assert whole["bytes, 16 times as long"] > 3 * whole["bytes"]
    assert results["backpropagation, all steps"]["cosine"] == pytest.approx(1, abs=1e-5)


def test_the_answers_are_those_of_earlier_bits(script):
    online = script("examples", "online")
    options = online.Options(length=12, batch=3)
    bits, answers = map(np.asarray, online.sequences(options, online.jax.random.key(0)))
    np.testing.assert_array_equal(answers[5:], bits[3:-2] ^ bits[:-5])
    assert 0 < answers.mean() < 1


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
