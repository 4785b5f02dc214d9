"""Models of other people's libraries: `MODELS[name].make() -> (losses, params, args)`.

`losses(params, *args)` is one loss for each example where there are examples, else a scalar. All
weights are random, and all sizes small: a model is here for what its program is made of.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, and the distribution that it comes from."""

    package: str
    make: Callable[[], tuple[Callable[..., jax.Array], Any, tuple]]


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _labels(seed, classes, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 0, classes)


def _cross_entropy(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses, axis=range(1, losses.ndim))


def _of_images(network, inference):
    """Cross-entropy of an Equinox network on eight images of 32 x 32."""
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def losses(params, images, labels):
        network = eqx.combine(params, static)
        return _cross_entropy(jax.vmap(lambda x: network(x, **inference))(images), labels)

    return losses, params, (_normal(1, 8, 3, 32, 32), _labels(2, 10, 8))


def equimo_vit():
    """Two blocks of 64 on patches of 8 x 8."""
    from equimo.models import vit

    network = vit.VisionTransformer(
        32, 3, 64, 8, 4, [2], num_classes=10, reg_tokens=0, key=jax.random.key(0)
    )
    return _of_images(network, {"key": jax.random.key(3), "inference": True})


def equimo_convnext():
    """Four stages of one block."""
    from equimo.models import convnext

    network = convnext.ConvNeXt(
        3, depths=[1, 1, 1, 1], dims=[16, 32, 48, 64], num_classes=10, key=jax.random.key(0)
    )
    return _of_images(network, {"key": jax.random.key(3), "inference": True})


def flax_resnet():
    """ResNet18 with BatchNorm in training mode, the paper's widths divided by four."""
    from jax_resnet.resnet import STAGE_SIZES, ResNet, ResNetBlock

    network = ResNet(
        ResNetBlock, stage_sizes=STAGE_SIZES[18], n_classes=10, hidden_sizes=(16, 32, 64, 128)
    )
    images = _normal(1, 8, 32, 32, 3)
    variables = network.init(jax.random.key(0), images)
    # The library starts the last scale of every block at zero.
    params = jax.tree.map(lambda p: p + 0.1 * _normal(4, *p.shape), variables["params"])

    def losses(params, images, labels):
        variables_ = {**variables, "params": params}
        logits, _ = network.apply(variables_, images, mutable=["batch_stats"])
        return _cross_entropy(logits, labels)

    return losses, params, (images, _labels(2, 10, 8))


def _language_model(apply, params):
    """Cross-entropy of the next token, of `apply(params, tokens)`, on four sequences of 32."""
    tokens = _labels(1, 256, 4, 33)

    def losses(params, inputs, targets):
        return _cross_entropy(apply(params, inputs), targets)

    return losses, params, (tokens[:, :-1], tokens[:, 1:])


def flax_gpt2():
    """Two blocks of 64, with the embedding as the head."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    network = FlaxGPT2LMHeadModel(config, seed=0)
    return _language_model(lambda p, x: network(x, params=p).logits, network.params)


def flax_llama():
    """Two blocks of 64, with two heads for keys and values and the embedding as the head."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    network = FlaxLlamaForCausalLM(config, input_shape=(1, 8), seed=0)
    return _language_model(lambda p, x: network(x, params=p).logits, network.params)


def mamba2():
    """Two blocks of 64, in chunks of 16 tokens."""
    from flax import nnx
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=256,
        hidden_size=64,
        state_size=16,
        head_dim=16,
        chunk_size=16,
        num_hidden_layers=2,
    )
    graph, params, rest = nnx.split(Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    return _language_model(lambda p, x: nnx.merge(graph, p, rest)(x)["logits"], params)


def s5():
    """Two blocks of 32 with a complex diagonal state of 16, a parallel scan over 64 steps."""
    from discretax.models import S5

    model, state = eqx.nn.make_with_state(S5)(
        key=jax.random.key(0), hidden_dim=32, num_blocks=2, state_dim=16, drop_rate=0.0
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    # Equinox refuses a state that was used before.
    of_state, structure = jax.tree.flatten(state)

    def losses(params, x, y):
        def one(x):
            state = structure.unflatten(of_state)
            return eqx.combine(params, static)(x, state, jax.random.key(3))[0]

        # The blocks' BatchNorm knows the axis of the examples by this name.
        out = jax.vmap(one, axis_name="batch")(x)
        return jnp.mean((out - y) ** 2, axis=(1, 2))

    return losses, params, (_normal(1, 8, 64, 32), _normal(2, 8, 64, 32))


def haiku_lstm():
    """An LSTM of 64 over 32 steps."""
    import haiku as hk

    def forward(x):
        core = hk.LSTM(64)
        hidden, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(10)(hidden[-1])

    network = hk.without_apply_rng(hk.transform(forward))
    x = _normal(1, 32, 8, 16)
    params = network.init(jax.random.key(0), x)
    return lambda p, x, y: _cross_entropy(network.apply(p, x), y), params, (x, _labels(2, 10, 8))


def neural_ode(adjoint):
    """A neural ODE, Tsit5 with adaptive steps, differentiated in the way named."""
    import diffrax

    network = eqx.nn.MLP(4, 4, 32, 2, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def losses(params, x, y):
        def solve(x):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, x, args: eqx.combine(args, static)(x)),
                diffrax.Tsit5(),
                0.0,
                1.0,
                0.1,
                x,
                params,
                stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
                adjoint=getattr(diffrax, adjoint)(),
                max_steps=64,
            )
            return solution.ys[0]

        return jnp.mean((jax.vmap(solve)(x) - y) ** 2, axis=1)

    return losses, params, (_normal(1, 8, 4), _normal(2, 8, 4))


def equilibrium(adjoint):
    """A deep equilibrium model: the fixed point of a layer of 32, for each of eight examples."""
    import optimistix as optx

    params = {
        "W": 0.3 * _normal(0, 32, 32) / 32**0.5,
        "U": _normal(1, 16, 32) / 4,
        "b": _normal(2, 32),
    }
    solver = optx.FixedPointIteration(rtol=1e-5, atol=1e-5)

    def losses(params, x, y):
        def solve(x):
            def layer(z, p):
                return jnp.tanh(z @ p["W"] + x @ p["U"] + p["b"])

            return optx.fixed_point(
                layer, solver, jnp.zeros(32), params, adjoint=getattr(optx, adjoint)(), max_steps=64
            ).value

        return jnp.mean((jax.vmap(solve)(x) - y) ** 2, axis=1)

    return losses, params, (_normal(3, 8, 16), _normal(4, 8, 32))


def flow(name, **options):
    """The negative log density of 64 points of four numbers."""
    from flowjax import distributions, flows

    base = distributions.Normal(jnp.zeros(4))
    network = getattr(flows, name)(jax.random.key(0), base_dist=base, **options)
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def losses(params, x):
        from paramax import unwrap

        return -unwrap(eqx.combine(params, static)).log_prob(x)

    return losses, params, (_normal(1, 64, 4),)


def graph_network():
    """Two rounds of messages on a graph of 20 nodes and 60 edges."""
    import jraph

    graph = jraph.GraphsTuple(
        nodes=_normal(1, 20, 16),
        edges=_normal(2, 60, 16),
        senders=_labels(3, 20, 60),
        receivers=_labels(4, 20, 60),
        n_node=jnp.array([20]),
        n_edge=jnp.array([60]),
        globals=_normal(5, 1, 16),
    )
    sizes = {"edges": 4 * 16, "nodes": 4 * 16, "globals": 3 * 16}
    networks = {
        name: eqx.nn.MLP(size, 16, 32, 1, key=jax.random.key(size + i))
        for i, (name, size) in enumerate(sizes.items())
    }
    params, static = eqx.partition(networks, eqx.is_inexact_array)

    def loss(params, graph, y):
        networks = eqx.combine(params, static)

        def update(name):
            return lambda *parts: jax.vmap(networks[name])(jnp.concatenate(parts, axis=-1))

        step = jraph.GraphNetwork(update("edges"), update("nodes"), update("globals"))
        return jnp.mean((step(step(graph)).nodes - y) ** 2)

    return loss, params, (graph, _normal(6, 20, 16))


def nequip():
    """An equivariant potential of eight atoms; the loss has energies and forces."""
    import jraph
    import numpy as np

    precision = jax.config.jax_default_matmul_precision
    from nequip_eqx.model import Nequip

    jax.config.update("jax_default_matmul_precision", precision)  # the package sets it
    network = Nequip(
        jax.random.key(0),
        2,
        lmax=1,
        hidden_size=8,
        n_layers=2,
        radial_mlp_size=16,
        radial_mlp_layers=1,
        avg_n_neighbors=7.0,
    )
    params, static = eqx.partition(network, eqx.is_inexact_array)
    senders, receivers = np.nonzero(~np.eye(8, dtype=bool))
    atoms = jraph.GraphsTuple(
        nodes={"species": jnp.arange(8) % 2, "positions": 1.5 * _normal(1, 8, 3)},
        edges=None,
        senders=jnp.asarray(senders),
        receivers=jnp.asarray(receivers),
        n_node=jnp.array([8]),
        n_edge=jnp.array([len(senders)]),
        globals=None,
    )
    # A second graph, of no atoms, is the padding that the model expects.
    atoms = jax.tree.map(jnp.asarray, jraph.pad_with_graphs(atoms, 9, 57, 2))

    def loss(params, atoms, forces):
        energy, predicted = eqx.combine(params, static)(atoms)
        return energy[0] ** 2 + jnp.mean((predicted - forces) ** 2)

    return loss, params, (atoms, _normal(2, 9, 3))


def pinn():
    """The residual of a Poisson equation, by second derivatives of a network of three layers."""
    network = eqx.nn.MLP(2, "scalar", 32, 3, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def losses(params, x):
        network = eqx.combine(params, static)
        laplacian = jax.vmap(lambda x: jnp.trace(jax.hessian(network)(x)))(x)
        return (laplacian + jnp.sin(x[:, 0]) * jnp.sin(x[:, 1])) ** 2

    return losses, params, (_normal(1, 64, 2),)


def _logistic_regression():
    import numpyro
    from numpyro import distributions as dist

    x, y = _normal(1, 64, 8), _labels(2, 2, 64)

    def model():
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        w = numpyro.sample("w", dist.Normal(0.0, scale).expand([8]).to_event(1))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    return model


def numpyro_density():
    """The potential of a hierarchical logistic regression, in unconstrained coordinates."""
    from numpyro.infer.util import initialize_model

    model = _logistic_regression()
    info = initialize_model(jax.random.key(0), model)
    return info.potential_fn, info.param_info.z, ()


def numpyro_elbo():
    """The same model's evidence bound with a guide of full covariance, at a fixed key."""
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal

    model = _logistic_regression()
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO(num_particles=4))
    state = svi.init(jax.random.key(0))

    def loss(params):
        return Trace_ELBO(num_particles=4).loss(
            jax.random.key(1), svi.constrain_fn(params), model, guide
        )

    return loss, svi.optim.get_params(state.optim_state), ()


def _policy(observations, actions):
    network = eqx.nn.MLP(observations, actions, 32, 1, activation=jnp.tanh, key=jax.random.key(0))
    return eqx.partition(network, eqx.is_inexact_array)


def brax_rollout():
    """A policy that balances an inverted pendulum for eight steps, simulated with springs."""
    from brax import envs

    env = envs.get_environment("inverted_pendulum", backend="spring")
    start = jax.jit(env.reset)(jax.random.key(1))
    params, static = _policy(env.observation_size, env.action_size)

    def loss(params, state):
        def step(state, _):
            state = env.step(state, eqx.combine(params, static)(state.obs))
            return state, jnp.sum(state.obs**2)

        return jnp.mean(jax.lax.scan(step, state, length=8)[1])

    return loss, params, (start,)


PENDULUM = """
<mujoco>
  <option timestep="0.02"/>
  <worldbody>
    <body pos="0 0 1">
      <joint name="hinge" type="hinge" axis="0 1 0" damping="0.1" range="-2 2" limited="true"/>
      <geom type="capsule" fromto="0 0 0 0 0 -0.5" size="0.05"/>
    </body>
  </worldbody>
  <actuator><motor joint="hinge"/></actuator>
</mujoco>
"""


def mjx_rollout():
    """A policy that drives a pendulum with limits for eight steps; the solver is a while loop."""
    import mujoco
    from mujoco import mjx

    model = mjx.put_model(mujoco.MjModel.from_xml_string(PENDULUM))
    params, static = _policy(2, 1)

    def loss(params, data):
        def step(data, _):
            ctrl = eqx.combine(params, static)(jnp.concatenate([data.qpos, data.qvel]))
            data = mjx.step(model, data.replace(ctrl=ctrl))
            return data, jnp.sum((data.qpos - 1.0) ** 2)

        return jnp.mean(jax.lax.scan(step, data, length=8)[1])

    return loss, params, (mjx.make_data(model),)


MODELS: dict[str, Model] = {
    "ViT": Model("equimo", equimo_vit),
    "ConvNeXt": Model("equimo", equimo_convnext),
    "ResNet18, BatchNorm": Model("jax-resnet", flax_resnet),
    "GPT-2, tied": Model("transformers", flax_gpt2),
    "Llama, tied": Model("transformers", flax_llama),
    "Mamba-2": Model("mamba2-jax", mamba2),
    "S5": Model("discretax", s5),
    "LSTM": Model("dm-haiku", haiku_lstm),
    **{
        f"neural ODE, {adjoint}": Model("diffrax", functools.partial(neural_ode, adjoint))
        for adjoint in (
            "RecursiveCheckpointAdjoint",
            "DirectAdjoint",
            "BacksolveAdjoint",
            "ForwardMode",
        )
    },
    **{
        f"DEQ, {adjoint}": Model("optimistix", functools.partial(equilibrium, adjoint))
        for adjoint in ("RecursiveCheckpointAdjoint", "ImplicitAdjoint")
    },
    "MAF": Model("flowjax", functools.partial(flow, "masked_autoregressive_flow", flow_layers=2)),
    "BNAF": Model("flowjax", functools.partial(flow, "block_neural_autoregressive_flow")),
    "graph network": Model("jraph", graph_network),
    "NequIP, with forces": Model("nequip-eqx", nequip),
    "PINN, second derivatives": Model("equinox", pinn),
    "log density": Model("numpyro", numpyro_density),
    "ELBO": Model("numpyro", numpyro_elbo),
    "Brax rollout": Model("brax", brax_rollout),
    "MJX rollout": Model("mujoco-mjx", mjx_rollout),
}
