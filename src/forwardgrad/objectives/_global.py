"""One loss at the network's end."""

from forwardgrad.networks import AbstractNetwork
from forwardgrad.networks._base import Examples
from forwardgrad.objectives._base import AbstractObjective, Outcome, heads_of, with_classifier
from forwardgrad.objectives._replicated import separate_losses
from forwardgrad.objectives._supervised import Supervised
from forwardgrad.objectives._task import AbstractTask, Labels


class GlobalLoss(AbstractObjective):
    r"""One loss of the network's last features.

    In supervised learning it is the mean softmax cross-entropy of the classifier's output,

    $$L = -\frac1B \sum_b \log \operatorname{softmax}(z_b)_{y_b}.$$

    In contrastive learning it is the loss of the last head's output, the projected features. The
    classifier learns at the same time by its own cross-entropy. The features are constants to it.

    **Arguments:**

    - `task`: what the loss is.

    **Raises:**

    `InputError`, when called, if the task needs a head and the network has none.
    """

    task: AbstractTask = Supervised()

    @property
    def needs_heads(self) -> bool:
        """Whether the task is another than the classifier's."""
        return not self.task.uses_labels

    def __call__(self, network: AbstractNetwork, examples: Examples, labels: Labels) -> Outcome:
        """The loss of every example, and the number of wrong predictions."""
        x = network.blocks_output(examples)
        if self.task.uses_labels:
            return with_classifier(network, x, labels, [], [], detached=False)
        head = heads_of(network, "contrastive learning needs")[-1]
        terms = [separate_losses(self.task, head(network.pooled(x)), labels)]
        return with_classifier(network, x, labels, terms, [("example",)], detached=True)
