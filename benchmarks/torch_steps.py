"""The scaling MLP's step in PyTorch: `.backward()`, and `torch.func.jvp` along a dense tangent."""

import numpy as np
import torch

LEARNING_RATE = 1e-6


def torch_steps(params, batch):
    """Steps on copies of a JAX model's parameters, by the name of their method."""
    x, labels = (torch.from_numpy(np.array(a)) for a in batch)
    labels = labels.long()

    def copies():
        return [torch.from_numpy(np.array(a)) for p in params for a in (p["W"], p["b"])]

    def loss(*weights):
        h = x
        for i in range(0, len(weights), 2):
            h = torch.addmm(weights[i + 1], h, weights[i])
            if i < len(weights) - 2:
                h = torch.relu(h)
        return torch.nn.functional.cross_entropy(h, labels)

    trained, perturbed = [w.requires_grad_() for w in copies()], copies()

    def backward():
        loss(*trained).backward()
        with torch.no_grad():
            for w in trained:
                w -= LEARNING_RATE * w.grad
                w.grad = None

    def forward_gradient():
        with torch.no_grad():
            tangents = tuple(torch.randn_like(w) for w in perturbed)
            _, derivative = torch.func.jvp(loss, tuple(perturbed), tangents)
            for w, v in zip(perturbed, tangents, strict=True):
                w -= LEARNING_RATE * derivative * v

    return {"PyTorch .backward()": backward, "PyTorch torch.func.jvp": forward_gradient}
