"""The flags that say how the two views of each image are made.

add_views(parser)
strengths = views_of_flags(args)        # None: single inputs
refuse_idle_flags(args, parser, view_needs(args))
"""

import argparse

from experiment.command_line import UserError
from experiment.settings import add_settings, settings_of
from experiment.view_strengths import FIELDS, GEOMETRIC, KINDS, LEARNABLE, ViewStrengths

WITHOUT_VIEWS = ("kind", "center")  # fields that have no flag of their own, or need no views
OF_GEOMETRIC = [  # fields that geometric views depend on
    name
    for name, entry in FIELDS.items()
    if GEOMETRIC in entry.metadata["kinds"] and name not in WITHOUT_VIEWS
]


def add_views(parser: argparse.ArgumentParser) -> None:
    """Add the flags for views; views are made only if --views or --pair_inputs is given."""
    group = parser.add_argument_group("views")
    add = group.add_argument
    add("--views", choices=KINDS, help=f"learn from pairs: {FIELDS['kind'].metadata['help']}")
    add("--pair_inputs", action="store_true", help="the same as --views geometric")
    add_settings(group, ViewStrengths, [name for name in FIELDS if name != "kind"])
    add("--learn_views", nargs="+", choices=LEARNABLE, default=[], metavar="STRENGTH",
        help=f"strengths of views to learn with the rule: {', '.join(LEARNABLE)}")  # fmt: skip


def views_of_flags(args: argparse.Namespace) -> ViewStrengths | None:
    """The strengths that the flags ask for; None if the inputs are single images.

    Raises ViewError for strengths out of range, and UserError if the flags contradict each other.
    """
    if args.pair_inputs and args.views not in (None, GEOMETRIC):
        raise UserError(f"--pair_inputs is --views geometric: leave it out with {args.views}")
    kind = GEOMETRIC if args.pair_inputs else args.views
    if kind is None:
        return None
    strengths = settings_of(args, ViewStrengths, kind=kind)
    strengths.check_learnable(tuple(args.learn_views))
    return strengths


def view_needs(args: argparse.Namespace) -> list[tuple[str, bool, str]]:
    """The argument `needs` of `refuse_idle_flags` for the flags of views."""
    strengths = views_of_flags(args)
    needs = [("learn_views", strengths is not None, "--views")]
    for name, entry in FIELDS.items():
        if name not in WITHOUT_VIEWS:
            matters = strengths is not None and strengths.matters(name)
            needs.append((name, matters, f"--views {' or '.join(entry.metadata['kinds'])}"))
    return needs
