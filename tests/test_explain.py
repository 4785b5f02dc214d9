import jax
import jax.numpy as jnp
import pytest

import forwardgrad as fg

X = jnp.ones((8, 5, 3))
W = {
    "first": jnp.ones((3, 4)),
    "keys": jnp.ones((4, 4)),
    "table": jnp.ones((9, 4)),
    "scale": jnp.ones(4),
    "last": jnp.ones((4, 2)),
    "unused": jnp.ones((2, 2)),
}


def decoder(w, x):
    """A query, keys that all later tokens read, and a loss for each token."""
    h = jnp.tanh(x @ w["first"]) * w["scale"] + w["table"][:5]
    scores = jnp.where(jnp.tril(jnp.ones((5, 5))) > 0, h @ jnp.swapaxes(h @ w["keys"], 1, 2), -9)
    h = h + jax.nn.softmax(scores) @ h
    return fg.Losses([jnp.mean((h @ w["last"]) ** 2, axis=2)], [("example", "token")])


def rows(estimator):
    return {row.path[2:-2]: row for row in fg.explain(decoder, estimator, W, X).rows}


def test_weight_perturbation():
    found = rows(fg.WeightPerturbation(exact_last=True))
    how = {name: row.how for name, row in found.items()}
    assert how == {
        "first": "rank-one",
        "keys": "rank-one",
        "table": "dense",
        "scale": "dense",
        "last": "exact",
        "unused": "none",
    }
    assert found["first"].where == ()
    assert len(found["scale"].where) == 1
    assert found["scale"].where[0].startswith("mul at ")
    assert "test_explain.py" in found["scale"].where[0]
    assert found["first"].terms == (0,)
    assert found["unused"].terms == ()


@pytest.mark.parametrize("product", ["bgi,gio->bgo", "bgi,goi->gbo", "gbi,gio->bo"])
def test_weights_of_groups_need_no_tangents_as_arrays(product):
    """A group is an axis of both operands: a factor that spans it is no whole tangent."""
    x = jnp.ones((4, 4, 4))

    def loss(w):
        return jnp.sum(jnp.tanh(jnp.einsum(product, x, w)))

    (row,) = fg.explain(loss, fg.WeightPerturbation(), jnp.ones((4, 4, 4))).rows
    assert (row.how, row.where) == ("rank-one", ())


def test_activity_perturbation_tells_the_axes_of_the_layers():
    found = rows(fg.ActivityPerturbation())
    assert found["first"].how == "activation"
    assert found["last"].how == "exact"
    assert found["first"].axes == ("example: axis 0", "token: mixed")
    assert found["keys"].axes == ("example: axis 0", "token: mixed")


@pytest.mark.parametrize("estimator", [fg.FeedbackAlignment(), fg.DirectFeedbackAlignment()])
def test_feedback(estimator):
    how = {name: row.how for name, row in rows(estimator).items()}
    assert how["first"] == how["keys"] == "feedback"
    assert how["last"] == "exact"
    assert how["unused"] == "none"


def test_backpropagation_is_exact():
    assert {row.how for row in rows(fg.Backpropagation()).values()} == {"exact", "none"}


def test_it_computes_nothing_and_takes_shapes():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (W, X))

    def refuse(*_):
        raise AssertionError("evaluated")

    def fun(w, x):
        jax.debug.callback(refuse, x[0, 0, 0])
        return decoder(w, x)

    found = fg.explain(fun, fg.WeightPerturbation(), *shapes)
    assert len(found.rows) == len(W)


def test_printed_it_is_a_table():
    text = str(fg.explain(decoder, fg.ActivityPerturbation(), W, X))
    head, columns, *lines = text.split("\n")
    assert head == "ActivityPerturbation()"
    assert columns.split() == ["parameter", "shape", "gradient", "axes", "terms"]
    assert len(lines) == len(W)
    assert max(map(len, lines)) < 100


def test_an_estimator_that_cannot_be_explained():
    class Own(fg.AbstractEstimator):
        @property
        def needs_key(self):
            return False

        def value_and_grad(self, fun, params, key):
            raise NotImplementedError

    with pytest.raises(fg.InputError, match="estimator must be one that can be explained"):
        fg.explain(decoder, Own(), W, X)
