"""An equilibrium network, trained through its fixed point, next to an ordinary tanh network.

    python examples/equilibrium_network.py                       fixed-point iterations backwards
    python examples/equilibrium_network.py --method CG_normaleq  another hypergradient
    python examples/equilibrium_network.py --resume runs/equilibrium_network-...

    h = tanh(h A + x B + c),   logits = h W + b        the ordinary network: A = 0, no iteration

T iterations from h = 0 find the hidden states of a batch; the hypergradient of the cross-entropy
with respect to A, B, c, W, b takes K iterations or products. After each step of SGD, A's singular
values are limited to --radius, so that the map stays a contraction. (Bai, Kolter, Koltun 2019,
arXiv 1909.01377; the experiment is that of Grazzi et al. 2020, arXiv 2006.16218, section 3.2, who
use the whole set in each step.) The ordinary network has the same initial weights, batches, rate
and momentum, and uses backpropagation.
"""

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiment.command_line import (
    UserError,
    common_parser,
    fraction,
    nonnegative_float,
    parse,
    positive_float,
    positive_int,
    refuse_large_seed,
    run_command,
)
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from figures.examples import NETWORKS, plot_equilibrium_run
from hypergradients import (
    CG_normaleq,
    HypergradientError,
    OuterLoss,
    UpdateMap,
    advance,
    checkpointed_reverse,
    fixed_point,
    neumann,
    neumann_lookback,
    reverse,
    reverse_unroll,
    stoch_AID,
    truncated_reverse,
)
from mnist_datasets import ImageData, load_images

TRAIN_IMAGES = 5000  # the default, or all images if there are fewer
IMPLICIT = {
    "fixed_point": fixed_point,
    "neumann": neumann,
    "CG_normaleq": CG_normaleq,
    "stoch_AID": partial(stoch_AID, verbose=False),
}
ALONG_ITERATIONS = ("reverse_unroll", "reverse", "checkpointed_reverse", "truncated_reverse",
                    "neumann_lookback")  # fmt: skip
ASYMMETRIC = "I - J is not symmetric here; take CG_normaleq or fixed_point"
UNSUITED = {
    "CG": ASYMMETRIC,
    "nystrom": ASYMMETRIC,
    "forward_mode": "it runs the network once for each of its weights; take reverse",
}


class Network:
    """Weights A [units, units], B [pixels, units], c, W [units, classes], b, and their momentum.

    recurrent: whether h is a fixed point; otherwise A is not used.
    """

    def __init__(self, args, pixels: int, classes: int, recurrent: bool, **options) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        units = args.units
        shapes = [(units, units), (pixels, units), (units,), (units, classes), (classes,)]
        drawn = [torch.randn(shape, generator=generator) * args.spread for shape in shapes]
        drawn[-1].zero_()
        self.args, self.recurrent = args, recurrent
        self.weights = [w.to(**options).requires_grad_() for w in drawn]
        self.optimizer = torch.optim.SGD(self.weights, lr=args.lr, momentum=args.momentum)

    def map(self, x: Tensor) -> UpdateMap:
        """The map h -> tanh(h A + x B + c) for inputs x [n, pixels]."""
        return lambda h, weights: [torch.tanh(h[0] @ weights[0] + x @ weights[1] + weights[2])]

    def start(self, x: Tensor) -> list[Tensor]:
        """The initial h = 0, [n, units]."""
        return [x.new_zeros(len(x), self.args.units)]

    @torch.no_grad()
    def hidden(self, x: Tensor) -> list[Tensor]:
        """The hidden states [n, units] after T iterations, or one in the ordinary network."""
        driven = x @ self.weights[1] + self.weights[2]  # the same in all iterations
        h = torch.tanh(driven)
        for _ in range(self.args.T - 1 if self.recurrent else 0):
            h = torch.tanh(h @ self.weights[0] + driven)
        return [h]

    def train_batch(self, x: Tensor, labels: Tensor) -> float:
        """Make a step of SGD; returns the loss before it."""
        self.optimizer.zero_grad()
        losses = []

        def loss(h: list[Tensor], weights: list[Tensor]) -> Tensor:
            value = cross_entropy(logits(h, weights), labels)
            losses.append(float(value.detach()))
            return value

        if self.recurrent:
            self._differentiate(x, loss)
        else:
            loss([torch.tanh(x @ self.weights[1] + self.weights[2])], self.weights).backward()
        self.optimizer.step()
        if self.recurrent:
            self.weights[0].data.copy_(projected(self.weights[0].detach(), self.args.radius))
        return losses[-1]

    def _differentiate(self, x: Tensor, loss: OuterLoss) -> None:
        """Add the hypergradient to the weights' .grad."""
        method, T, K = self.args.method, self.args.T, self.args.K
        update, weights = self.map(x), self.weights
        if method in IMPLICIT:
            IMPLICIT[method](self.hidden(x), weights, K=K, fp_map=update, outer_loss=loss)
        elif method == "reverse_unroll":
            h = self.start(x)
            for _ in range(T):
                h = update(h, weights)
            reverse_unroll(h, weights, loss)
        elif method == "reverse":
            history = [self.start(x)]
            for _ in range(T):
                history.append(advance(history[-1], weights, [update]))
            reverse(history, weights, [update] * T, loss)
        elif method == "checkpointed_reverse":
            checkpointed_reverse(self.start(x), weights, [update] * T, loss)
        elif method == "truncated_reverse":
            truncated_reverse(self.start(x), weights, K, [update] * max(T, K), loss)
        else:
            h = advance(self.start(x), weights, [update] * (T - 1))
            neumann_lookback(h, weights, K, [update], loss)

    @torch.no_grad()
    def judge(self, x: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean cross-entropy, and the fraction of inputs that are classified correctly."""
        output = logits(self.hidden(x), self.weights)
        right = (output.argmax(1) == labels).double().mean()
        return float(cross_entropy(output, labels)), float(right)

    @torch.no_grad()
    def distance_from_fixed_point(self, x: Tensor) -> float:
        """|h_{T+1} - h_T| / |h_T|."""
        h = self.hidden(x)
        return float((self.map(x)(h, self.weights)[0] - h[0]).norm() / h[0].norm())

    def state_dict(self) -> dict:
        return {"weights": [w.detach() for w in self.weights],
                "optimizer": self.optimizer.state_dict()}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])


def logits(h: list[Tensor], weights: list[Tensor]) -> Tensor:
    """h W + b, [n, classes]."""
    return h[0] @ weights[3] + weights[4]


def projected(matrix: Tensor, radius: float) -> Tensor:
    """The nearest matrix whose singular values are at most `radius`."""
    if not matrix.isfinite().all():
        raise FloatingPointError("the weights are not finite any more; take a smaller --lr")
    u, s, v = torch.linalg.svd(matrix)
    return (u * s.clamp(max=radius)) @ v


# ---- the command ----


def make_parser():
    """The command's flags."""
    parser = common_parser("Train an equilibrium network on digits.", "equilibrium_network")
    parser.set_defaults(dataset="mnist5k")
    add = parser.add_argument_group("network").add_argument
    add("--units", type=positive_int, default=200, help="number of hidden units")
    add("--T", type=positive_int, default=20, help="iterations of the map, T")
    add("--radius", type=positive_float, default=0.99, help="limit of A's singular values")
    add("--spread", type=nonnegative_float, default=0.01, help="spread of the initial weights")
    add = parser.add_argument_group("training").add_argument
    add("--method", choices=(*IMPLICIT, *ALONG_ITERATIONS, *UNSUITED), default="fixed_point",
        help="how the hypergradient is computed")  # fmt: skip
    add("--K", type=positive_int, default=20, help="iterations or terms of the method")
    add("--train_images", type=positive_int, default=TRAIN_IMAGES, metavar="N",
        help="use only the first N training images")  # fmt: skip
    add("--epochs", type=positive_int, default=30, help="passes over the training images")
    add("--batch_size", type=positive_int, default=200, help="images in a batch")
    add("--lr", type=positive_float, default=0.5, help="learning rate (SGD)")
    add("--momentum", type=fraction, default=0.9, help="momentum of SGD")
    return parser


Pairs = tuple[Tensor, Tensor]  # inputs [n, pixels], labels [n]


def flat(data: ImageData, dtype: torch.dtype) -> Pairs:
    """All images as rows, and their labels."""
    return data.floats(dtype=dtype).flatten(1), data.labels


def train_epoch(
    args, networks: Mapping[str, Network], train: Pairs, test: Pairs, epoch: int
) -> dict[str, float]:
    """Train both networks on the same batches for an epoch; returns its numbers.

    Training losses are means over the epoch. Raises FloatingPointError if a number is not finite.
    """
    x, labels = train
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    row = {}
    for name, network in networks.items():
        losses = [
            network.train_batch(x[rows], labels[rows]) for rows in order.split(args.batch_size)
        ]
        row[f"{name}/train_loss"] = sum(losses) / len(losses)
        row[f"{name}/train_accuracy"] = network.judge(x, labels)[1]
        row[f"{name}/test_loss"], row[f"{name}/test_accuracy"] = network.judge(*test)
    row["distance_from_fixed_point"] = networks["equilibrium"].distance_from_fixed_point(test[0])
    if not all(math.isfinite(value) for value in row.values()):
        raise FloatingPointError(f"epoch {epoch}: loss not finite; take a smaller --lr")
    return row


class BothNetworks:
    """Epochs of both networks side by side; see `run_steps`."""

    def __init__(self, args, networks: Mapping[str, Network], train: Pairs, test: Pairs) -> None:
        self.args, self.networks, self.train, self.test = args, networks, train, test
        self.done, self.last = 0, {}

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.done >= self.args.epochs

    def step(self) -> dict[str, float]:
        """One epoch."""
        self.done += 1
        self.last = train_epoch(self.args, self.networks, self.train, self.test, self.done)
        return self.last

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        states = {name: network.state_dict() for name, network in self.networks.items()}
        return {"done": self.done, "last": self.last, "networks": states}

    def load_state_dict(self, state: dict) -> None:
        """Resume from the result of `state_dict`."""
        self.done, self.last = state["done"], state["last"]
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])


def report(args, log: RunLog, source: str, epochs: int, last: Mapping[str, float]) -> None:
    """Print and write the numbers of the last epoch; draw the figure."""
    log.write_results({"data": source, "method": args.method,
                                    "epochs": epochs, **last})  # fmt: skip
    log.plot(plot_equilibrium_run)
    for name, title in NETWORKS.items():
        log.say(f"{title}: test accuracy {last[f'{name}/test_accuracy']:.2%}, training accuracy "
                f"{last[f'{name}/train_accuracy']:.2%}")  # fmt: skip
    log.say(f"one more iteration moves h by {last['distance_from_fixed_point']:.1e} of its norm")
    log.say(f"everything is in {log.directory}")


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train both networks, report."""
    args = parse(make_parser(), argv)
    refuse_large_seed(args, 40)
    if args.method in UNSUITED:
        raise UserError(f"--method {args.method} does not suit: {UNSUITED[args.method]}")
    device, dtype = set_up(args)
    train_data, test_data = (d.to(device) for d in load_images(args.dataset, args.data_dir))
    if args.train_images > max(len(train_data), TRAIN_IMAGES):
        raise UserError(f"--train_images {args.train_images}: there are {len(train_data)}")
    sizes = math.prod(train_data.shape), train_data.classes  # also classes without used images
    train_data = train_data.subset(slice(args.train_images))
    networks = {
        name: Network(args, *sizes, name == "equilibrium", device=device, dtype=dtype)
        for name in NETWORKS
    }
    with open_run(args, "equilibrium_network", train_data) as log:
        source = f"{len(train_data):,} images for training; {train_data.source}"
        log.say(source)
        sets = flat(train_data, dtype), flat(test_data, dtype)
        shown = [f"{name}/test_accuracy" for name in networks]
        both = BothNetworks(args, networks, *sets)
        finished = run_steps(log, both, "epoch", args.epochs, shown=shown)
        report(args, log, source, both.done, both.last)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(HypergradientError,))
