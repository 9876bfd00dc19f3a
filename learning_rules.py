"""Local polynomial (Hebbian) learning rules: pure updates of a model's parameters.

    dw_ij = sum_{(a,c,d,e) in E_w} psi_acde * mean_b( x_bj^a s_bi^c y_bi^d ) * w_ij^e
    db_i  = sum_{(d,e) in E_b}     psi_de   * mean_b( y_bi^d ) * b_i^e
    dm_ij = sum_{(d1,d2,e) in E_m} psi      * mean_b( y_bj^d1 y_bi^d2 ) * m_ij^e + psi_diag [i = j]
    new   = old + bound(delta) - l2 * old

All three sums have the same form, evaluated in kernels/local_polynomial.py. For pairs of inputs a
term may multiply powers of both views: (x1,s1,y1,x2,s2,y2,w), (y1,y2,b), (y1_j,y1_i,y2_j,y2_i,m).
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from experiment.errors import WrongInputError
from kernels.forward_mode import runs_forward
from kernels.local_polynomial import Exponents, LocalPolynomials, LocalSum, samples
from kernels.own_precision import own_precision
from models_fully_local import Params, has_weights

BOUNDS = ("none", "tanh", "clamp")
# The factors of a term, per view: those of the sending unit j, then those of the receiving unit i
VARIABLES = {"w": (("x",), ("s", "y")), "b": ((), ("y",)), "m": (("y_j",), ("y_i",))}
TEX_TERMS = 3  # terms on a line
LARGEST_POWER = 16  # the largest power in a term; all powers up to a term's own are computed
LARGEST_BOUND = 1e30  # the largest bound_size, rate, ... of a rule; fits in float32


class RuleError(WrongInputError):
    """A rule that is wrong or wrongly used; the message is one line."""


def polynomial_exponents(
    variables: int, total_degree: int | None = None, partial_degree: int | None = None
) -> list[Exponents]:
    """The sorted exponents of all monomials within a total degree, a partial degree, or both.

    Raises RuleError if neither is given or one is negative.
    """
    degrees = [n for n in (total_degree, partial_degree) if n is not None]
    if not degrees or min(degrees) < 0:
        raise RuleError("give total_degree, partial_degree or both, each >= 0")
    most = min(degrees)
    left = most * variables if total_degree is None else total_degree
    return list(_powers_within(variables, left, most))


def _powers_within(variables: int, total: int, most: int) -> Iterator[Exponents]:
    """All tuples of powers up to `most` whose sum is at most `total`, sorted."""
    if not variables:
        yield ()
        return
    for first in range(min(total, most) + 1):
        for others in _powers_within(variables - 1, total - first, most):
            yield (first, *others)


def without_swapped_views(exponents: Sequence[Exponents]) -> list[Exponents]:
    """The first, in sorted order, of each two exponents that differ by an exchange of the views.

    Exponents hold one view's powers, then the other's, then the parameter's power.
    """

    def swapped(term: Exponents) -> Exponents:
        half = len(term) // 2
        return (*term[half : 2 * half], *term[:half], *term[2 * half :])

    return [term for term in sorted(exponents) if term <= swapped(term)]


class LearningRule(nn.Module):
    """An update of a model's parameters; the hyperparameters are its nn.Parameters.

    A rule of your own defines `update_layer`, or `update` where layers need to know of each other.
    The other methods have defaults that suit any hyperparameters, as long as the class can be made
    without arguments.

    views: how many views of each input the rule takes, 1 or 2.
    """

    views = 1

    def one_by_one(self) -> str:
        """Why the update takes one task at a time; "" if it takes several.

        Several tasks are one update in which every tensor, also the hyperparameters', has a leading
        dimension for them: params {w: [tasks, out, in], ...}, x [tasks, batch, in].
        """
        return f"{type(self).__name__} updates one task at a time"

    def update(self, model: nn.Module, params: Params, batch) -> Params:
        """New parameters after one batch [batch, ...], a pair of batches where views is 2.

        The old parameters and the batch are not modified.
        """
        plastic = sum(map(has_weights, params))
        return update_layers(model, params, batch, [self] * plastic)

    def update_layer(
        self,
        layer: nn.Module,
        old: dict[str, Tensor],
        x: Sequence[Tensor],
        s: Sequence[Tensor],
        y: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """New parameters of one layer.

        old: w [out, in], b [out], and m [out, out] where the layer has lateral weights.
        x [batch, in], s and y [batch, out]: inputs, preactivations and activities, one tensor per
            view. Of a convolutional layer w [out, in, k, k], x [batch, in, H, W], s and y
            [batch, out, H', W'].
        """
        raise NotImplementedError(f"{type(self).__name__} has neither update_layer nor update")

    def forward(self, model: nn.Module, params: Params, batch) -> Params:
        """The same as `update`, for torch.func.functional_call."""
        return self.update(model, params, batch)

    def respond_and_update(
        self, layer: nn.Module, old: dict[str, Tensor], x: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """The activation y of each view of the inputs, by the old parameters; the new parameters.

        x, and y likewise: one tensor per view.
        """
        s, y = zip(*(layer.respond(view, old) for view in x), strict=True)
        return y, self.update_layer(layer, old, x, s, y)

    def coefficients(self) -> dict[str, float]:
        """The hyperparameters as numbers, named like "rule/rate" or, of several, "rule/rates 0"."""
        return {
            f"rule/{name}" if parameter.dim() == 0 else f"rule/{name} {k}": value
            for name, parameter in self.named_parameters()
            for k, value in enumerate(parameter.detach().flatten().tolist())
        }

    def formula(
        self,
        effects: Mapping[str, float] | None = None,
        *,
        latex: bool = False,
        max_terms: int | None = None,
    ) -> str:
        """The rule as text or LaTeX; by default its name and its hyperparameters."""
        named = self.coefficients().items()
        values = [f"{name.removeprefix('rule/')} = {value:.4g}" for name, value in named]
        text = ", ".join([type(self).__name__, *values])
        return rf"& \text{{{text}}}".replace("_", r"\_") if latex else text

    def tex(self, effects: Mapping[str, float] | None = None) -> str:
        """The formula as an align* environment, to be pasted; needs LaTeX's amsmath."""
        return "\\begin{align*}\n" + self.formula(effects, latex=True) + "\n\\end{align*}"

    def start_from(self, other: "LearningRule") -> None:
        """Take another such rule's hyperparameters. Raises RuleError for one of another class."""
        if type(other).__name__ != type(self).__name__:
            raise RuleError(f"the rule is a {type(other).__name__}, not a {type(self).__name__}")
        self._set(other.to_dict()["hyperparameters"])

    def to_dict(self) -> dict:
        """A description of the rule in plain values, for JSON; `from_dict` reads it."""
        values = {name: parameter.tolist() for name, parameter in self.named_parameters()}
        return {"kind": type(self).__name__, "hyperparameters": values}

    @classmethod
    def from_dict(cls, description: dict) -> "LearningRule":
        """The rule that `to_dict` described, in float64. Raises RuleError if it is another one."""
        rule = cls().double()
        rule._set(description["hyperparameters"])
        return rule

    def _set(self, values: Mapping[str, float | list]) -> None:
        """Set all hyperparameters. Raises RuleError if names or shapes are not theirs."""
        shapes = {name: list(parameter.shape) for name, parameter in self.named_parameters()}
        given = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        if shapes != {name: list(value.shape) for name, value in given.items()}:
            raise RuleError(f"the hyperparameters are {', '.join(values)}, not {', '.join(shapes)}")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(given[name])

    def step_sizes(self) -> dict[str, Tensor]:
        """Typical sizes of the hyperparameters: an optimiser takes its steps in psi / size.

        They have the names and shapes of the hyperparameters; for those left out, by default all,
        the size is 1.
        """
        return {}

    def keep(self, masks: dict[str, Tensor]) -> None:
        """Remove the terms whose mask is False. Needed only by rules that are sparsified.

        masks: bool tensors with the names and shapes of hyperparameters.
        """
        raise NotImplementedError

    def term_coefficients(self) -> dict[str, float]:
        """The coefficients, by name, of the terms that the rule adds up; by default none."""
        return {}

    def entries_by_term(self) -> dict[str, str]:
        """For each hyperparameter with one entry per term, the name of that with the coefficients.

        By default every hyperparameter has one entry per term and holds the coefficients itself.
        """
        return {name: name for name, _ in self.named_parameters()}

    def term_changes(self, layer: nn.Module, old: dict[str, Tensor], x, s, y) -> dict[str, Tensor]:
        """The change that each term makes alone, [terms, *shape] by parameter.

        The arguments are those of `update_layer`. Needed only by rules that are
        pruned.
        """
        raise NotImplementedError


class TermSumRule(LearningRule):
    """A rule that adds up terms for w, b and m; this base class writes its formula."""

    def formula(
        self,
        effects: Mapping[str, float] | None = None,
        *,
        latex: bool = False,
        max_terms: int | None = None,
    ) -> str:
        """The rule as text or LaTeX: a line per parameter, largest terms first, and the step.

        Lateral weights have no line in a rule without terms of them, which leaves them as they are.

        effects: from `term_effects`; terms are then sorted by them, and each is followed by its
            effect in brackets.
        max_terms: the most terms to write for each parameter.
        """
        lines = []
        for group in self._written():
            texts = self._term_texts(group, effects, latex)
            shown = texts[:max_terms]
            left = len(texts) - len(shown)
            shown += [f"+ ... ({left} smaller terms)"] if left else []
            symbol = rf"\Delta {group}" if latex else f"Δ{group}"
            lines.append(f"{symbol} = {self._sum_text(group, shown, latex)}")
        return "\n".join([*lines, *self._step_texts(latex)])

    def tex(self, effects: Mapping[str, float] | None = None) -> str:
        """The whole formula as an align* environment of LaTeX's amsmath."""
        rows = []
        for group in self._written():
            texts = self._term_texts(group, effects, latex=True)
            starts = range(0, len(texts), TEX_TERMS)
            lines = [texts[k : k + TEX_TERMS] for k in starts] or [[]]
            written = [self._sum_text(group, lines[0], latex=True), *map(" ".join, lines[1:])]
            rows.append(rf"\Delta {group} ={{}}& " + " \\\\\n  & {} ".join(written))
        rows += [f"& {text}" for text in self._step_texts(latex=True)]
        return "\\begin{align*}\n" + " \\\\\n".join(rows) + "\n\\end{align*}"

    def _written(self) -> list[str]:
        """The parameters that have a line in the formula."""
        has_lateral = any(name.startswith("m/") for name in self.coefficients())
        return [group for group in VARIABLES if group != "m" or has_lateral]

    def _term_texts(
        self, group: str, effects: Mapping[str, float] | None, latex: bool
    ) -> list[str]:
        """The terms of a parameter with their signs and coefficients, largest first."""
        raise NotImplementedError

    def _sum_text(self, group: str, texts: Sequence[str], latex: bool) -> str:
        """The sum of these terms of a parameter."""
        return " ".join(texts).removeprefix("+ ") or "0"

    def _step_texts(self, latex: bool) -> list[str]:
        """Lines that describe the step if it is more than adding the sums to the parameters."""
        return []


class PolynomialRule(TermSumRule):
    """The polynomial rule above, with the same coefficients for every layer.

    Raises RuleError for wrong terms or options.

    Attributes:
        exponents: {"w": [(a, c, d, e), ...], "b": [(d, e), ...], "m": [(d1, d2, e), ...]}.
        w, b, m: the coefficients psi of these terms, nn.Parameters of the same lengths, initially
            0.
        diagonal: psi_diag, an nn.Parameter of length 1, or 0 without that term; by default it is
            there if m has terms.
        bound, bound_size: "none", "tanh" (c tanh(delta / c)) or "clamp" (to [-c, c]), and c.
        l2: decay of all parameters in each update.
        forward_weight_bound: w is clamped to [-bound, bound] after each update.
    """

    def __init__(
        self,
        exponents: dict[str, Sequence[Exponents]],
        *,
        lateral_diagonal: bool | None = None,
        bound: str = "none",
        bound_size: float = 0.1,
        l2: float = 0.0,
        forward_weight_bound: float = float("inf"),
    ) -> None:
        super().__init__()
        if bound not in BOUNDS:
            raise RuleError(f"bound {bound!r} is unknown; choose from {', '.join(BOUNDS)}")
        if not 0 < bound_size <= LARGEST_BOUND or not forward_weight_bound > 0 or not 0 <= l2 < 1:
            raise RuleError(
                f"bound_size must be > 0 and at most {LARGEST_BOUND:g}, forward_weight_bound > 0, "
                "l2 within [0, 1)"
            )
        self.exponents: dict[str, list[Exponents]] = {}
        for group, terms in ((g, exponents.get(g, ())) for g in VARIABLES):
            self.exponents[group] = [tuple(term) for term in terms]
            self._check_terms(group)
            setattr(self, group, nn.Parameter(torch.zeros(len(self.exponents[group]))))
        self._planned: dict[tuple[bool, torch.device], LocalPolynomials] = {}
        if lateral_diagonal is None:
            lateral_diagonal = bool(self.exponents["m"])
        self.diagonal = nn.Parameter(torch.zeros(int(lateral_diagonal)))
        self.bound, self.bound_size = bound, float(bound_size)
        self.l2, self.forward_weight_bound = float(l2), float(forward_weight_bound)

    @classmethod
    def of_degree(
        cls,
        total_degree: int | None = None,
        partial_degree: int | None = None,
        *,
        lateral: bool = True,
        **options,
    ) -> "PolynomialRule":
        """The rule with all terms within a total and/or partial degree.

        For single inputs and total degree 3, w, b and m have 35, 10 and 20 terms.

        lateral: whether m has terms.
        """
        exponents = {}
        for group, (sending, receiving) in VARIABLES.items():
            if group == "m" and not lateral:
                continue
            variables = cls.views * (len(sending) + len(receiving)) + 1
            terms = polynomial_exponents(variables, total_degree, partial_degree)
            exponents[group] = without_swapped_views(terms) if cls.views == 2 else terms
        return cls(exponents, **options)

    def one_by_one(self) -> str:
        """As in LearningRule; nothing, but for a class of your own derived from this one."""
        known = type(self) in (PolynomialRule, PolynomialPairRule)
        return "" if known else super().one_by_one()

    def _check_terms(self, group: str) -> None:
        terms, names = self.exponents[group], self.variable_names(group)
        for term in terms:
            if len(term) != len(names) or any(type(p) is not int or p < 0 for p in term):
                raise RuleError(f"a term of {group} needs whole powers >= 0 of {names}, got {term}")
            if max(term) > LARGEST_POWER:
                raise RuleError(f"a term of {group} has powers up to {LARGEST_POWER}, got {term}")
        if len(set(terms)) != len(terms):
            raise RuleError(f"the terms of {group} repeat themselves")

    @classmethod
    def variable_names(cls, group: str) -> list[str]:
        """The names of the variables of a group, in the order of its exponents."""
        names = [*VARIABLES[group][0], *VARIABLES[group][1]]
        if cls.views == 2:
            names = [n[0] + str(view) + n[1:] for view in (1, 2) for n in names]
        return [*names, group]

    def _sums(self, lateral: bool, device: torch.device) -> LocalPolynomials:
        """The sums of w, b and, with lateral weights, m, over tensors x, s, y of all views.

        All their terms multiply powers of s and y of all views, so these are computed only once.
        """
        if (lateral, device) not in self._planned:
            views = range(self.views)
            x, s, y = (tuple(k * self.views + v for v in views) for k in range(3))
            sending = {"w": x, "b": (), "m": y} if lateral else {"w": x, "b": ()}
            sums = [
                LocalSum(tuple(self._kernel_term(group, t) for t in self.exponents[group]), numbers)
                for group, numbers in sending.items()
            ]
            self._planned[lateral, device] = LocalPolynomials(sums, (*s, *y), device)
        return self._planned[lateral, device]

    def _kernel_term(self, group: str, term: Exponents) -> Exponents:
        sending, receiving = VARIABLES[group]
        per_view = len(sending) + len(receiving)
        views = [term[v * per_view : (v + 1) * per_view] for v in range(self.views)]
        incoming = [view[: len(sending)] for view in views] if sending else []
        s = [view[1] if group == "w" else 0 for view in views]
        return (*itertools.chain(*incoming), *s, *(view[-1] for view in views), term[-1])

    def update_layer(
        self,
        layer: nn.Module,
        old: dict[str, Tensor],
        x: Sequence[Tensor],
        s: Sequence[Tensor],
        y: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """New parameters of one layer; arguments as in LearningRule."""
        delta = self.changes(layer, old, x, s, y, {g: getattr(self, g) for g in VARIABLES})
        new = {
            "w": self._stepped(old["w"], delta["w"], self.forward_weight_bound),
            "b": self._stepped(old["b"], delta["b"]),
        }
        if "m" in old:
            if self.diagonal.numel():
                delta["m"] = delta["m"] + torch.diag_embed(self.diagonal.expand_as(old["b"]))
            new["m"] = layer.constrain(self._stepped(old["m"], delta["m"]))
        return new

    def changes(
        self, layer: nn.Module, old: dict[str, Tensor], x, s, y, psi: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The changes by coefficients psi [terms] of each parameter, before bound, decay, diagonal.

        The other arguments are as in `update_layer`.
        """
        groups = [group for group in VARIABLES if group in old]
        weights = [as_matrix(old[group], group, layer) for group in groups]
        tensors = [*x, *(samples(t) for t in (*s, *y))]
        sums = self._sums("m" in old, self.w.device)
        deltas = sums([psi[g] for g in groups], weights, tensors, layer.windows)
        return {g: d.view_as(old[g]) for g, d in zip(groups, deltas, strict=True)}

    def term_changes(self, layer: nn.Module, old: dict[str, Tensor], x, s, y) -> dict[str, Tensor]:
        """The change that each term makes alone, [terms, *shape] by parameter; see `changes`."""
        psi = {group: getattr(self, group) for group in VARIABLES}
        changes = changes_by_term(self, psi, layer, old, x, s, y)
        if "m" in old:
            unit = torch.eye(len(old["b"])).to(old["m"])
            changes["m"] = torch.cat([changes["m"], self.diagonal[:, None, None] * unit])
        return changes

    def _stepped(self, old: Tensor, delta: Tensor, limit: float = float("inf")) -> Tensor:
        step = _plainly_bounded if runs_forward() else _BoundedStep.apply
        return step(old, delta, self.bound, self.bound_size, self.l2, limit)

    def start_from(self, other: "PolynomialRule") -> None:
        """Take over another rule's coefficients; terms that it lacks get 0.

        Raises RuleError if it has terms that this rule lacks, or another number of views.
        """
        if other.views != self.views:
            raise RuleError(f"the rule takes {other.views} views of each input, not {self.views}")
        missing = [n for n, value in other.coefficients().items() if n not in self.coefficients()]
        if missing:
            raise RuleError(f"the rule has a term {missing[0]} that is not within this degree")
        values = other.coefficients()
        with torch.no_grad():
            for group, terms in self.exponents.items():
                names = [f"{group}/{self.term_name(group, term)}" for term in terms]
                coefficients = [values.get(name, 0.0) for name in names]
                getattr(self, group).copy_(torch.tensor(coefficients, dtype=torch.double))
            self.diagonal.fill_(values.get("m/diagonal", 0.0))

    def keep(self, masks: dict[str, Tensor]) -> None:
        """Remove the terms whose mask is False; masks are named like the nn.Parameters."""
        self._planned.clear()
        for name, mask in masks.items():
            kept = getattr(self, name).detach()[mask]
            setattr(self, name, nn.Parameter(kept.clone(), getattr(self, name).requires_grad))
            if name in self.exponents:
                terms = zip(self.exponents[name], mask.tolist(), strict=True)
                self.exponents[name] = [term for term, stays in terms if stays]

    def coefficients(self) -> dict[str, float]:
        """The coefficients, named like "w/x y" and "m/diagonal"."""
        named = {}
        for group, terms in self.exponents.items():
            for term, value in zip(terms, getattr(self, group).tolist(), strict=True):
                named[f"{group}/{self.term_name(group, term)}"] = value
        for value in self.diagonal.tolist():
            named["m/diagonal"] = value
        return named

    def term_coefficients(self) -> dict[str, float]:
        """The same as `coefficients`."""
        return self.coefficients()

    def term_name(self, group: str, term: Exponents) -> str:
        """A monomial as a text such as "x y^2"."""
        powers = zip(self.variable_names(group), term, strict=True)
        return " ".join(n if p == 1 else f"{n}^{p}" for n, p in powers if p) or "1"

    def _term_texts(
        self, group: str, effects: Mapping[str, float] | None, latex: bool
    ) -> list[str]:
        """The nonzero terms of a group with their signs, sorted by decreasing size or effect."""
        terms = [(n, v) for n, v in self.coefficients().items() if n[0] == group and v]
        sizes = {n: abs(v) if effects is None else effects[n] for n, v in terms}
        terms.sort(key=lambda term: -sizes[term[0]])
        space = r" \;" if latex else " "
        return [
            _term_text(v, n[2:], latex) + ("" if effects is None else f"{space}[{effects[n]:.2g}]")
            for n, v in terms
        ]

    def to_dict(self) -> dict:
        """A description of the rule in plain values, for JSON; rules/families.py reads it."""
        terms = {
            group: [
                {"exponents": list(term), "coefficient": value}
                for term, value in zip(exponents, getattr(self, group).tolist(), strict=True)
            ]
            for group, exponents in self.exponents.items()
        }
        limit = self.forward_weight_bound
        return {
            "kind": type(self).__name__,
            "terms": terms,
            "diagonal": self.diagonal.tolist(),
            "bound": self.bound,
            "bound_size": self.bound_size,
            "l2": self.l2,
            "forward_weight_bound": None if limit == float("inf") else limit,
        }

    @classmethod
    def from_dict(cls, description: dict) -> "PolynomialRule":
        """The rule that `to_dict` described, in float64; raises RuleError for wrong terms."""
        terms, limit = description["terms"], description["forward_weight_bound"]
        rule = cls(
            {group: [tuple(t["exponents"]) for t in terms[group]] for group in VARIABLES},
            lateral_diagonal=bool(description["diagonal"]),
            forward_weight_bound=float("inf") if limit is None else limit,
            **{key: description[key] for key in ("bound", "bound_size", "l2")},
        ).double()
        with torch.no_grad():
            for group in VARIABLES:
                values = [t["coefficient"] for t in terms[group]]
                getattr(rule, group).copy_(torch.tensor(values, dtype=torch.double))
            rule.diagonal.copy_(torch.tensor(description["diagonal"], dtype=torch.double))
            if rule.diagonal.shape != (len(description["diagonal"]),):
                raise RuleError(f"diagonal needs at most 1 number: {description['diagonal']}")
        return rule


class PolynomialPairRule(PolynomialRule):
    """The polynomial rule for pairs; a term multiplies powers of both views' variables."""

    views = 2


class PerLayerRule(LearningRule):
    """A separate rule for each layer that has weights."""

    def __init__(self, rules: Sequence[LearningRule]) -> None:
        super().__init__()
        self.rules = nn.ModuleList(rules)

    def one_by_one(self) -> str:
        """As in LearningRule: the reason of the first layer's rule that has one."""
        return next(filter(None, (rule.one_by_one() for rule in self.rules)), "")

    def update(self, model: nn.Module, params: Params, batch) -> Params:
        """New parameters; the inputs of a layer are computed with the old parameters before it."""
        return update_layers(model, params, batch, list(self.rules))

    def coefficients(self) -> dict[str, float]:
        """The coefficients of all layers, named like "1/w/x y" for the first layer."""
        return {
            f"{number}/{name}": value
            for number, rule in enumerate(self.rules, 1)
            for name, value in rule.coefficients().items()
        }

    def entries_by_term(self) -> dict[str, str]:
        """The same as for each of the rules, with names such as "rules.0.w"."""
        return {
            f"rules.{k}.{name}": f"rules.{k}.{owner}"
            for k, rule in enumerate(self.rules)
            for name, owner in rule.entries_by_term().items()
        }

    def term_coefficients(self) -> dict[str, float]:
        """The coefficients of terms, named as in `coefficients`."""
        return {
            f"{number}/{name}": value
            for number, rule in enumerate(self.rules, 1)
            for name, value in rule.term_coefficients().items()
        }

    def formula(
        self,
        effects: Mapping[str, float] | None = None,
        *,
        latex: bool = False,
        max_terms: int | None = None,
    ) -> str:
        """The rules as text or LaTeX, layer by layer; see PolynomialRule.formula."""
        blocks = [
            rule.formula(_of_layer(effects, k), latex=latex, max_terms=max_terms)
            for k, rule in enumerate(self.rules, 1)
        ]
        return "\n".join(f"layer {k}\n{block}" for k, block in enumerate(blocks, 1))

    def tex(self, effects: Mapping[str, float] | None = None) -> str:
        """The rules as one align* environment of LaTeX's amsmath per layer."""
        blocks = [rule.tex(_of_layer(effects, k)) for k, rule in enumerate(self.rules, 1)]
        return "\n".join(f"Layer {k}:\n{block}" for k, block in enumerate(blocks, 1))

    def step_sizes(self) -> dict[str, Tensor]:
        """The sizes of all layers, with names such as "rules.0.w"."""
        return {
            f"rules.{k}.{name}": sizes
            for k, rule in enumerate(self.rules)
            for name, sizes in rule.step_sizes().items()
        }

    def keep(self, masks: dict[str, Tensor]) -> None:
        """Remove the terms whose mask is False; masks are named like the nn.Parameters."""
        for k, rule in enumerate(self.rules):
            start = f"rules.{k}."
            of_rule = {n.removeprefix(start): v for n, v in masks.items() if n.startswith(start)}
            rule.keep(of_rule)

    def to_dict(self) -> dict:
        """A description of the rules in plain values, for JSON; rules/families.py reads it."""
        return {"kind": type(self).__name__, "rules": [rule.to_dict() for rule in self.rules]}

    @classmethod
    def from_dict(cls, description: dict, read: Callable[[dict], LearningRule]) -> "PerLayerRule":
        """The rules that `to_dict` described; raises RuleError if there are none.

        read: reads the description of one layer's rule.
        """
        if not description["rules"]:
            raise RuleError("it has no rule of a layer")
        return cls([read(of_layer) for of_layer in description["rules"]])


@torch.no_grad()
def term_grams(
    rule: LearningRule,
    model: nn.Module,
    params: Params,
    batches: Iterator,
    *,
    steps: int = 1,
    points: int = 10,
) -> dict[str, Tensor]:
    """Gram matrices of the changes c_k = psi_k mean_b(monomial_k) w^e_k by single terms.

    Inner products are summed over the synapses and over `points` evenly spaced ones of `steps`
    updates from params, each on the next batch. The result has a float64 matrix [terms, terms] for
    each parameter ("1/w", or "w" if all layers share one rule), in the order of
    `rule.term_coefficients()`. The sum of its entries is the squared norm of the whole change,
    before a rule's divisor, bound and decay and a layer's constraints.
    """
    grams: dict[str, Tensor] = {}
    if isinstance(rule, PerLayerRule):
        meters = [_TermMeter(r, f"{k}/", grams) for k, r in enumerate(rule.rules, 1)]
    else:
        meters = [_TermMeter(rule, "", grams) for _ in filter(has_weights, params)]
    measured = {k * (steps - 1) // max(1, points - 1) for k in range(points)}
    for step in range(steps):
        batch = next(batches)
        if step in measured:
            update_layers(model, params, batch, meters)
        params = rule.update(model, params, batch)
    return grams


def term_effects(rule: LearningRule, grams: Mapping[str, Tensor]) -> dict[str, float]:
    """The size of the change by each term, relative to the change by all terms together.

        effect_k = rms(psi_k mean_b(monomial_k) w^e_k) / rms(delta w)

    The root mean squares are over the synapses and steps of `term_grams`. Terms may cancel each
    other, such as a constant and y^2 at convergence, so effects can exceed 1 and do not add up to
    1. They are named as in `rule.term_coefficients()`, and 0 for parameters that the model lacks.
    """
    effects = dict.fromkeys(rule.term_coefficients(), 0.0)
    for parameter, matrix in grams.items():
        names = [name for name in effects if name.startswith(f"{parameter}/")]
        whole = matrix.sum()
        shares = (matrix.diagonal() / whole).sqrt() if whole > 0 else matrix.diagonal()
        effects.update(zip(names, shares.tolist(), strict=True))
    return effects


class _TermMeter:
    """Takes a rule's place in an update and adds the Gram matrices of its terms to `grams`."""

    respond_and_update = LearningRule.respond_and_update

    def __init__(self, rule: LearningRule, prefix: str, grams: dict[str, Tensor]) -> None:
        self.rule, self.views = rule, rule.views
        self.prefix, self.grams = prefix, grams

    def update_layer(self, layer, old, x, s, y) -> dict[str, Tensor]:
        for group, changes in self.rule.term_changes(layer, old, x, s, y).items():
            name, flat = self.prefix + group, changes.flatten(1).double()
            self.grams[name] = self.grams.get(name, 0) + flat @ flat.t()
        return old


def changes_by_term(
    rule: LearningRule, psi: Mapping[str, Tensor], layer, old, x, s, y
) -> dict[str, Tensor]:
    """The change that each term with coefficients psi makes alone, [terms, *shape] by parameter.

    The rule's `changes` must be linear in the coefficients. It is called once for each term of the
    parameter with the most terms.
    """
    alone = {group: values.diag() for group, values in psi.items()}
    most = max(1, *map(len, alone.values()))
    rows = {g: nn.functional.pad(psi, (0, 0, 0, most - len(psi))) for g, psi in alone.items()}
    by_term = [
        rule.changes(layer, old, x, s, y, {g: row[k] for g, row in rows.items()})
        for k in range(most)
    ]
    return {
        group: torch.stack([change[group] for change in by_term])[: len(alone[group])]
        for group in by_term[0]
        if group in alone
    }


def update_layers(model: nn.Module, params: Params, batch, rules: list) -> Params:
    """New parameters, by one rule for each layer that has weights; see PerLayerRule.update.

    They are computed in the dtype of the old ones, also under autocast. Raises RuleError for a
    wrong number of rules or of views.

    rules: each has `views`, the number of views of each input that it takes, and
        `respond_and_update`. For the one of LearningRule, it needs an `update_layer` like that of
        PolynomialRule.
    """
    views = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    plastic = sum(map(has_weights, params))
    if len(rules) != plastic:
        raise RuleError(f"expected a rule for each layer with weights, {plastic}, got {len(rules)}")
    if any(rule.views != len(views) for rule in rules):
        raise RuleError(f"the rule takes {rules[0].views} views of each input, got {len(views)}")
    rules, new = iter(rules), []
    with own_precision(tensor for old in params for tensor in old.values()):
        for layer, old in zip(model.layers, params, strict=True):
            if not has_weights(old):
                views = tuple(layer(x, old) for x in views)
                new.append(old)
                continue
            rule = next(rules)
            views, updated = rule.respond_and_update(layer, dict(old), views)
            _check_updated(rule, old, updated)
            new.append(updated)
    return new


def as_matrix(parameter: Tensor, group: str, layer: nn.Module) -> Tensor:
    """w [out, inputs of a sample], b [out, 1] or m [out, out] of a layer, also of several tasks."""
    if group == "b":
        return parameter.unsqueeze(-1)
    return parameter.flatten(-3) if group == "w" and layer.windows else parameter


def _check_updated(rule: LearningRule, old: dict[str, Tensor], updated: dict[str, Tensor]) -> None:
    """Raise RuleError unless a rule has returned a layer's parameters, in their shapes."""
    if not isinstance(updated, dict):
        raise RuleError(f"{type(rule).__name__} returned a {type(updated).__name__} for a layer, "
                        "not a dict of its parameters")  # fmt: skip
    for name, before in old.items():
        if name not in updated:
            raise RuleError(f"{type(rule).__name__} returned no {name} for a layer")
        if updated[name].shape != before.shape:
            shapes = f"{list(updated[name].shape)}, not {list(before.shape)}"
            raise RuleError(f"{type(rule).__name__} returned {name} of shape {shapes}")


def _plainly_bounded(old, delta, bound, size, l2, limit) -> Tensor:
    """The step of _BoundedStep in operations of torch alone."""
    if bound == "tanh":
        delta = size * torch.tanh(delta / size)
    elif bound == "clamp":
        delta = delta.clamp(-size, size)
    return ((1 - l2) * old + delta).clamp(-limit, limit)


class _BoundedStep(torch.autograd.Function):
    """clamp((1 - l2) old + bound(delta), +-limit); keeps only bound(delta) / c and the result."""

    @staticmethod
    def forward(ctx, old, delta, bound, size, l2, limit):
        kept = None
        if bound == "tanh":
            kept = torch.tanh(delta / size)
        elif bound == "clamp":
            kept = (delta / size).clamp_(-1, 1)
        decayed = old * (1 - l2) if l2 else old
        new = decayed + delta if kept is None else torch.add(decayed, kept, alpha=size)
        if limit < float("inf"):
            # not in place: compiled by torch 2.11, the gradient would be 0
            new = new.clamp(-limit, limit)
        ctx.save_for_backward(kept, new if limit < float("inf") else None)
        ctx.bound, ctx.l2, ctx.limit = bound, l2, limit
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, new = ctx.saved_tensors
        if new is not None:
            grad = grad * (new.abs() < ctx.limit)
        grad_delta = grad
        if ctx.bound == "tanh":
            grad_delta = torch.ops.aten.tanh_backward(grad, kept)
        elif ctx.bound == "clamp":
            grad_delta = grad * (kept.abs() < 1)
        return grad * (1 - ctx.l2) if ctx.l2 else grad, grad_delta, None, None, None, None


def _of_layer(effects: Mapping[str, float] | None, layer: int) -> dict[str, float] | None:
    """The effects of one layer's terms, with the names that its rule uses."""
    if effects is None:
        return None
    of_layer = [(name.split("/", 1), effect) for name, effect in effects.items()]
    return {name: effect for (number, name), effect in of_layer if number == str(layer)}


def _term_text(value: float, name: str, latex: bool) -> str:
    sign = "-" if value < 0 else "+"
    if not latex:
        return f"{sign} {abs(value):.3g} {name}" if name != "1" else f"{sign} {abs(value):.3g}"
    name = r"\delta_{ij}" if name == "diagonal" else re.sub(r"([sxy])([12]?)(_[ij])?", _latex, name)
    name = re.sub(r"\^(\d\d+)", r"^{\1}", name)
    if not math.isfinite(value):
        return rf"{sign} \mathrm{{{abs(value)}}} {'' if name == '1' else name}".rstrip()
    mantissa, exponent = f"{abs(value):.2e}".split("e")
    return rf"{sign} {mantissa} \cdot 10^{{{int(exponent)}}} {'' if name == '1' else name}".rstrip()


def _latex(variable: re.Match) -> str:
    symbol, view, unit = variable.group(1), variable.group(2), variable.group(3) or ""
    return f"{symbol}_{{{view}{unit[1:]}}}" if view else symbol + unit


def classical_rule(name: str, rate: float, *, target: float = 0.1, **options) -> PolynomialRule:
    """A classical rule as a polynomial rule; raises RuleError for an unknown name.

    name: "hebb" (dw = rate x y), "oja" (Oja 1982: dw = rate (x y - y^2 w)), "instar" (Grossberg
        1976: dw = rate (x y - y w)), "anti-hebbian" (dm = -rate y_i y_j) or "foldiak" (Foldiak
        1990: instar, dm = -rate (y_i y_j - target^2), db = rate (target - y), for layers that
        forbid self-inhibition and excitation).
    target: the mean activity that Foldiak's units approach.
    options: of PolynomialRule.
    """
    instar = {(1, 0, 1, 0): rate, (0, 0, 1, 1): -rate}
    points = {
        "hebb": {"w": {(1, 0, 1, 0): rate}},
        "oja": {"w": {(1, 0, 1, 0): rate, (0, 0, 2, 1): -rate}},
        "instar": {"w": instar},
        "anti-hebbian": {"m": {(1, 1, 0): -rate}},
        "foldiak": {
            "w": instar,
            "b": {(0, 0): rate * target, (1, 0): -rate},
            "m": {(0, 0, 0): rate * target**2, (1, 1, 0): -rate},
        },
    }
    if name not in points:
        raise RuleError(f"no classical rule is called {name!r}; choose from {', '.join(points)}")
    terms = points[name]
    exponents = {group: list(values) for group, values in terms.items()}
    rule = PolynomialRule(exponents, lateral_diagonal=False, **options)
    with torch.no_grad():
        for group, values in terms.items():
            getattr(rule, group).copy_(torch.tensor(list(values.values())))
    return rule


class SangerRule(LearningRule):
    """Sanger's rule, by which the units of a layer learn the principal components, in order.

    dw_i = rate mean_b( y_i x - y_i sum_{k <= i} y_k w_k ); biases and lateral weights don't change.
    The rule is not local, because unit i must know the weights of the units before it. It is for
    fully connected layers of linear units on centred inputs. Source: Sanger 1989, Optimal
    unsupervised learning in a single-layer linear feedforward neural network (the generalised
    Hebbian algorithm).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(float(rate)))

    def update(self, model: nn.Module, params: Params, batch: Tensor) -> Params:
        """New parameters after one batch [batch, ...]; raises RuleError for convolutions."""
        x, new = batch, []
        for layer, old in zip(model.layers, params, strict=True):
            y = layer(x, old)
            changed = {"w": old["w"] + self._change(old["w"], x, y)} if has_weights(old) else {}
            new.append(old | changed)
            x = y
        return new

    def _change(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if w.dim() != 2:
            raise RuleError("Sanger's rule takes fully connected layers, this is a convolution")
        return self.rate * (y.t() @ x - (y.t() @ y).tril() @ w) / len(x)
